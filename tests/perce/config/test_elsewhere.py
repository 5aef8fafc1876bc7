"""Option names of other programs lead to the option of ours that is meant, in every command."""

import dataclasses

import pytest
from transformers import TrainingArguments

from perce import evaluate, plan, score
from perce import train as train_command
from perce.config.commands import EVALUATE, PLAN, SCORE, TRAIN
from perce.config.elsewhere import ADVICE, NAMES, NOTES, known_as
from perce.training.idle import OURS
from tests.helpers.training import fails

COMMANDS = {"train": train_command, "score": score, "evaluate": evaluate, "plan": plan}
OF_THE_TRAINER = {field.name for field in dataclasses.fields(TrainingArguments)}
OF_COMMANDS = {name for command in (TRAIN, SCORE, EVALUATE, PLAN) for name in command.fields}


def said(name, argv, capsys):
    code = COMMANDS[name].main(argv)
    out, err = capsys.readouterr()
    fails((code, out, err))
    return err.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "flag", "right"),
    [
        ("train", "lr", "learning_rate"), ("train", "epochs", "num_train_epochs"), ("train", "output", "output_dir"),
        ("train", "batch_size", "per_device_train_batch_size"), ("train", "out", "output_dir"),
        ("train", "save_dir", "output_dir"), ("train", "dataset", "data"), ("train", "model_name_or_path", "model"),
        ("train", "train_file", "data"), ("train", "validation_file", "data"),
        ("train", "max_seq_length", "max_length"), ("plan", "max-seq-length", "context"),
        ("train", "cutoff_len", "max_length"), ("train", "grad_accum", "gradient_accumulation_steps"),
        ("train", "bf16", "precision"), ("train", "fp16", "precision"), ("train", "dtype", "precision"),
        ("train", "gradient_checkpointing", "activation_checkpointing"), ("train", "lora", "lora_r"),
        ("train", "rank", "lora_r"), ("train", "lora_rank", "lora_r"), ("train", "load_in_8bit", "load_in_4bit"),
        ("train", "qlora", "load_in_4bit"), ("train", "quantization", "load_in_4bit"), ("train", "device", "use_cpu"),
        ("train", "warmup", "warmup_steps"), ("train", "steps", "max_steps"), ("train", "eval", "eval_steps"),
        ("train", "optimizer", "optim"), ("train", "scheduler", "lr_scheduler_type"), ("score", "out", "output"),
        ("score", "dataset", "data"), ("score", "bf16", "precision"), ("score", "output_dir", "output"),
        ("score", "per_device_eval_batch_size", "batch_size"), ("score", "seed", "split_seed"),
        ("evaluate", "base_model", "model"), ("evaluate", "max_tokens", "max_new_tokens"),
        ("plan", "batch_size", "per_device_train_batch_size"), ("plan", "max_length", "context"),
        ("plan", "output", "json"),
    ],
)  # fmt: skip
def test_the_option_that_is_meant_is_named(command, flag, right, capsys, monkeypatch):
    monkeypatch.setattr("perce.training.arguments.silence_libraries", lambda: pytest.fail("found too late"))
    expected = f"error: --{flag.replace('-', '_')}: unknown option. It is --{right} here"
    assert said(command, [f"--{flag}", "1"], capsys).startswith(expected)
    assert said(command, [f"--{flag}=1"], capsys).startswith(expected)


@pytest.mark.parametrize(
    ("command", "flag", "expected"),
    [
        ("score", "lr", "It is --learning_rate of python -m perce.train."),
        ("score", "learning_rate", "It is an option of python -m perce.train."),
        ("evaluate", "weight_decay", "It is an option of python -m perce.train."),
        ("train", "labels", "It is an option of python -m perce.score."),
        ("train", "compare_with", "It is an option of python -m perce.evaluate."),
        ("plan", "jsonl", "It is an option of python -m perce.score."),
        ("score", "gpu_memory", "It is an option of python -m perce.plan."),
        ("score", "device", "CUDA_VISIBLE_DEVICES"), ("score", "clip_mim", "Did you mean clip_min"),
        ("train", "learning_rat", "Did you mean learning_rate"), ("score", "zzz", "`--help` lists the options"),
    ],
)  # fmt: skip
def test_an_option_of_another_command_or_of_none(command, flag, expected, capsys):
    assert expected in said(command, [f"--{flag}", "1"], capsys)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("-lr", "-lr: an option begins with two dashes. It is --learning_rate here."),
        ("—lr", "—lr: an option begins with two dashes. It is --learning_rate here."),
        ("lr=1e-4", "lr: an option begins with two dashes. It is --learning_rate here."),
        ("-learning_rate=1", "-learning_rate: an option begins with two dashes: --learning_rate."),
        ("-learning-rate", "-learning-rate: an option begins with two dashes: --learning_rate."),
        ("learning_rat=1", "learning_rat: an option begins with two dashes. Did you mean learning_rate"),
        ("1e-4", "1e-4: expected an option that starts with --."),
    ],
)
def test_what_has_no_two_dashes(argument, expected, capsys):
    assert said("train", [argument, "1e-4"], capsys).startswith(f"error: {expected}")


def test_a_file_is_named(tmp_path, capsys):
    path = tmp_path / "axolotl.yaml"
    path.write_text("base_model: x\nmicro_batch_size: 2\n")
    expected = f"error: {path}: base_model: unknown option. It is model here"
    assert said("train", ["--config", str(path)], capsys).startswith(expected)
    path.write_text("zzz: 1\n")
    assert said("score", ["--config", str(path)], capsys).startswith(f"error: {path}: zzz: unknown option.")
    path.write_text("lora_r: 4\nweight_decay: 0.1\nbf16: true\nlr: 1\n")
    assert f"{path}: lr: unknown option. It is learning_rate of python -m perce.train" in said(
        "score", ["--config", str(path)], capsys
    )


def test_the_table_names_what_there_is():
    for right, names in NAMES:
        assert right in OF_COMMANDS | OF_THE_TRAINER, right
        assert right not in names.split() and len(set(names.split())) == len(names.split())
    assert set(NOTES) <= {right for right, _ in NAMES} and set(ADVICE).isdisjoint(TRAIN.fields)
    for name in {name for _, names in NAMES for name in names.split()} & OF_THE_TRAINER:
        stolen = [right for right in known_as(name) if right in {*TRAIN.fields} | OF_THE_TRAINER - OF_COMMANDS]
        assert name in OURS or name in TRAIN.fields or not stolen, f"{name} is a TrainingArguments field itself"
