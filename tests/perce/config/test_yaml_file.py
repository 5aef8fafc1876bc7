"""YAML files that cannot be read as options, and what is said of them."""

import pytest

from perce import UserError
from perce.config.yaml_file import read_yaml


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("seed: 1\nlearning_rate: 1e-4\nseed: 2\n", ["line 3", "'seed' is there twice"]),
        ("prompt:\n  header: a\n  header: b\n", ["line 3", "'header' is there twice"]),
        ("learning-rate: 1e-4\nlearning_rate: 1e-5\n", ["learning_rate is there twice"]),
        ("seed: " + "1" * 5000, ["cannot be read"]),
        ("data: " + "[" * 5000, ["cannot be read"]),
        ("data: 2026-99-99", ["cannot be read"]),
        ("base: &a [1]\nx: {<<: *a}", ["not valid YAML"]),
    ],
)
def test_yaml_that_has_two_meanings_or_none(tmp_path, content, fragments):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        read_yaml(str(tmp_path / "c.yaml"))
    assert all(fragment in str(caught.value) for fragment in [*fragments, "--config", "c.yaml"])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "got"),
    [("", "got none"), ("# model: x\n", "got none"), ("- model: x\n", "got a list"), ("model x\n", "got a text"),
     ("1: x\n", "got a name that is no text"), ("5\n", "got int")],
)  # fmt: skip
def test_what_is_no_recipe_is_told_in_words(tmp_path, content, got):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(UserError, match=f"r.yaml: expected `name: value` lines, {got}") as caught:
        read_yaml(str(tmp_path / "r.yaml"))
    assert "NoneType" not in str(caught.value)
