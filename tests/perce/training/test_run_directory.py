"""A run's directory: claimed, never another run's, resumed by the model that it began with."""

import os

import pytest

from perce import UserError
from perce.config.commands import parse_args
from tests.helpers.training import fails


def test_resume_with_another_model_is_refused_and_spoils_nothing(train, tmp_path):
    assert train(save_steps=1, max_steps=1)[0] == 0
    saved = (tmp_path / "run" / "config.yaml").read_text()
    fails(train("--resume", model=None, data=None, lora_r=3, max_steps=2), "--resume", "lora_r", "3", "16")
    assert (tmp_path / "run" / "config.yaml").read_text() == saved
    (tmp_path / "run" / "checkpoint-1" / "trainer_state.json").unlink()
    fails(train("--resume", model=None, data=None, max_steps=2), "no whole checkpoint")


def test_output_directories(train, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").write_text("")
    fails(train(output_dir=tmp_path / "taken"), "--output_dir", "holds a run", "--resume")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("perce.hub.load_tokenizer", lambda *_: pytest.fail("found too late"))
    fails(train(output_dir=tmp_path / "file" / "run"), "--output_dir", "cannot be written")
    fails(train("--resume", output_dir=tmp_path / "fresh"), "--resume", "holds no run")
    monkeypatch.undo()
    (tmp_path / "unsaved").mkdir()
    (tmp_path / "unsaved" / "config.yaml").write_text("max_steps: 3\n")
    fails(train("--resume", output_dir=tmp_path / "unsaved"), "--resume", "checkpoint", "--save_steps")
    with pytest.raises(UserError, match="--output_dir"):
        from perce.train import resolve

        resolve(parse_args(["--resume"], {})[0])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output_directory(train, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    fails(train(output_dir=tmp_path / "locked" / "run"), "cannot be written")
