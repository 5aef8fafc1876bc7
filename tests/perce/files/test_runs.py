"""How a run directory is recognised."""

import pytest

from perce.files.runs import CONFIG_NAME, FACTS_NAME, holder_of, lacking, run_directory


@pytest.mark.parametrize("place", ["", "merged", "checkpoint-12"])
def test_a_model_in_a_run_knows_its_run(place, tmp_path):
    (model := tmp_path / place).mkdir(exist_ok=True)
    for name in (CONFIG_NAME, FACTS_NAME):
        assert lacking(tmp_path) == name and run_directory(str(model)) is None, "one of its files alone is no run"
        (tmp_path / name).touch()
    assert lacking(tmp_path) is None and run_directory(str(model)) == holder_of(model) == tmp_path
    assert run_directory(str(model / "elsewhere")) is None and run_directory(None) is None
