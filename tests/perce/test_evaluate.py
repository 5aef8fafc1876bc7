"""perce.evaluate: losses against full logits, generation, resume, comparison, and errors."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from perce import DataConfig, evaluate, score
from perce.config.questions import EvaluateConfig
from perce.data.pairing import make_builder
from perce.data.pairs import personal_word_spans
from perce.data.splits import load_splits
from perce.demo import DATA_DIR
from perce.files.lock import locked
from perce.files.runs import run_directory
from perce.measuring.evaluation import Evaluator, other_users
from tests.helpers.raw_rows import documented, documented_files
from tests.helpers.tiny import demo_examples, save_tiny_model, tiny_tokenizer, write_jsonl
from tests.helpers.training import ROWS, a_run, printed_by

LIMIT = 14  # of three users


def fast(argv):
    """perce.evaluate with few sequences at a time and, unless losses alone are asked for, short replies."""
    replies = () if "--generate" in argv else ("--max_new_tokens", "6")
    return evaluate.main(["--batch_size", "4", *replies, *argv])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture
def run(model, capsys):
    return printed_by(fast, capsys, "--model", model, "--limit", LIMIT)


def result(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_losses_under_the_three_prompts_equal_full_logits(run, model, tmp_path):
    run("--output", tmp_path / "e.json", "--generate", "false")
    content = result(tmp_path / "e.json")
    examples = demo_examples(LIMIT, "test")
    partners = other_users(examples, 42)
    builder = make_builder(tiny_tokenizer(), DataConfig(), "perce")
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def logp(ids, n):
        logits = stock(input_ids=torch.tensor([ids])).logits[0, -n - 1 : -1].log_softmax(-1)
        return logits.gather(1, torch.tensor(ids[-n:])[:, None])[:, 0].detach()

    names = "loss", "loss_without", "loss_swapped", "loss_personal", "loss_other", "loss_other_swapped"
    sums = dict.fromkeys(names, 0.0)
    counts = {"tokens": 0, "personal": 0}
    for example, partner in zip(examples, partners, strict=True):
        pair = builder.build(example)
        n, personal = pair.response_length, torch.tensor(pair.personal)
        assert examples[partner].user_id != example.user_id
        other = builder.build(type(example)(**{
            **{name: getattr(example, name) for name in example.__slots__}, "persona": examples[partner].persona
        }))  # fmt: skip
        ours = logp(pair.input_ids, n)
        sums["loss"] -= ours.sum()
        sums["loss_personal"] -= ours[personal].sum()
        sums["loss_other"] -= ours[~personal].sum()
        sums["loss_without"] -= logp(pair.counterfactual_ids(), n).sum()
        theirs = logp(other.input_ids, n)
        sums["loss_swapped"] -= theirs.sum()
        sums["loss_other_swapped"] -= theirs[~personal].sum()
        counts["tokens"] += n
        counts["personal"] += int(personal.sum())
    others = counts["tokens"] - counts["personal"]
    expected = {
        "loss_with_persona": sums["loss"] / counts["tokens"], "loss_other_tokens": sums["loss_other"] / others,
        "loss_without_persona": sums["loss_without"] / counts["tokens"],
        "loss_swapped_persona": sums["loss_swapped"] / counts["tokens"],
        "loss_personal_tokens": sums["loss_personal"] / counts["personal"],
        "swap_cost": (sums["loss_swapped"] - sums["loss"]) / counts["tokens"],
        "swap_cost_other": (sums["loss_other_swapped"] - sums["loss_other"]) / others,
    }  # fmt: skip
    for name, value in expected.items():
        metric = content["metrics"][name]
        assert metric["value"] == pytest.approx(value.item(), abs=1e-4), name
        assert metric["low"] <= metric["value"] <= metric["high"]
    assert "rougeL" not in content["metrics"] and content["run"]["split"] == "test"


def test_what_training_held_out_is_evaluated_and_training_rows_are_called_so(run, tmp_path, capsys):
    rows = [json.loads(line) for line in (DATA_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()[:60]]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    held_out = load_splits(DataConfig(data=str(tmp_path / "rows.jsonl")), eval_examples=0, seed=7).validation
    assert 2 < len(held_out) < LIMIT
    data = ("--data", tmp_path / "rows.jsonl", "--generate", "false", "--output", tmp_path / "e.json")
    out = run(*data, "--split", "held_out", "--split_seed", 7).out
    assert [record["source"] for record in result(tmp_path / "e.json")["records"]] == [x.source for x in held_out]
    assert "examples: held_out" in out and "training rows" not in out
    assert "another run (split_seed was 7" in run(*data, "--split", "held_out", code=2).err
    out = run("--data", tmp_path / "rows.jsonl", "--generate", "false").out
    assert "these are training rows" in out and "--split held_out" in out
    assert "Leave out --streaming" in run(*data, "--split", "held_out", "--streaming", code=2).err
    assert "has a validation split" in run("--data", DATA_DIR, "--split", "held_out", code=2).err


def users_of(run, path, *argv):
    run("--generate", "false", "--output", path, *argv)
    return {record["user_id"] for record in result(path)["records"]}


def test_the_held_out_of_a_run_are_those_that_it_recorded(run, train, tmp_path):
    rows = [row | {"user_id": f"u{i % 30}"} for i, row in enumerate(ROWS * 5)]
    data, where = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "run"
    assert train("--merge_adapter", data=data, max_steps=1, save_steps=1)[0] == 0
    recorded = json.loads((where / "held_out.json").read_text())
    assert recorded["unit"] == "users" and len(recorded["held_out"]) == 3
    held_out = ("--data", data, "--split", "held_out", "--model")
    write_jsonl(data, [*({**row, "user_id": f"new{i}"} for i, row in enumerate(ROWS)), *rows[::-1]])
    for model in (where, where / "merged", where / "checkpoint-1"):
        assert users_of(run, tmp_path / f"{model.name}.json", *held_out, model) == set(recorded["held_out"])
    out = run(*held_out, where, "--generate", "false").out
    assert f"held_out: 3 of 42 users, those that {where / 'held_out.json'} names\n" in out
    err = run("--data", data, "--split", "validation", "--model", where, code=2).err
    assert f"has no such split; it has train. --split held_out takes the users that {where} held out." in err
    drawn = run(*held_out, where, "--generate", "false", "--split_seed", 1).out
    told = f"drawn by seed 1, not those that {where / 'held_out.json'} names; {where} may have been trained on them"
    assert f"held_out: 4 of 42 users, {told}\n" in drawn
    one = recorded["held_out"][0]
    write_jsonl(data, [row for row in rows if row["user_id"] not in recorded["held_out"][1:]])
    assert users_of(run, tmp_path / "few.json", *held_out, where) == {one}
    write_jsonl(data, [{**row, "user_id": "new"} for row in ROWS])
    err = run(*held_out, where, code=2).err
    assert f"{where / 'held_out.json'}: none of the 3 users" in err and "--split_seed" in err
    (where / "held_out.json").write_text("{")
    assert f"{where / 'held_out.json'}: cannot be read" in run(*held_out, where, code=2).err


def asked(capsys, main, *argv):
    """The resolved options of a command, and what it says of where they come from."""
    assert main([*map(str, argv), "--print_config"]) == 0
    printed = capsys.readouterr()
    return yaml.safe_load(printed.out), printed.err


def test_without_data_a_run_is_asked_about_its_own(run, train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [row | {"user_id": f"u{i % 30}", "who": row["persona"]} for i, row in enumerate(ROWS * 5)]
    data = write_jsonl(tmp_path / "rows.jsonl", [{k: v for k, v in row.items() if k != "persona"} for row in rows])
    own = {"data": "rows.jsonl", "columns": "persona=who", "max_length": 700, "skip_bad_rows": "true"}
    assert train("--merge_adapter", max_steps=1, save_steps=1, output_dir="run", **own)[0] == 0
    recorded = json.loads((tmp_path / "run" / "held_out.json").read_text())["held_out"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for model in ("../run", "../run/merged", tmp_path / "run" / "checkpoint-1"):
        path = tmp_path / f"{Path(model).name}.json"
        assert users_of(run, path, "--model", model) == set(recorded)
        facts = result(path)["run"]
        expected = {"data": str(data), "columns": "persona=who", "max_length": 700, "split": "held_out"}
        assert expected.items() <= facts.items()
    out, err = run("--model", "../run", "--generate", "false", "--max_length", 600)
    assert f"examples  {data}, held_out: 3 of 30 users" in out and f"{tmp_path / 'run' / 'config.yaml'}" in err
    for main in (score.main, evaluate.main):
        options, _ = asked(capsys, main, "--model", "../run", "--max_length", 600, "--split", "train")
        assert (options["data"], options["max_length"], options["split"]) == (str(data), 600, "train")
        options, told = asked(capsys, main, "--model", "../run", "--data", data)
        assert (options["columns"], options["max_length"], options["split"]) == (None, 700, None)
        assert told == f"--model ../run: prompts are made as in {tmp_path / 'run' / 'config.yaml'}: max_length 700\n"
        options, _ = asked(capsys, main, "--model", "../run")
        assert (options["data"], options["split"]) == (str(data), None), "who is asked about is found with the data"
        (tmp_path / "c.yaml").write_text(f"data: {DATA_DIR}\n")
        options, _ = asked(capsys, main, "--model", "../run", "--config", tmp_path / "c.yaml")
        assert (options["data"], options["columns"], options["split"]) == (str(DATA_DIR), None, None)


def test_other_data_is_read_as_it_is_and_prompted_as_in_the_run(tmp_path, capsys):
    made = {"retriever": "dense", "retriever_model": "org/encoder", "retrieve_k": 2, "max_length": 900,
            "chat_template_kwargs": '{"a": 1}', "special_tokens_in_text": "allow"}  # fmt: skip
    read = {"format": "alpaca", "columns": "persona=who", "persona_markers": "a...b", "skip_bad_rows": True}
    run = a_run(tmp_path / "run", **made, **read)
    for main in (score.main, evaluate.main):
        options, told = asked(capsys, main, "--model", run, "--data", "other.jsonl")
        assert {name: options[name] for name in made} == made and options["data"] == "other.jsonl"
        assert options["format"] == "auto" and not any(options[name] for name in [*read][1:])
        assert told.count("\n") == 1 and all(f"{name} {value}" in told for name, value in made.items())
        other = ("--model", run, "--data", "other.jsonl", "--retriever")
        options, _ = asked(capsys, main, *other, "recency", "--max_length", 800)
        assert (options["max_length"], options["retrieve_k"], options["retriever_model"]) == (800, 2, None)
        options, told = asked(capsys, main, *other, "none")
        assert (options["retrieve_k"], options["retriever_model"]) == (4, None) and "retrieve" not in told
    assert asked(capsys, main, "--model", a_run(tmp_path / "plain"), "--data", "other.jsonl")[1] == ""


def test_data_is_the_same_by_a_relative_path(run, tmp_path, monkeypatch):
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    run("--data", "rows.jsonl", "--generate", "false", "--output", "a.json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    flags = ("--data", rows, "--generate", "false", "--output")
    assert "not only the model differs" not in run(*flags, "b.json", "--compare_with", "../a.json").out
    run(*flags, "../a.json")


def test_the_own_test_or_validation_split_comes_first(run, train, tmp_path, capsys):
    for split in ("train", "test"):
        write_jsonl(tmp_path / "split" / f"{split}.jsonl", ROWS)
    write_jsonl(tmp_path / "valid" / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "valid" / "dev.jsonl", ROWS)
    for data, split in (("split", "test"), ("valid", "validation")):
        assert train(data=tmp_path / data, max_steps=1, output_dir=tmp_path / f"run-{data}")[0] == 0
        out = run("--model", tmp_path / f"run-{data}", "--generate", "false", "--limit", 2).out
        assert f"examples  {tmp_path / data}, {split}\n" in out


def test_a_run_that_held_nobody_out_is_asked_about_nobody(run, train, tmp_path):
    for split in ("train", "dev"):
        write_jsonl(tmp_path / "rows" / f"{split}.jsonl", ROWS)
    assert train(data=tmp_path / "rows", max_steps=1, save_steps=1)[0] == 0
    (tmp_path / "rows" / "dev.jsonl").unlink()
    flags = ("--generate", "false", "--model")
    for model in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        for chosen in ((), ("--split", "held_out"), ("--split", "held_out", "--data", tmp_path / "rows")):
            err = run(*flags, model, *chosen, code=2).err
            assert f"{tmp_path / 'run'} has held out no users" in err
            assert "--split_seed" in err and "--split train" in err
        out = run(*flags, model, "--split", "held_out", "--split_seed", 1).out
        assert f"1 of 4 users, drawn by seed 1; {tmp_path / 'run'} may have been trained on them\n" in out
    assert "these are training rows" in run(*flags, tmp_path / "run", "--split", "train").out


@pytest.mark.parametrize("named", [False, True])
def test_a_validation_split_that_came_later_is_not_what_the_run_held_out(run, train, tmp_path, named):
    data = tmp_path / "rows"
    write_jsonl(data / "train.jsonl", ROWS)
    assert train(data=data, max_steps=1)[0] == 0
    held_out = set(json.loads((tmp_path / "run" / "held_out.json").read_text())["held_out"])
    write_jsonl(data / "dev.jsonl", [row | {"user_id": "late"} for row in ROWS])
    flags = ("--model", tmp_path / "run", *(("--data", data) if named else ()))
    assert users_of(run, tmp_path / "a.json", *flags) == held_out
    assert users_of(run, tmp_path / "b.json", *flags, "--split", "held_out") == held_out
    assert users_of(run, tmp_path / "c.json", *flags, "--split", "validation") == {"late"}
    assert "has a validation split" in run("--data", data, "--split", "held_out", code=2).err, "of no run"


def test_a_model_with_a_config_yaml_is_no_run_by_that(run, model, tmp_path):
    other = save_tiny_model(tmp_path / "model", "qwen3")
    (other / "config.yaml").write_text("data: nowhere.jsonl\n")
    assert run_directory(str(other)) is None
    assert "examples  built-in examples, test\n" in run("--model", other, "--generate", "false").out


def test_a_run_on_the_built_in_examples_is_asked_about_them(run, train, tmp_path):
    assert train(data=None, max_steps=1)[0] == 0
    assert "examples  built-in examples, test\n" in run("--model", tmp_path / "run", "--generate", "false").out


def test_a_run_on_data_with_a_validation_split_records_nobody(train, tmp_path):
    write_jsonl(tmp_path / "split" / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "split" / "validation.jsonl", ROWS)
    assert train(data=tmp_path / "split", max_steps=1)[0] == 0
    assert not (tmp_path / "run" / "held_out.json").exists()


def test_a_model_is_the_same_by_a_relative_path(run, tmp_path, monkeypatch):
    monkeypatch.chdir(save_tiny_model(tmp_path / "model", "qwen3").parent)
    flags = ("--generate", "false", "--output", "e.json", "--model")
    for model in ("model", "./model", tmp_path / "model", Path("..") / tmp_path.name / "model"):
        run(*flags, model)
    assert result(tmp_path / "e.json")["run"]["model"] == str(tmp_path / "model")


def test_replies_are_scored_and_sampled_by_the_seed(run, tmp_path, monkeypatch):
    monkeypatch.setattr("perce.measuring.evaluation_report.quoting", lambda records: [f"asked of {len(records)}"])
    out = run("--output", tmp_path / "a.json").out
    first = result(tmp_path / "a.json")
    assert f"asked of {LIMIT}" in out and f"asked of {LIMIT}" in first["notes"]
    examples = demo_examples(LIMIT, "test")
    for record in first["records"]:
        example = examples[record["example"]]
        said = " ".join(turn.content for turn in example.turns)
        assert record["uses_persona"] == bool(personal_word_spans(record["reply"], example.persona, said))
        assert record["reference"] == example.response
    assert "replies that use the persona" in out and "rouge-score" in out
    run("--output", tmp_path / "b.json")
    run("--output", tmp_path / "c.json", "--seed", 7)
    run("--output", tmp_path / "d.json", "--temperature", 0)
    replies = [[r["reply"] for r in result(tmp_path / f"{name}.json")["records"]] for name in "abcd"]
    assert replies[0] == replies[1] and replies[0] != replies[2] and replies[0] != replies[3]


def test_an_interrupted_evaluation_goes_on(run, tmp_path, monkeypatch):
    run = partial(run, "--batch_size", 1)  # a user each
    run("--output", tmp_path / "whole.json")
    calls = []
    original = Evaluator.losses

    def interrupted(self, items):
        calls.append([item.index for item in items])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, items)

    monkeypatch.setattr(Evaluator, "losses", interrupted)
    assert run("--output", tmp_path / "half.json", code=130).err.endswith("Interrupted.\n")
    run("--output", tmp_path / "half.json")
    assert calls[3] == calls[2] and sum(map(len, calls)) == LIMIT + len(calls[2]), "whole batches are kept"
    half, whole = result(tmp_path / "half.json"), result(tmp_path / "whole.json")
    assert half["metrics"] == whole["metrics"] and half["records"] == whole["records"]
    err = run("--output", tmp_path / "half.json", "--seed", 1, code=2).err
    assert "holds the records of another run (seed was 42 and is 1 now)" in err


@pytest.mark.parametrize("field", [{"user_id": "ana"}, {"personal_spans": [[0, 2]]}])
def test_records_of_other_users_or_labels_are_another_runs(run, tmp_path, field):
    data, losses = tmp_path / "rows.jsonl", ("--data", tmp_path / "rows.jsonl", "--generate", "false")
    write_jsonl(data, ROWS)
    run(*losses, "--output", tmp_path / "e.json")
    write_jsonl(data, [ROWS[0] | field, *ROWS[1:]])
    err = run(*losses, "--output", tmp_path / "e.json", code=2).err
    assert "e.jsonl: holds the records of another run (labels was" in err


def test_a_second_process_on_the_same_output_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr("perce.measuring.inference.load_to_measure", lambda *_: pytest.fail("found too late"))
    with locked(tmp_path / ".e.jsonl.lock", ""):
        err = run("--output", tmp_path / "e.json", code=2).err
    assert f"error: {tmp_path / 'e.jsonl'}: in use by process" in err


def test_records_under_other_words_of_the_prompt_are_another_runs(run, tmp_path):
    style = tmp_path / "prompt.yaml"
    for words, code in (("Known:", 0), ("Known:", 0), ("He says:", 2)):
        style.write_text(f'header: "{words}\\n"\n')
        err = run("--output", tmp_path / "a.json", "--prompt", style, code=code).err
    assert "holds the records of another run (prompt was" in err and "He says" in err


def test_two_models_are_compared_on_the_same_examples(run, tmp_path, monkeypatch):
    save_tiny_model(tmp_path / "other", "llama")
    run("--model", tmp_path / "other", "--output", tmp_path / "other.json")
    out = run("--output", tmp_path / "ours.json", "--compare_with", tmp_path / "other.json").out
    ours, other = result(tmp_path / "ours.json"), result(tmp_path / "other.json")
    for name, difference in ours["comparison"]["differences"].items():
        expected = ours["metrics"][name]["value"] - other["metrics"][name]["value"]
        assert difference["value"] == pytest.approx(expected, abs=1e-9), name
        assert 0 < difference["p"] <= 1
    assert "A: this result, of" in out and f"B: {tmp_path / 'other.json'}, of" in out and "A − B" in out
    run("--output", tmp_path / "few.json", "--limit", 3)
    monkeypatch.setattr(Evaluator, "evaluate", lambda *_: pytest.fail("found too late"))
    err = run("--compare_with", tmp_path / "few.json", "--output", tmp_path / "new.json", code=2).err
    assert f"--compare_with {tmp_path / 'few.json'}: 11 of 14 examples are in one result only" in err
    assert not [*tmp_path.glob("new.json*")]
    (tmp_path / "bad.json").write_text("{}")
    assert "expected the JSON that perce.evaluate" in run("--compare_with", tmp_path / "bad.json", code=2).err


def test_losses_on_other_personal_tokens_are_not_compared(run, tmp_path):
    """As many tokens are personal, and others."""
    row = {"persona": "I keep bees and hens.", "query": "What about bees?", "response": "My hens or hens are old."}
    flags = ("--generate", "false", "--data", tmp_path / "rows.jsonl", "--output")
    for name, spans, more in (("a", [3, 7], ()), ("b", [11, 15], ("--compare_with", tmp_path / "a.json"))):
        write_jsonl(tmp_path / "rows.jsonl", [row | {"personal_spans": [spans]}])
        out = run(*flags, tmp_path / f"{name}.json", *more).out
    ours, other = (result(tmp_path / f"{name}.json") for name in "ba")
    assert ours["records"][0]["personal_tokens"] == other["records"][0]["personal_tokens"] > 0
    assert {*ours["comparison"]["left_out"]} == {"loss_personal_tokens", "loss_other_tokens"}
    assert "not compared: loss on personal tokens, because 1 of 1 examples have other personal tokens" in out


def test_the_most_frequent_personal_words_are_told_and_kept(run, tmp_path):
    row = {"persona": "Ich mag Bienen nicht.", "query": "Und?", "response": "Nicht Bienen, nicht mag!"}
    write_jsonl(tmp_path / "rows.jsonl", [row, {**row, "personal_spans": [[6, 12]]}])
    told = "personal words: nicht (2), bienen (2), mag (1)"
    out = run("--generate", "false", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "a.json").out
    assert told in out and told in result(tmp_path / "a.json")["notes"]


def test_results_of_another_version_are_refused(run, tmp_path):
    run("--generate", "false", "--output", tmp_path / "a.json")
    old = result(tmp_path / "a.json")
    del old["run"]["form"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    err = run("--generate", "false", "--compare_with", tmp_path / "old.json", code=2).err
    assert f"--compare_with {tmp_path / 'old.json'}: was written by another version of perce" in err
    (tmp_path / "bare.json").write_text('{"kind": "perce.evaluate"}')
    assert "expected the JSON that perce.evaluate" in run("--compare_with", tmp_path / "bare.json", code=2).err
    facts = json.loads((tmp_path / "a.jsonl.run.json").read_text())
    (tmp_path / "a.jsonl.run.json").write_text(json.dumps(facts | {"form": 0}))
    err = run("--generate", "false", "--output", tmp_path / "a.json", code=2).err
    assert "holds the records of another run (form was 0 and is" in err


def test_examples_with_the_same_texts_are_compared_one_by_one(run, tmp_path):
    rows = [json.loads(line) for line in (DATA_DIR / "test.jsonl").read_text(encoding="utf-8").splitlines()[:2]]
    data = write_jsonl(tmp_path / "twice.jsonl", rows + rows)
    run("--data", data, "--generate", "false", "--output", tmp_path / "a.json")
    run("--data", data, "--generate", "false", "--output", tmp_path / "b.json", "--compare_with", tmp_path / "a.json")
    comparison = result(tmp_path / "b.json")["comparison"]
    difference = comparison["differences"]["loss_with_persona"]
    assert difference["n"] == 4 and difference["value"] == 0 and not comparison["settings"]


def test_a_comparison_tells_what_else_than_the_model_differs(run, tmp_path):
    run("--temperature", 0, "--output", tmp_path / "a.json")
    out = run("--max_new_tokens", 5, "--temperature", 0, "--compare_with", tmp_path / "a.json").out
    assert (
        f"not only the model differs: max_new_tokens is 5 in this result and 6 in {tmp_path / 'a.json'}" in out
        and "temperature" not in out
    )


def test_a_sample_is_of_the_whole_split(model, tmp_path, capsys):
    def sampled(*argv):
        path = tmp_path / f"{'-'.join(argv)}.json"
        flags = ["--model", str(model), "--generate", "false", "--sample", "9", "--output", str(path)]
        assert evaluate.main([*flags, *argv]) == 0
        return [record["source"] for record in result(path)["records"]]

    sources = [example.source for example in demo_examples(1000, "test")]
    one, other = sampled(), sampled("--split_seed", "1")
    assert len(one) == 9 and set(one) <= set(sources) and one != other
    assert all(not set(drawn) <= set(sources[:20]) for drawn in (one, other)), "of the whole, not of its beginning"
    assert evaluate.main(["--sample", "2", "--limit", "3"]) == 2
    assert "limit, sample: expected only one of them" in capsys.readouterr().err


def test_one_user_has_nobody_to_swap_with_and_long_rows_are_skipped(run, tmp_path):
    rows = [json.loads(line) for line in (DATA_DIR / "test.jsonl").read_text(encoding="utf-8").splitlines()[:3]]
    assert len({row["user_id"] for row in rows}) == 1
    out = run("--data", write_jsonl(tmp_path / "a.jsonl", rows), "--generate", "false").out
    assert "3 examples without another's persona that fits" in out and "cost of another" not in out
    rows[1]["query"] = "Tell me? " * 4000
    data = write_jsonl(tmp_path / "b.jsonl", rows)
    assert "leaves no room" in run("--data", data, "--generate", "false", code=2).err
    assert "1 examples skipped" in run("--data", data, "--generate", "false", "--skip_bad_rows").out


def test_rows_that_are_left_out_are_counted_with_the_first_reason(run, tmp_path):
    rows = [json.loads(line) for line in (DATA_DIR / "test.jsonl").read_text(encoding="utf-8").splitlines()[:5]]
    rows[2]["response"], rows[3]["weight"], rows[1]["query"] = "", 0, "Tell me? " * 4000
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = ("--data", data, "--skip_bad_rows", "--generate", "false")
    out = " ".join(run(*flags, "--output", tmp_path / "e.json").out.split())
    notes = result(tmp_path / "e.json")["notes"]
    for note in (f"1 rows skipped; the first: {data}:3: field 'response': expected", "1 replies of weight 0 left out",
                 "1 examples skipped, the first: rows.jsonl:2: query and response take"):  # fmt: skip
        assert note in out and any(told.startswith(note) for told in notes)
    write_jsonl(data, rows[1:2])
    err = run(*flags, code=2).err
    assert "No example is left: none can be used. The first: rows.jsonl:1: query and response take" in err
    assert "--skip_bad_rows" not in err


def test_replies_that_the_prompt_shows_are_counted(run, tmp_path):
    rows = [{**row, "persona": [row["response"]]} for row in ROWS[:2]] + ROWS[2:4]
    out = run("--data", write_jsonl(tmp_path / "rows.jsonl", rows), "--generate", "false").out
    assert "2 of 4 replies stand word for word in their persona" in " ".join(out.split())


def test_tokens_that_the_model_lacks_are_refused_by_name(run, tmp_path):
    save_tiny_model(tmp_path / "model", vocab_size=60)
    err = run("--model", tmp_path / "model", code=2).err
    assert re.search(r"error: test\.jsonl:1: token id \d+ is outside the model's vocabulary of 60\.", err)


@pytest.mark.parametrize(
    ("output", "records"),
    [("e.json", "e.jsonl"), ("a/qwen-0.6", "a/qwen-0.6.jsonl"), ("e.JSON", "e.jsonl"), ("e.Json", "e.jsonl")],
)
def test_the_records_have_the_whole_name_of_the_result(output, records):
    assert str(EvaluateConfig(output=output).records) == records


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--temperature", "-1"], "temperature: expected 0 (greedy), or at least"),
        (["--output", "/proc/e.json"], "cannot be written to"),
        (["--output", "e.JSONL"], "output: expected a name for JSON"),
        (["--compare_with", "none.json"], "--compare_with none.json: cannot be read"),
        (["--objective", "ce"], "objective: unknown option"),
    ],
)
def test_errors_are_one_paragraph(run, argv, fragment):
    err = run(*argv, code=2).err
    assert fragment in err and "Traceback" not in err


def test_rows_without_a_response_have_replies_alone(model, tmp_path, capsys, monkeypatch):
    data = documented_files(tmp_path, "lamp_qa")
    monkeypatch.setattr("perce.measuring.evaluation.token_statistics", None)  # no loss is computed
    run = printed_by(fast, capsys, "--model", model, "--data", data)
    run("--output", tmp_path / "e.json")
    content = result(tmp_path / "e.json")
    assert [*content["metrics"]] == ["uses_persona", "reply_words"]
    (record,) = content["records"]
    assert record["reply"] and record["reference"] == "" and record["loss"] is None and record["rougeL"] is None
    assert "field 'response': expected a response" in run("--generate", "false", code=2).err


def test_a_conversation_is_told_turn_by_turn(model, tmp_path, capsys):
    (row,) = documented("aloe")
    data = documented_files(tmp_path, "aloe", {**row, "conversations": row["conversations"] * 3})
    run = printed_by(fast, capsys, "--model", model, "--data", data)
    printed = run("--output", tmp_path / "e.json").out
    assert "turn" in printed and "replies use it" in printed
    content = result(tmp_path / "e.json")
    assert [*content["by_turn"]] == ["1", "2", "3"]
    assert all(turn["uses_persona"]["n"] == turn["loss_with_persona"]["n"] == 1 for turn in content["by_turn"].values())


def test_rows_without_a_persona_have_losses_and_replies_and_use_none(run, tmp_path):
    rows = [{**row, "persona": []} if i % 2 else row for i, row in enumerate(ROWS[:6])]
    out = run("--data", write_jsonl(tmp_path / "rows.jsonl", rows), "--output", tmp_path / "e.json").out
    assert "3 of 6 examples have no persona: both passes are the same, and PIR is 0" in " ".join(out.split())
    content = result(tmp_path / "e.json")
    of_personas = ("loss", "loss_without", "loss_personal", "loss_other", "loss_swapped", "uses_persona")
    for record in content["records"]:
        has_one = record["example"] % 2 == 0
        assert {record[name] is not None for name in of_personas} == {has_one}
        assert (record["loss_of_nobody"] is None) == has_one and record["rougeL"] is not None
    found = {name: metric["n"] for name, metric in content["metrics"].items()}
    names = ("loss_with_persona", "loss_swapped_persona", "loss_of_nobody", "uses_another")
    assert {found[name] for name in names} == {3}
    assert found["rougeL"] == 6
    nobody = [{**row, "persona": []} for row in rows]
    out = run("--data", write_jsonl(tmp_path / "none.jsonl", nobody)).out
    assert "6 of 6 examples have no persona" in " ".join(out.split()) and "replies that use the persona" not in out


def test_replies_that_are_cut_and_what_counts_by_chance_are_told(run, tmp_path):
    """Histories of one subject: with another user's, most of the personal words would be found too."""
    subject = "The old mill by the river makes flour, bread and honey."
    rows = [
        {**row, "persona": [subject, f"My name is Ana{i}."], "response": f"Ana{i} and honey, flour and bread."}
        for i, row in enumerate(ROWS[:6])
    ]  # fmt: skip
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    out = " ".join(run("--data", data, "--max_new_tokens", 3, "--output", tmp_path / "e.json").out.split())
    content = result(tmp_path / "e.json")
    records = content["records"]
    cut = sum(record["is_cut"] for record in records)
    assert cut and f"{cut} of 6 replies were cut at --max_new_tokens 3: scores are of their beginnings" in out
    found = re.search(
        r"personal tokens: (\d+); with another user's persona, (\d+) would count \((\d+)%\): many are", out
    )
    assert int(found[1]) == sum(record["personal_tokens"] for record in records) and 40 < int(found[3]) < 90
    assert {record["reference_words"] for record in records} == {6}
    assert content["metrics"]["uses_another"]["n"] == 6
