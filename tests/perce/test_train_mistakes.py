"""Mistakes in the data, the model and the options of a run: one paragraph, exit code 2, and nothing spoilt."""

import shutil

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoTokenizer, Trainer

from tests.helpers.tiny import write_jsonl
from tests.helpers.training import ROWS, fails


def test_a_mistake_leaves_no_directory_behind(train, tmp_path):
    fails(train(data="nowhere/rows.jsonl", output_dir=tmp_path / "made" / "run"), "nowhere/rows.jsonl", "--data")
    assert not (tmp_path / "made").exists()
    (tmp_path / "there").mkdir()
    fails(train(data="nowhere/rows.jsonl", output_dir=tmp_path / "there"), "nowhere/rows.jsonl")
    assert (tmp_path / "there").is_dir()


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
    fails(train(model=adapter, output_dir=tmp_path / "other"), "only an adapter", "base model")


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


SCHEDULE = "--lr_scheduler_type={} --lr_scheduler_kwargs={}"


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ("--report_to=clearml", ["clearml"]),
        ("--lr_scheduler_kwargs=text", ["mapping", "text"]), ("--lr_scheduler_kwargs={bad", ["cannot be used here"]),
        (SCHEDULE.format("linear", '{"min_lr":1e-5}'), ["min_lr"]),
        ("--lr_scheduler_type=cosine_with_min_lr", ["min_lr"]),
        ("--lr_scheduler_type=warmup_stable_decay", ["num_decay_steps"]),
        (SCHEDULE.format("reduce_lr_on_plateau", '{"factor":2}'), ["Factor"]),
        ("--lr_scheduler_type=reduce_lr_on_plateau --eval_strategy=no", ["eval strategy"]),
        (SCHEDULE.format("cosine", '{"num_cycles":"x"}'), ["cannot be used here"]),
        ("--push_to_hub", ["--push_to_hub", "HF_TOKEN"]),
        ("--dataloader_drop_last --per_device_train_batch_size=100", ["dataloader_drop_last", "9 training examples"]),
        ("--dataloader_num_workers=-1", ["num_workers"]), ("--dataloader_num_workers=1.5", ["whole number"]),
        ("--dataloader_persistent_workers", ["num_workers"]), ("--dataloader_prefetch_factor=2", ["num_workers"]),
        ("--dataloader_num_workers=1 --dataloader_prefetch_factor=0", ["dataloader_prefetch_factor", ">= 1"]),
        ("--dataloader_multiprocessing_context=fork", ["num_workers"]),
        ("--per_device_eval_batch_size=0", ["per_device_eval_batch_size", ">= 1"]),
        ("--adam_beta1=1", ["beta"]), ("--adam_epsilon=-1", ["epsilon"]), ("--weight_decay=-1", ["weight_decay"]),
        ("--max_grad_norm=-1", ["max_grad_norm", ">= 0"]), ("--save_total_limit=-1", ["save_total_limit"]),
        ("--save_total_limit=x", ["save_total_limit", "whole number"]), ("--data_seed=x", ["data_seed"]),
        ("--neftune_noise_alpha=-1", ["neftune_noise_alpha", ">= 0"]), ("--eval_delay=-1", ["eval_delay"]),
        ("--optim=schedule_free_adamw", ["optim", "schedule_free_adamw", "other weights"]),
        ("--optim=schedule_free_sgd", ["optim", "schedule_free_sgd", "--lr_scheduler_type"]),
        ("--train_sampling_strategy=nope", ["train_sampling_strategy", "sequential"]),
        ("--ignore_data_skip=true", ["ignore_data_skip", "resumed", "Leave it out"]),
        ("--train_sampling_strategy=group_by_length", ["train_sampling_strategy", "random, sequential"]),
        ("--include_num_input_tokens_seen=nope", ["include_num_input_tokens_seen", "no, all"]),
        ("--log_level=nope", ["log_level", "debug"]), ("--log_level_replica=nope", ["log_level_replica"]),
        ("--torch_compile_mode=nope", ["nope"]), ("--debug=tpu_metrics_debug", ["debug", "TPU"]),
        ("--greater_is_better=x", ["greater_is_better", "true or false"]),
        ('--accelerator_config={"dispatch_batches":true}', ["accelerator_config", "dispatch_batches"]),
        ("--accelerator_config=nofile.json", ["nofile.json"]),
        ('--activation_checkpointing=true --gradient_checkpointing_kwargs={"nope":1}', ["nope"]),
        ('--activation_checkpointing=true --gradient_checkpointing_kwargs={"every_n_layers":0}', ["every_n_layers"]),
        ("--lora_alpha=0", ["lora_alpha", ">= 1"]), ("--deepspeed={}", ["deepspeed"]),
        ("--activation_checkpointing=true --gradient_checkpointing_kwargs=3", ["checkpointing_kwargs", "mapping"]),
    ],
)  # fmt: skip
def test_options_that_used_to_fail_late(train, tmp_path, monkeypatch, flags, fragments):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails(train(*flags.split()), *fragments)
    assert not (tmp_path / "run" / "config.yaml").exists(), "it can be corrected and run again"


def test_trying_the_options_draws_no_random_numbers(train, tmp_path, monkeypatch):
    from perce.training import checks

    states, tried = [], checks.try_options

    def watched(trainer):
        before = torch.get_rng_state()
        found = tried(trainer)
        states.append(torch.get_rng_state().equal(before))
        return found

    monkeypatch.setattr("perce.running.run.try_options", watched)
    assert train("--dataloader_num_workers=1", max_steps=1)[0] == 0
    assert states == [True]


def test_an_evaluation_never_drops_rows(train, tmp_path):
    code, out, err = train("--dataloader_drop_last", per_device_train_batch_size=8, max_steps=1)
    assert code == 0 and "loss with persona" in out, err  # one validation example, in batches of eight


def test_an_upload_that_fails_at_the_end_ends_no_run(train, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, *_, **__: setattr(self, "hub_model_id", "me/x"))
    monkeypatch.setattr(HfApi, "upload_folder", unreachable)
    code, out, err = train("--push_to_hub", "--hub_strategy=end", max_steps=1)
    assert code == 0 and "no route to host" in err and "loss with persona" in out
    assert (tmp_path / "run" / "report.html").exists()
