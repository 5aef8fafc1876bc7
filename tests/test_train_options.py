"""python -m perce.train: its options, and the mistakes of users: one paragraph, exit code 2, and nothing spoilt."""

import os
import shutil

import pytest
import yaml
from transformers import AutoTokenizer

from perce.config.commands import parse_args
from perce.errors import UserError
from tests.tiny import write_jsonl
from tests.training import ROWS, fails, model_directory, rows_file, training  # noqa: F401  fixtures


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


def test_resume_with_another_model_is_refused_and_spoils_nothing(train, tmp_path):
    assert train(save_steps=1, max_steps=1)[0] == 0
    saved = (tmp_path / "run" / "config.yaml").read_text()
    fails(train("--resume", model=None, data=None, lora_r=3, max_steps=2), "--resume", "lora_r", "3", "16")
    assert (tmp_path / "run" / "config.yaml").read_text() == saved
    (tmp_path / "run" / "checkpoint-1" / "trainer_state.json").unlink()
    fails(train("--resume", model=None, data=None, max_steps=2), "no whole checkpoint")


def test_nothing_fits(train, tmp_path):
    fails(train("--skip_bad_rows", max_length=20), "No example is left", "max_length=20")


@pytest.mark.parametrize(
    ("flag", "fragments"),
    [
        ("--learning_rat=1e-4", ["learning_rat", "learning_rate"]),
        ("--weight_decay=much", ["weight_decay", "number", "much"]),
        ("--objective=lossy", ["objective", "perce, ce"]),
        ("--max_steps=ten", ["max_steps", "whole number"]),
        ("--clip_min=6", ["clip_min", "6"]),
        ("--clip_max=inf", ["clip_max", "finite"]),
        ("--clip_max=nan", ["clip_max", "nan"]),
        ("--precision=fp8", ["precision", "auto, fp32, bf16"]),
        ("--backend=cuda", ["backend", "auto, triton, torch, reference"]),
        ("--lora_dropout=1.5", ["lora_dropout"]),
        ("--chat_template_kwargs={", ["chat_template_kwargs", "JSON"]),
        ("--columns=persona", ["columns"]),
        ("--bf16=true", ["--precision"]),
        ("--streaming", ["max_steps"]),
        ("--tokens_per_batch=0", ["tokens_per_batch", ">= 1"]),
        ("--packing", ["packing", "flash_attention_2", "sdpa on cpu", "--tokens_per_batch"]),
        ("--optim=adamw_bnb_8bit", ["cannot be used here"]),
        ("--seed=-1", ["seed"]),
        ("--mlp_tile=-1", ["mlp_tile", ">= 0"]),
        ("--persona_grad=half", ["persona_grad", "full, none"]),
        ("--activation_offload", ["activation_offload", "CPU"]),
        ("--use_liger_kernel", ["use_liger_kernel", "GPU"]),
        ("stray", ["stray"]),
    ],
)
def test_flags_that_are_off(train, tmp_path, flag, fragments):
    fails(train(flag, max_steps=None if "max_steps" in flag or flag == "--streaming" else 1), *fragments)
    assert not (tmp_path / "run" / "config.yaml").exists(), "it can be corrected and run again"


def test_a_mistyped_option_leaves_no_directory_behind(train, tmp_path):
    fails(train("--learning_rat=1e-4"), "learning_rat")
    assert not (tmp_path / "run").exists()


def test_flags_that_exclude_each_other(train):
    fails(train("--tokens_per_batch=99", "--per_device_train_batch_size=2"), "tokens_per_batch", "one of them")
    fails(train("--tokens_per_batch=99", "--streaming"), "--streaming, --tokens_per_batch", "read the data whole")


def test_yaml(train, tmp_path, model, data, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-5\nclip_min: 0.5\nload_in_4bit: false\nweight_decay: 1e-2\n")
    assert train("--config", str(path), "--clip_min", "0.7", "--print_config")[0] == 0
    config, _ = parse_args(["--config", str(path), "--clip_min", "0.7"], {})
    assert (config.run.learning_rate, config.loss.clip_min, config.extra) == (1e-5, 0.7, {"weight_decay": 0.01})
    for content, fragments in {
        "learning_rte: 1e-5": ["learning_rte", "learning_rate"],
        "learning_rate: [1": ["c.yaml", "YAML"],
        "- a": ["c.yaml", "list"],
        "max_steps: 1.5": ["max_steps", "1.5"],
    }.items():
        path.write_text(content)
        fails(train("--config", str(path), max_steps=None), *fragments)
    fails(train("--config", str(tmp_path / "none.yaml")), "none.yaml", "cannot be read")


def test_print_config_names_every_option_and_can_be_read_back(train, tmp_path):
    code, out, _ = train("--print_config", lora_r=2)
    path = tmp_path / "printed.yaml"
    path.write_text(out)
    config, _ = parse_args(["--config", str(path)], {})
    assert code == 0 and config.model.lora_r == 2 and config.to_dict() == yaml.safe_load(out)
    assert not (tmp_path / "run").exists()


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
