"""JSON files of perce's that were damaged by hand."""

import pytest

from perce.data.splits import HeldOut
from perce.errors import UserError
from perce.files.integrity import LIST, read_object
from perce.files.runs import HELD_OUT_NAME
from perce.hub import base_of_adapter
from perce.running.directory import FACTS, Claim, check_facts
from perce.training.checkpoints import damage

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"step": 1', "Expecting ',' delimiter: line 1 column 11"),
        ("", "Expecting value"),
        ("[1, 2]", r"expected a JSON object, got \[1, 2\]"),
        ("null", "expected a JSON object, got None"),
        ('{"other": 1}', "expected a field step, got other"),
        ("{}", "expected a field step, got none"),
        (DEEP, "it is nested too deeply"),
    ],
)
def test_what_is_no_such_object_is_named_in_one_line(tmp_path, content, reason):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"^{reason}"):
        read_object(tmp_path / "a.json", "step")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"other": {}}', DEEP])
def test_every_file_of_a_run_that_was_damaged_is_named(tmp_path, content):
    for name in (HELD_OUT_NAME, FACTS, LIST, "adapter_config.json"):
        (tmp_path / name).write_text(content)
    assert f"its {LIST} cannot be read" in damage(tmp_path)
    for name, read in (
        (HELD_OUT_NAME, lambda: HeldOut.recorded(tmp_path)),
        (FACTS, lambda: check_facts(Claim(tmp_path, tmp_path), {"step": 1}, 1)),
        ("adapter_config.json", lambda: base_of_adapter(str(tmp_path))),
    ):
        with pytest.raises(UserError, match=str(tmp_path / name)) as caught:
            read()
        assert "Error(" not in str(caught.value)
