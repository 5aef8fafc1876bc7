"""A checkpoint is whole if every file is as it was written, to the bit, and nothing that a resume needs is missing."""

import json

import pytest

from perce.training import checkpoints
from perce.training.checkpoints import LIST, flaw, newest_whole, seal
from tests.helpers.trainers import arguments, model_for, trainer_for


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run with checkpoints after its first and its second step."""
    directory = tmp_path_factory.mktemp("run")
    trainer_for(model_for("lora"), arguments(directory, max_steps=2, save_strategy="steps", save_steps=1)).train()
    return directory


@pytest.fixture
def checkpoint(trained):
    """The newest checkpoint; changes that a test makes to its files are undone."""
    path = trained / "checkpoint-2"
    before = {file: file.read_bytes() for file in path.iterdir()}
    yield path
    for file in path.iterdir():
        file.unlink()
    for file, content in before.items():
        file.write_bytes(content)


FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("name", FILES)
def test_one_bit_of_any_file_counts(checkpoint, name, capsys):
    assert flaw(checkpoint) is None
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert flaw(checkpoint) == f"{name} is not what was written: its contents have changed"
    assert newest_whole(checkpoint.parent) == checkpoint.with_name("checkpoint-1")
    path.write_bytes(bytes(len(content)))
    assert flaw(checkpoint) == f"{name} is not what was written: its contents have changed"


@pytest.mark.parametrize("text", ["[]", "null", "3", '{"a": 3}', '{"a": []}', "{}", "\0\0\0", "", "{"])
def test_a_list_that_is_none_is_a_flaw(checkpoint, text):
    (checkpoint / LIST).write_text(text)
    assert LIST in flaw(checkpoint)
    assert newest_whole(checkpoint.parent) == checkpoint.with_name("checkpoint-1")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_whole_is_all_that_a_resume_needs(checkpoint, name):
    (checkpoint / name).unlink()
    seal(checkpoint)
    assert flaw(checkpoint) == f"it was saved without {name}, which a resume needs"
    assert newest_whole(checkpoint.parent) == checkpoint.with_name("checkpoint-1")


def test_older_checkpoints_are_not_read_again_at_every_save(checkpoint, monkeypatch):
    monkeypatch.setattr("perce.files.integrity.digest", lambda path: pytest.fail(f"{path} was read"))
    checkpoints._rotate(checkpoint, 5, None)
    assert len(json.loads((checkpoint / LIST).read_text())) > len(FILES)


def test_checkpoints_of_models_alone_are_rotated_like_others(tmp_path):
    args = arguments(
        tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=2, save_only_model=True
    )
    trainer_for(model_for("lora"), args).train()
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert "saved without optimizer.pt" in flaw(tmp_path / "checkpoint-3")
