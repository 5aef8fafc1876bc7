"""A model, and a directory with everything that commands read."""

import os

import pytest

from tests.helpers.tiny import save_tiny_model, write_jsonl
from tests.helpers.training import ROWS


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def here(tmp_path, base, monkeypatch):
    """A directory with everything that the commands read, by short names."""
    monkeypatch.chdir(tmp_path)
    for command in ("perce.measuring.inference.load_to_measure", "perce.planning.plans.make_plan"):
        monkeypatch.setattr(command, lambda *_: pytest.fail("found too late"))
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    write_jsonl(tmp_path / "dir" / "train.jsonl", ROWS)
    (tmp_path / "model").symlink_to(base)
    (tmp_path / "link").symlink_to("rows.jsonl")
    os.link(tmp_path / "rows.jsonl", tmp_path / "hard.html")
    (tmp_path / "c.yaml").write_text("precision: fp32\n")
    (tmp_path / "p.yaml").write_text("header: 'Known: '\n")
    (tmp_path / "other.json").write_text("{}")
    return tmp_path
