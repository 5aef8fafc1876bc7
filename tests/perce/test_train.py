"""python -m perce.train on a tiny model: whole runs and their directories, and the command itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from perce import preview, prompt_ids, score
from perce.config.commands import parse_args
from perce.reading.formats import FORMATS
from perce.train import main
from perce.training.arguments import fit_batch
from tests.helpers import ROOT
from tests.helpers.pages import Page
from tests.helpers.raw_rows import documented, documented_files
from tests.helpers.tiny import read_jsonl, save_tiny_model, write_jsonl
from tests.helpers.training import ROWS, fails

# ---- runs


@pytest.mark.whole
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
    assert "The validation has only 1 user" in " ".join(out.split()), "what the numbers say"
    assert "\n- The validation has only 1 user" in (run / "README.md").read_text()
    assert yaml.safe_load((run / "config.yaml").read_text())["learning_rate"] == 2e-4
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry["step"] for entry in history if "eval_loss_with_persona" in entry]
    assert evaluated == [0, 2], "before and after, each once"
    logged = next(entry for entry in history if "loss" in entry)
    assert {"ce", "pir_mean", "weight_mean", "frac_at_floor", "frac_at_ceiling", "tokens_per_second"} <= set(logged)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = Page(run / "report.html")
    assert page.data["passes"] == ["before training", "after training"] and "bees" in page.words()
    assert (run / "adapter_config.json").exists()


NAMED_ROWS = {"personamem": ("shared_contexts_32k.jsonl", "shared_contexts.jsonl")}  # file beside rows of another name


@pytest.mark.slow
@pytest.mark.parametrize("format", [name for name in FORMATS if name != "text"])
def test_two_steps_on_every_format_and_its_scores(format, tmp_path, capsys):
    """By its fields alone."""
    data, model = tmp_path / "data", save_tiny_model(tmp_path / "model")
    data.mkdir()
    rows = [row | ({"response": "Tea, and the bees."} if format == "lamp_qa" else {}) for row in documented(format)]
    documented_files(data, format, *rows).rename(data / "train.jsonl")
    (data / "validation.jsonl").write_bytes((data / "train.jsonl").read_bytes())
    if format in NAMED_ROWS:
        (data / NAMED_ROWS[format][0]).rename(data / NAMED_ROWS[format][1])
    run = ("--data", str(data), "--model", str(model))
    steps = ("--max_steps", "2", "--lora_r", "4", "--report_to", "none", "--output_dir", str(tmp_path / "run"))
    assert main([*run, *steps]) == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["step"] == 2 and any("pir_mean" in entry for entry in history)
    scored = tmp_path / "scored.jsonl"
    assert score.main(["--model", str(tmp_path / "run"), "--jsonl", str(scored)]) == 0
    records = read_jsonl(scored)
    assert records and all(len(record["pir"]) == len(record["response_ids"]) > 0 for record in records)
    assert preview.main(list(run)) == 0 and "rows drawn at random" in capsys.readouterr().out


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
    assert [e["step"] for e in state["log_history"] if "eval_loss_with_persona" in e] == [0, 2, 3]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["clip_max"] == 4.0


def test_a_resumed_run_holds_out_those_that_it_held_out(train, tmp_path):
    """With rows of others it is not resumed at all; nobody who is evaluated on was trained on."""
    rows = [row | {"user_id": f"u{i % 10}"} for i, row in enumerate(ROWS)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert train(data=data, max_steps=1, save_steps=1)[0] == 0
    recorded = (tmp_path / "run" / "held_out.json").read_text()
    again = {"model": None, "data": None, "precision": None, "max_steps": 2}
    write_jsonl(data, [*rows, *({**row, "user_id": f"new{i}"} for i, row in enumerate(ROWS))])
    fails(train("--resume", **again), "training pairs")
    write_jsonl(data, rows)
    assert train("--resume", **again)[0] == 0
    assert (tmp_path / "run" / "held_out.json").read_text() == recorded


def test_the_paths_of_a_run_mean_the_same_from_any_directory(train, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(model)
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    options = {"model": "./base", "data": "rows.jsonl", "output_dir": "run", "max_steps": 1, "save_steps": 1}
    assert train(**options)[0] == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["model"] == str(Path(model).resolve()) and saved["data"] == str(tmp_path / "rows.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = {"model": None, "data": None, "precision": None, "max_steps": 2, "output_dir": "../run"}
    code, _, err = train("--resume", **again)
    assert code == 0, err
    code, _, err = train("--resume", **again | {"model": "../base", "max_steps": 3})
    assert code == 0, err
    assert main(["--print_config", "--output_dir", "x"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"] is None and shown["data"] is None


@pytest.mark.parametrize("name", ["model", "data", "retriever_model"])
def test_a_hub_id_stays_as_it_is_unless_there_is_such_a_directory(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    argv = ["--print_config", "--output_dir", "x", "--retriever", "dense", f"--{name}", "owner/name"]
    for expected in ("owner/name", str(tmp_path / "owner" / "name")):
        assert main(argv) == 0
        assert yaml.safe_load(capsys.readouterr().out)[name] == expected
        (tmp_path / "owner" / "name").mkdir(parents=True, exist_ok=True)


def test_streaming_and_saved_datasets(train, tmp_path):
    saved = tmp_path / "saved"
    DatasetDict(train=Dataset.from_list(ROWS[:8]), validation=Dataset.from_list(ROWS[8:])).save_to_disk(saved)
    code, out, err = train("--streaming", data=saved, per_device_train_batch_size=2, max_steps=6)
    assert code == 0 and "a stream of" in out and out.count("\ndata ") == 1, err
    assert train(data=saved, output_dir=tmp_path / "whole")[0] == 0


def test_a_token_budget(train, tmp_path):
    code, out, err = train(tokens_per_batch=700, max_steps=3)
    assert code == 0 and "700 tokens per forward pass × 1 passes per step" in out, err
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["tokens_per_batch"] == 700 and saved["per_device_train_batch_size"] is None
    code, out, err = train("--resume", model=None, data=None, precision=None, max_steps=4)
    assert code == 0, err


def said(number, turns):
    lines = [f"Where were you on day {number}?", "I was with the bees.", "And then?", "I went home by tram."] * turns
    roles = ["user", "assistant"] * len(lines)
    messages = [{"role": role, "content": line} for role, line in zip(roles, lines, strict=False)]
    return {"user_id": f"u{number}", "persona": ["I keep bees.", f"I am {number}."], "messages": messages}


def test_a_persona_is_computed_once(train, tmp_path):
    facts = [f"I keep {number} hives behind the old house, and sell honey on Saturdays." for number in range(9)]
    rows = [
        {"persona": [f"I am {user}.", *facts], "query": f"What did I do on day {day}?", "response": f"Number {day}."}
        for user in range(6) for day in range(4)
    ]  # fmt: skip
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = {"data": data, "max_steps": 2, "save_steps": 1, "share_persona": 4, "branches_per_forward": 1}
    code, out, err = train(**options)
    assert code == 0, err
    assert "share  up to 4 requests of a persona share the tokens that they begin with: in " in out and " 0 of " in out
    computed, needed = (
        int(number.replace(",", ""))
        for number in re.findall(r"([\d,]+) tokens (?:computed )?for ([\d,]+) tokens of examples", out)[-1]
    )
    assert computed < 0.5 * needed
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["step"] == "1 forward passes of 8 replies, personas shared"
    again = {"model": None, "data": None, "precision": None, "max_steps": 3}
    assert train("--resume", **again, branches_per_forward=2)[0] == 0, "it is the same step"
    fails(train("--resume", **again, share_persona=2), "share_persona")
    differing = [row | {"persona": [f"I am {number}."]} for number, row in enumerate(rows)]
    other = {"data": write_jsonl(tmp_path / "differing.jsonl", differing), "output_dir": tmp_path / "other"}
    code, out, err = train(**(options | other))
    assert code == 0 and "share  nothing: no two prompts are the same up to the persona's end" in out, err
    documents = {
        "data": write_jsonl(tmp_path / "documents.jsonl", [{"text": f"Bees {n}. " * 40} for n in range(9)]),
        "objective": "ce",
    }
    fails(train(**documents, share_persona=2, output_dir=tmp_path / "text"), "share_persona needs rows with a persona")


def test_conversations_are_computed_once(train, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [said(number, 1 + number % 2) for number in range(10)])
    code, out, err = train(data=data, max_steps=2, save_steps=1, per_device_train_batch_size=6)
    assert code == 0, err
    assert (
        "6 replies per forward pass" in out
        and "share  replies of a conversation share the tokens that they begin with: in " in out
    )
    first, last = re.findall(r"([\d,]+) tokens (?:computed )?for ([\d,]+) tokens of examples", out)
    for numbers in (first, last):
        computed, needed = (int(number.replace(",", "")) for number in numbers)
        assert computed < 0.6 * needed
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["step"] == "1 forward passes of 6 replies, conversations shared"
    again = {"model": None, "data": None, "precision": None, "max_steps": 3}
    separate = train("--resume", **again, share="none")
    fails(
        separate, "a step is 6 sequences now", "was 1 forward passes of 6 replies, conversations shared", "--share so"
    )
    cut = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    fails(train("--resume", **again, **cut), "2 forward passes of 3 replies", "was 1 forward passes of 6 replies")
    code, out, err = train("--resume", **again)
    assert code == 0 and "tokens of examples since the run was resumed" in " ".join(out.split()), err
    none = {"share": "none", "output_dir": tmp_path / "none", "per_device_train_batch_size": 6}
    code, out, err = train(data=data, max_steps=1, save_steps=1, **none)
    assert code == 0 and "share  " not in out and "tokens of examples" not in out, err
    config = tmp_path / "none" / "config.yaml"  # as of a run from before there was the option
    config.write_text("".join(line for line in config.read_text().splitlines(True) if not line.startswith("share:")))
    assert train("--resume", **again | none)[0] == 0


def test_without_an_evaluation_before_training_the_rest_is_reported(train, tmp_path):
    code, out, _ = train("--eval_on_start=false")
    assert code == 0 and "not evaluated" in out and "loss with persona" in out
    assert Page(tmp_path / "run" / "report.html").data["passes"] == ["after training"]


def test_the_progress_bar_can_be_left_out(train, tmp_path):
    assert "2/2" in train()[2]
    code, out, err = train("--disable_tqdm=true", output_dir=tmp_path / "quiet")
    assert code == 0 and "/2" not in err and "step     2" in out and "loss with persona" in out


def prompt_of(run):
    """Options and tokenizer of a run, and what its prompt of one entry reads like."""
    tokenizer = AutoTokenizer.from_pretrained(run)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    return json.loads(saved["prompt"]), tokenizer, tokenizer.decode(prompt_ids(tokenizer, ["I bake."], "Hi"))


def test_a_prompt_of_ones_own_goes_into_the_run_and_into_those_that_follow_it(train, tmp_path):
    recipe, other, merged = tmp_path / "recipe.yaml", tmp_path / "other.yaml", tmp_path / "run/merged"
    recipe.write_text(yaml.safe_dump({"prompt": {"header": "Known:\n", "item": "* {}\n"}, "merge_adapter": True}))
    other.write_text("header: '2024'\n")
    assert train("--config", str(recipe), max_steps=1)[0] == 0
    keys, _, text = prompt_of(tmp_path / "run")
    assert keys == {"header": "Known:\n", "item": "* {}\n"} and "Known:\n* I bake.\n" in text
    # A run that goes on from it tells the persona likewise, unless it is told to do otherwise.
    options = {"model": merged, "max_steps": 1}
    assert train(output_dir=tmp_path / "next", **options)[0] == 0
    assert prompt_of(tmp_path / "next")[0] == keys
    assert train(output_dir=tmp_path / "last", prompt=other, **options)[0] == 0
    keys, tokenizer, text = prompt_of(tmp_path / "last")
    assert keys == {"header": "2024"} and "2024- I bake.\n" in text
    assert tokenizer.chat_template.count("persona is defined") == 1


def test_an_adapter_is_merged_on_request(train, tmp_path):
    assert train("--merge_adapter", max_steps=2)[0] == 0
    run = tmp_path / "run"
    adapter, whole = AutoPeftModelForCausalLM.from_pretrained(run), AutoModelForCausalLM.from_pretrained(run / "merged")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(whole(ids).logits, adapter(ids).logits, atol=1e-4, rtol=1e-4)
    assert whole.dtype == torch.float32 and AutoTokenizer.from_pretrained(run / "merged").chat_template
    assert whole.generation_config.eos_token_id == GenerationConfig.from_pretrained(run).eos_token_id
    fails(train("--merge_adapter", lora_r=0, output_dir=tmp_path / "full"), "--merge_adapter", "--lora_r 0")


@pytest.mark.parametrize(
    ("prompt", "fragments"),
    [
        ("{heder: x}", ("expected keys among system, place", "heder")),
        ("{header: 2024-01-01, item: 3}", ("a text as item", "int 3")),
        ("[a]", ("prompt: expected one text, got ['a']",)),
        ("'{not json'", ("a mapping as JSON", "{not json")),
        ("{item: none}", ("one {} in item",)),
    ],
)
def test_a_prompt_that_says_something_else_is_an_error(train, tmp_path, prompt, fragments):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"prompt: {prompt}\n")
    fails(train("--config", str(recipe)), "prompt", *fragments)


def test_objective_ce_has_no_counterfactual_pass(train):
    code, out, err = train(objective="ce")
    assert code == 0 and "tokens/s per process" in out and "of the training time" not in out, err


def test_options_reach_the_trainer(train, tmp_path):
    code, _, err = train(
        "--weight-decay", "0.1", "--lora-r=2", "--activation_checkpointing", max_steps=1, report_examples=1
    )
    assert code == 0, err
    adapter = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert adapter["r"] == 2
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["weight_decay"] == 0.1
    page = Page(tmp_path / "run" / "report.html")
    assert len(page.data["responses"]) == 1 and "This page shows 1 of " in page.text


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


@pytest.mark.parametrize("name", ["..jsonl", "...jsonl", "....jsonl", ".jsonl", "a..jsonl"])
def test_a_new_directory_lies_in_runs_whatever_the_data_is_called(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert main(["--print_config", "--data", str(write_jsonl(tmp_path / name, ROWS))]) == 0
    directory = Path(yaml.safe_load(capsys.readouterr().out)["output_dir"])
    assert directory.resolve().parent == tmp_path / "runs" and directory.name.strip(".") == directory.name


def test_the_validation_seed_alone_decides_who_is_held_out(train, tmp_path):
    rows = [row | {"user_id": f"u{i % 30}"} for i, row in enumerate(ROWS * 5)]
    data, drawn = write_jsonl(tmp_path / "rows.jsonl", rows), {}
    for name, seeds in (("a", {}), ("b", {"seed": 1}), ("c", {"validation_seed": 1})):
        assert train(data=data, max_steps=1, eval_examples=2, output_dir=tmp_path / name, **seeds)[0] == 0
        facts = json.loads((tmp_path / name / "run.json").read_text())
        drawn[name] = (tmp_path / name / "held_out.json").read_text(), facts["validation_pairs"]
    assert drawn["a"] == drawn["b"]
    assert drawn["a"][0] != drawn["c"][0] and drawn["a"][1] != drawn["c"][1]
    resumed = {"data": None, "model": None, "resume": "true", "max_steps": 1}
    assert train(**resumed, output_dir=tmp_path / "c")[0] == 0, "its own"
    assert "validation_seed is 2 now and was 1" in train(**resumed, validation_seed=2, output_dir=tmp_path / "c")[2]


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
    config, _ = parse_args([x for name, value in given.items() for x in (f"--{name}", str(value))])
    args = SimpleNamespace(device=torch.device("cpu"))
    run = fit_batch(config, args, [{"input_ids": [0] * longest}, {"input_ids": [0]}]).run
    assert (run.per_device_train_batch_size, run.gradient_accumulation_steps) == expected
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == expected
    # As the saved options say, so that a resumed run's evaluations and E-steps have the same batches.
    assert args.per_device_eval_batch_size == run.per_device_train_batch_size


@pytest.mark.parametrize(("device", "replies"), [("cpu", 2), ("cuda", 4), ("mps", 4), ("xpu", 4)])
def test_a_gpu_of_any_kind_takes_more_tokens_at_a_time(device, replies):
    args = SimpleNamespace(device=torch.device(device))
    assert fit_batch(parse_args([])[0], args, [{"input_ids": [0] * 1500}]).run.per_device_train_batch_size == replies


def test_a_step_is_eight_replies_of_conversations_by_what_is_computed_of_them():
    config, args = parse_args([])[0], SimpleNamespace(device=torch.device("cpu"))
    trunk = list(range(3000))
    pairs = [{"input_ids": [*trunk[: 2000 + 100 * reply], 0], "conversation": 1} for reply in range(8)]
    for sharing, expected in (("branches", (8, 1)), ("chains", (8, 1)), ("none", (1, 8))):
        run = fit_batch(config, args, pairs, sharing).run
        assert (run.per_device_train_batch_size, run.gradient_accumulation_steps) == expected


def test_long_validation_sets_are_cut_on_a_cpu_unless_asked_for(train, tmp_path, monkeypatch):
    monkeypatch.setattr("perce.running.run.EVAL_TOKENS_ON_CPU", 1)
    assert " and 2 of 3 validation examples" in train(max_steps=1, eval_examples=2, output_dir=tmp_path / "a")[1]
    assert " and 1 of 3 validation examples" in train(max_steps=1, output_dir=tmp_path / "b")[1]
    assert " and 3 validation examples" in train(max_steps=1, eval_examples=3, output_dir=tmp_path / "c")[1]


# ---- the command itself


def test_help_is_complete():
    done = subprocess.run([sys.executable, "-m", "perce.train", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    for flag in ("--model", "--clip_min", "--output_dir", "--retrieve_k", "--config"):
        assert flag in done.stdout


def test_smoke_in_a_process_of_its_own_whose_stdout_knows_ascii_alone(model, data, tmp_path):
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
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "perce.train", *argv], capture_output=True, cwd=ROOT, env=environment)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert b"mean PIR" in done.stdout and (tmp_path / "run" / "report.html").exists()
