"""Mistakes in the data and the model of a run: one paragraph, exit code 2, and nothing spoilt."""

import shutil

import pytest
from transformers import AutoTokenizer

from tests.helpers.tiny import write_jsonl
from tests.helpers.training import ROWS, fails


def test_missing_data_file(train):
    fails(train(data="nowhere/rows.jsonl"), "nowhere/rows.jsonl", "--data")


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        ({"persona": "p", "query": "q", "response": ""}, ["bad.jsonl:2", "response"]),
        ({"query": "q", "response": "r"}, ["bad.jsonl:2", "persona"]),
        ({"persona": "p", "query": "q", "respones": "r"}, ["bad.jsonl:2", "respones", "response"]),
        ({"persona": "p", "query": 3, "response": "r"}, ["bad.jsonl:2", "query"]),
        ("just text", ["bad.jsonl:2", "JSON object"]),
    ],
)
def test_bad_rows(train, tmp_path, row, fragments):
    fails(train(data=write_jsonl(tmp_path / "bad.jsonl", [ROWS[0], row])), *fragments, "--skip_bad_rows")


def test_response_longer_than_max_length(train, tmp_path):
    path = write_jsonl(tmp_path / "long.jsonl", [*ROWS, {**ROWS[0], "response": "word " * 300}])
    fails(train(data=path, max_length=300), "long.jsonl:13", "max_length=300", "--max_length")


def test_unreadable_model_directory(train, tmp_path):
    (tmp_path / "m").mkdir()
    fails(train(model=tmp_path / "m"), "--model", str(tmp_path / "m"), "config.json")
    fails(train(model=tmp_path / "n", output_dir=tmp_path / "other"), "no such directory")


def test_broken_weights_and_adapters_alone(train, tmp_path, model):
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"version https://git-lfs")
    fails(train(model=broken), "--model", "could not be loaded")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    fails(train(model=adapter, output_dir=tmp_path / "other"), "adapter alone", "base model")


def test_a_token_outside_the_models_vocabulary(train, tmp_path, model):
    larger = shutil.copytree(model, tmp_path / "larger")
    tokenizer = AutoTokenizer.from_pretrained(larger)
    tokenizer.add_tokens(["bees"])
    tokenizer.save_pretrained(larger)
    fails(train(model=larger), "token id 400", "vocabulary of 400")


def test_nothing_fits(train, tmp_path):
    fails(train("--skip_bad_rows", max_length=20), "No example is left", "max_length=20")


def test_a_bad_row_in_a_stream_leaves_a_checkpoint_behind(train, tmp_path, monkeypatch):
    monkeypatch.setattr("perce.data.stream.BLOCK", 1)
    directory = tmp_path / "split"
    write_jsonl(directory / "train.jsonl", [*ROWS[:8], {"persona": "p", "query": "q", "response": ""}])
    write_jsonl(directory / "validation.jsonl", ROWS[8:])
    result = train(
        "--streaming", data=directory, per_device_train_batch_size=2, gradient_accumulation_steps=1, max_steps=9
    )
    fails(result, "train.jsonl:9")
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert "--resume" in result[2]
    written = (checkpoint / "complete.json").stat().st_mtime_ns
    fails(train("--resume", model=None, data=None, precision=None, max_steps=9), "train.jsonl:9")
    assert (checkpoint / "complete.json").stat().st_mtime_ns == written, "there is nothing new to save"
