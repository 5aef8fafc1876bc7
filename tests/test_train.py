"""python -m perce.train on a tiny model: a whole run, its run directory, and every mistake a user can make."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from perce.config import parse_args
from perce.errors import UserError
from perce.train import fit_batch, main
from tests.tiny import save_tiny_model, write_jsonl

ROWS = [
    {
        "user_id": f"u{i % 4}", "persona": [f"I live in town {i}.", "I keep bees."],
        "query": f"Where are you, number {i}?", "response": f"In town {i}, with the bees.",
    }
    for i in range(12)
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS))


@pytest.fixture
def train(model, data, tmp_path, capsys):
    """Run main with the tiny model and data unless told otherwise; (exit code, stdout, stderr)."""

    def run(*argv, output_dir=tmp_path / "run", **options):
        flags = {"model": model, "data": data, "output_dir": output_dir, "max_steps": 2, "precision": "fp32"} | options
        argv = [x for name, value in flags.items() if value is not None for x in (f"--{name}", str(value))] + list(argv)
        code = main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def fails(result, *fragments):
    """Exit code 2 and one paragraph that holds every fragment."""
    code, _, err = result
    assert code == 2, err
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and "Traceback" not in err and err.rstrip().endswith(message[0])
    for fragment in fragments:
        assert fragment in message[0], f"{fragment!r} not in {message[0]!r}"


# ---- runs


def test_a_whole_run_and_its_directory(train, tmp_path):
    code, out, err = train()
    run = tmp_path / "run"
    assert code == 0, err
    for words in (
        "loss with persona",
        "loss on personal tokens",
        "before",
        "counterfactual pass",
        "tokens/s",
        "peak memory",
        str(run),
    ):
        assert words in out
    assert "1 of 4 users held out" in out
    assert yaml.safe_load((run / "config.yaml").read_text())["learning_rate"] == 2e-4
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry["step"] for entry in history if "eval_loss_with_persona" in entry]
    assert evaluated == [0, 2], "before and after, each once"
    logged = next(entry for entry in history if "loss" in entry)
    assert {"ce", "pir_mean", "weight_mean", "frac_at_floor", "frac_at_ceiling", "tokens_per_second"} <= set(logged)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "report.html").read_text()
    assert "before training" in page and "after training" in page and "bees" in page
    assert (run / "adapter_config.json").exists()


def test_a_full_run_is_loaded_by_transformers(train, tmp_path):
    assert train(lora_r=0, save_steps=0)[0] == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template
    assert not list((tmp_path / "run").glob("checkpoint-*")), "--save_steps 0"


def test_resume_goes_on_where_it_stopped_with_the_saved_options(train, tmp_path):
    assert train(max_steps=2, save_steps=1, clip_max=4.0)[0] == 0
    code, _, err = train("--resume", model=None, data=None, precision=None, max_steps=3)
    assert code == 0, err
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert [e["step"] for e in state["log_history"] if "eval_loss_with_persona" in e] == [0, 3]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["clip_max"] == 4.0


def test_streaming_and_saved_datasets(train, tmp_path):
    saved = tmp_path / "saved"
    DatasetDict(train=Dataset.from_list(ROWS[:8]), validation=Dataset.from_list(ROWS[8:])).save_to_disk(saved)
    code, out, err = train("--streaming", data=saved, per_device_train_batch_size=2, max_steps=6)
    assert code == 0 and "a stream of" in out and "left out" not in out, err
    assert train(data=saved, output_dir=tmp_path / "whole")[0] == 0


def test_a_token_budget(train, tmp_path):
    code, out, err = train(tokens_per_batch=700, max_steps=3)
    assert code == 0 and "700 tokens per forward pass × 1 passes per step" in out, err
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["tokens_per_batch"] == 700 and saved["per_device_train_batch_size"] is None
    code, out, err = train("--resume", model=None, data=None, precision=None, max_steps=4)
    assert code == 0, err


def test_without_an_evaluation_before_training_the_rest_is_reported(train, tmp_path):
    code, out, _ = train("--eval_on_start=false")
    assert code == 0 and "not evaluated" in out and "loss with persona" in out
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "after training" in page and "before training" not in page


def test_objective_ce_has_no_counterfactual_pass(train):
    code, out, err = train(objective="ce")
    assert code == 0 and "0.0% of the training time" in out, err


def test_options_reach_the_trainer(train, tmp_path):
    code, _, err = train(
        "--weight-decay", "0.1", "--lora-r=2", "--activation_checkpointing", max_steps=1, report_examples=1
    )
    assert code == 0, err
    adapter = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert adapter["r"] == 2
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["weight_decay"] == 0.1
    assert (tmp_path / "run" / "report.html").read_text().count("<article") == 1


def test_memory_options_together(train, tmp_path):
    flags = ["--persona_grad=none", "--mlp_tile=64", "--activation_checkpointing"]
    logged = {"eval_loss": [], "grad_norm": []}
    for name, options in {"plain": [], "frugal": flags}.items():
        code, _, err = train(*options, max_steps=1, output_dir=tmp_path / name)
        assert code == 0, err
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        for entry in logged:
            logged[entry].append(next(line[entry] for line in history if entry in line))
    assert logged["eval_loss"][1] == pytest.approx(logged["eval_loss"][0], abs=1e-5), "the same function"
    assert logged["grad_norm"][1] != pytest.approx(logged["grad_norm"][0], rel=1e-3), "another gradient"


def test_long_personas_are_trimmed_and_counted(train, tmp_path):
    rows = [{**row, "persona": ["I keep bees."] + ["I talk a great deal. " * 4] * 3} for row in ROWS]
    code, out, err = train(data=write_jsonl(tmp_path / "long.jsonl", rows), max_length=170)
    assert code == 0 and "persona entries dropped from" in out, err


def test_skipped_rows_are_counted(train, tmp_path):
    path = write_jsonl(tmp_path / "some.jsonl", [*ROWS, {"persona": "p", "query": "q", "response": ""}])
    code, out, err = train("--skip_bad_rows", data=path)
    assert code == 0 and "1 rows skipped" in out and "some.jsonl:13" in out, err
    directory = tmp_path / "split"
    write_jsonl(directory / "train.jsonl", [{"persona": "p", "query": "q", "response": ""}, *ROWS])
    write_jsonl(directory / "validation.jsonl", ROWS)
    code, out, err = train("--skip_bad_rows", "--streaming", data=directory, output_dir=tmp_path / "streamed")
    assert code == 0 and "1 rows skipped" in out and "train.jsonl:1:" in "".join(out.split()), err


def test_a_second_run_takes_a_new_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert main(["--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["output_dir"] == "runs/demo", "a failed run leaves its name free"
    (tmp_path / "runs" / "demo" / "config.yaml").write_text("")
    assert main(["--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["output_dir"] == "runs/demo-2"


def test_the_seed_decides_everything(train, tmp_path):
    from safetensors.torch import load_file

    adapters = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train(seed=seed, max_steps=1, output_dir=tmp_path / name)[0] == 0
        adapters.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    name = next(name for name in adapters[0] if "lora_A" in name)
    assert adapters[0][name].equal(adapters[1][name]) and not adapters[0][name].equal(adapters[2][name])


@pytest.mark.parametrize(
    ("longest", "given", "expected"),
    [(100, {}, (8, 1)), (600, {}, (4, 2)), (1500, {}, (2, 4)), (5000, {}, (1, 8)),
     (5000, {"per_device_train_batch_size": 16}, (16, 1)), (600, {"gradient_accumulation_steps": 5}, (4, 5))],
)  # fmt: skip
def test_a_step_is_eight_sequences_divided_by_length(longest, given, expected):
    config, _ = parse_args([x for name, value in given.items() for x in (f"--{name}", str(value))], {})
    args = SimpleNamespace(device=torch.device("cpu"))
    run = fit_batch(config, args, {"input_ids": [[0] * longest, [0]]}).run
    assert (run.per_device_train_batch_size, run.gradient_accumulation_steps) == expected
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == expected
    # As the saved options say, so that a resumed run's evaluations and E-steps have the same batches.
    assert args.per_device_eval_batch_size == run.per_device_train_batch_size


def test_long_validation_sets_are_cut_on_a_cpu_unless_asked_for(train, tmp_path, monkeypatch):
    monkeypatch.setattr("perce.train.EVAL_TOKENS_ON_CPU", 1)
    assert "and 3 validation examples" in train(max_steps=1, eval_examples=3, output_dir=tmp_path / "a")[1]
    assert "and 1 validation examples" in train(max_steps=1, output_dir=tmp_path / "b")[1]


# ---- mistakes


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
    monkeypatch.setattr("perce.model.load_tokenizer", lambda *_: pytest.fail("found too late"))
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
    monkeypatch.setattr("perce.stream.BLOCK", 1)
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


# ---- the command itself


def test_help_is_fast_and_complete():
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "perce.train", "--help"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        times.append(time.perf_counter() - started)
    assert done.returncode == 0 and min(times) < 1.0
    for flag in ("--model", "--clip_min", "--output_dir", "--retrieve_k", "--config"):
        assert flag in done.stdout


def test_smoke_in_a_process_of_its_own(model, data, tmp_path):
    argv = [
        "--model",
        model,
        "--data",
        data,
        "--max_steps",
        "1",
        "--output_dir",
        str(tmp_path / "run"),
        "--lora_r",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "perce.train", *argv], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").exists()
