"""perce.score: numbers against the model's own full logits, resume, labels, and errors."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from perce import UserError
from perce.config.commands import SCORE
from perce.demo import DATA_DIR
from perce.files.lock import locked
from perce.measuring import inference, score_report, scores
from tests.helpers.pages import Page
from tests.helpers.tiny import read_jsonl, save_tiny_model, tiny_tokenizer, write_jsonl
from tests.helpers.training import LIMIT, ROWS, a_run


def test_records_equal_the_models_own_logits(scored, gemma, tmp_path):
    scored("--jsonl", tmp_path / "s.jsonl", "--clip_min", "0.05", "--batch_size", 4)
    records = read_jsonl(tmp_path / "s.jsonl")
    assert [record["example"] for record in records] == list(range(LIMIT))
    stock = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32).eval()
    for record in records:
        response = torch.tensor(record["response_ids"])
        for prompt, name in (("prompt_ids", "logp"), ("prompt_cf_ids", "logp_cf")):
            ids = torch.tensor([record[prompt] + record["response_ids"]])
            logits = stock(input_ids=ids).logits[0, -len(response) - 1 : -1].log_softmax(-1)
            expected = logits.gather(1, response[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(record[name]), expected.detach(), atol=1e-4, rtol=0)
        pir = torch.tensor(record["logp"]) - torch.tensor(record["logp_cf"])
        torch.testing.assert_close(torch.tensor(record["pir"]), pir)
        torch.testing.assert_close(torch.tensor(record["weight"]), pir.clamp(0.05, 5.0))
        assert "".join(record["response_tokens"]) == tiny_tokenizer().decode(record["response_ids"])
        assert len(record["personal"]) == len(record["logp"]) == len(record["response_tokens"])


def test_an_interrupted_run_is_continued_and_nothing_is_scored_twice(scored, tmp_path, monkeypatch):
    scored("--jsonl", tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_text(encoding="utf-8")
    half = tmp_path / "half.jsonl"
    monkeypatch.setattr(scores, "WINDOW", 4)
    scored("--jsonl", half, "--limit", 6)
    with half.open("a", encoding="utf-8") as file:
        file.write('{"example": 6, "sour')  # the power went off
    seen = []
    original = scores.score_window
    monkeypatch.setattr(scores, "score_window", lambda built, *a: seen.extend(built) or original(built, *a))
    scored("--jsonl", half)
    assert [index for index, *_ in seen] == [6, 7, 8]
    ours, theirs = read_jsonl(half), [json.loads(line) for line in whole.splitlines()]
    assert [record["response_ids"] for record in ours] == [record["response_ids"] for record in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["pir"] == pytest.approx(its["pir"], abs=1e-5)
    seen.clear()
    scored("--jsonl", half, "--output", tmp_path / "s.html")
    assert not seen and (tmp_path / "s.html").stat().st_size > 1000


def test_a_second_process_on_the_same_records_is_refused(scored, tmp_path, monkeypatch):
    path, refused = tmp_path / "s.jsonl", []
    original = scores.score_window

    def beside_another(built, *rest):
        monkeypatch.setattr("perce.measuring.inference.load_to_measure", lambda *_: pytest.fail("found too late"))
        refused.append(scored("--jsonl", tmp_path / "." / "s.jsonl", code=2).err)
        return original(built, *rest)

    monkeypatch.setattr(scores, "score_window", beside_another)
    scored("--jsonl", path)
    assert refused and all(f"error: {path}: in use by process {os.getpid()} on" in err for err in refused)
    assert [record["example"] for record in read_jsonl(path)] == list(range(LIMIT))
    monkeypatch.undo()
    scored("--jsonl", path)


def test_records_are_locked_until_the_command_ends(scored, tmp_path, monkeypatch):
    def still(*_):
        with pytest.raises(UserError, match="in use"), locked(tmp_path / ".s.jsonl.lock", ""):
            pass
        raise UserError("ended")

    monkeypatch.setattr(score_report, "write_summary", still)
    scored("--jsonl", tmp_path / "s.jsonl", "--summary", tmp_path / "s.json", code=2)
    with locked(tmp_path / ".s.jsonl.lock", ""):
        pass


def test_records_of_another_run_are_not_mixed_in(scored, tmp_path):
    path = tmp_path / "s.jsonl"
    scored("--jsonl", path)
    err = scored("--jsonl", path, "--clip_max", 3, code=2).err
    assert "holds the records of another run (clip_max was 5.0 and is 3.0 now)" in err
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], "no json", *lines[2:]]) + "\n", encoding="utf-8")
    assert f"{path}:2: expected a JSON object" in scored("--jsonl", path, code=2).err
    path.write_text("\n".join([lines[0], "[]", *lines[2:]]) + "\n", encoding="utf-8")
    assert f"{path}:2: expected a JSON object" in scored("--jsonl", path, code=2).err
    for place in (0, 1):  # fields that are lost
        path.write_text("\n".join([*lines[:place], "{}", *lines[place + 1 :]]) + "\n", encoding="utf-8")
        assert f"{path}:{place + 1}: expected a record" in scored("--jsonl", path, code=2).err
    for content in ("[]", "null", "{"):
        (tmp_path / "s.jsonl.run.json").write_text(content)
        assert f"{path}.run.json: expected a JSON object" in scored("--jsonl", path, code=2).err
    (tmp_path / "s.jsonl.run.json").unlink()
    assert "exists already, and was not written by perce" in scored("--jsonl", path, code=2).err


@pytest.mark.parametrize("column", ["pir", "entropy", "weight"])
def test_a_record_that_lacks_a_tokens_value_is_refused(scored, tmp_path, column):
    path = tmp_path / "s.jsonl"
    scored("--labels", "--jsonl", path)
    first, *rest = read_jsonl(path)
    del first[column][0]
    write_jsonl(path, [first, *rest])
    err = scored("--labels", "--jsonl", path, code=2).err
    tokens = len(first["response_ids"])
    assert f"{path}: test.jsonl:1 has {tokens} response tokens, and {tokens - 1} values of {column}" in err
    assert "delete it" in err


@pytest.mark.parametrize("empty", [True, False])
def test_a_description_that_perce_did_not_write_is_not_replaced(scored, tmp_path, monkeypatch, empty):
    path, told = tmp_path / "s.jsonl", tmp_path / "s.jsonl.run.json"
    path.touch() if empty else None
    told.write_text('{"command": "mine"}\n')
    with monkeypatch.context() as patch:
        patch.setattr("perce.measuring.inference.load_to_measure", lambda *_: pytest.fail("found too late"))
        assert f"error: {told}: exists already, and was not written by" in scored("--jsonl", path, code=2).err
    assert told.read_text() == '{"command": "mine"}\n'
    told.unlink()
    scored("--jsonl", path)
    path.unlink()
    scored("--jsonl", path, "--clip_max", 3)  # its own description, without records


def test_changed_data_is_not_mixed_with_what_was_scored(scored, tmp_path):
    rows = (DATA_DIR / "test.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    data, path = tmp_path / "rows.jsonl", tmp_path / "s.jsonl"
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    scored("--data", data, "--jsonl", path)
    data.write_text("\n".join([rows[1], rows[0], *rows[2:]]) + "\n", encoding="utf-8")
    err = scored("--data", data, "--jsonl", path, code=2).err
    assert "rows.jsonl:1 is not the example that was scored before" in err
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    out = scored("--data", data, "--jsonl", path, "--limit", 2, "--terminal", 0).out
    assert re.search(r"examples +2\b", out), "of a longer file the first are summarised"
    out = scored("--data", data, "--jsonl", path, "--limit", 2).out
    assert "rows.jsonl:2" in out and "rows.jsonl:3" not in out, "and no others shown"
    data.write_text("\n".join(rows[:2]) + "\n", encoding="utf-8")
    for limit in (LIMIT, 3):
        err = scored("--data", data, "--jsonl", path, "--limit", limit, code=2).err
        assert f"{path}: has records of {min(limit, 4)} examples, and the data only 2" in err
    scored("--data", data, "--jsonl", path, "--limit", 2)


@pytest.mark.parametrize("field", [{"weight": 2.0}, {"user_id": "ana"}, {"personal_spans": [[0, 2]]}])
def test_changed_data_of_the_same_prompts_is_not_mixed_either(scored, tmp_path, field):
    data, path = tmp_path / "rows.jsonl", tmp_path / "s.jsonl"
    write_jsonl(data, ROWS[:3])
    scored("--data", data, "--jsonl", path)
    write_jsonl(data, [ROWS[0], ROWS[1] | field, ROWS[2]])
    err = scored("--data", data, "--jsonl", path, code=2).err
    assert "rows.jsonl:2 is not the example that was scored before" in err


def test_labels_summary_page_and_terminal(scored, tmp_path):
    files = ("--summary", tmp_path / "s.json", "--output", tmp_path / "s.html", "--jsonl", tmp_path / "s.jsonl")
    out = scored("--labels", *files, "--shown", 2).out
    content = json.loads((tmp_path / "s.json").read_text())
    methods = content["identification"]["methods"]
    assert set(methods) == {"PIR", "persona word", "token loss", "entropy"} and content["identification"]["marked"]
    assert all(0 <= method["auc"] <= 1 for method in methods.values())
    assert methods["persona word"]["precision"] > 0.5, "quoted facts are personal"
    assert f"{methods['PIR']['auc']:.3f}" in out and "Slowly, slowly" in out
    page = Page(tmp_path / "s.html")
    assert "marked by hand" in scored("--labels", "--terminal", 0).out
    assert len(page.data["responses"]) == 2 and f"This page shows 2 of {LIMIT} scored responses" in page.text
    assert "Token identification" in page.text and "Highest PIR" in page.text
    for place, record in enumerate(read_jsonl(tmp_path / "s.jsonl")[:2]):
        found = page.tokens(place, "response")
        assert [token["text"] for token in found] == record["response_tokens"]
        for column, name in (("logp", "logp"), ("cf", "logp_cf"), ("weight", "weight")):
            assert [token[column] for token in found] == pytest.approx(record[name], abs=0.00501), column
        assert page.data["responses"][place]["source"] == record["source"]


@pytest.mark.parametrize(("contrast", "clip"), [("log", (0.0, 0.004)), ("ratio", (0.999, 1.004))])
def test_page_terminal_and_summary_agree_on_the_shares_at_the_clip(scored, tmp_path, contrast, clip):
    clip_flags = ("--contrast", contrast, "--clip_min", clip[0], "--clip_max", clip[1])
    paths = {name: tmp_path / f"s.{name}" for name in ("html", "json", "jsonl")}
    out = scored(
        *clip_flags, "--output", paths["html"], "--summary", paths["json"], "--jsonl", paths["jsonl"], "--terminal", 0
    ).out
    pir = torch.tensor([x for record in read_jsonl(paths["jsonl"]) for x in record["pir"]])
    acted_on = pir.exp() if contrast == "ratio" else pir
    summary = json.loads(paths["json"].read_text(encoding="utf-8"))
    floor, ceiling = (summary[f"frac_at_{end}"] for end in ("floor", "ceiling"))
    assert floor == pytest.approx((acted_on <= clip[0]).float().mean().item(), abs=1e-6) and 0.1 < floor < 0.9
    assert ceiling == pytest.approx((acted_on >= clip[1]).float().mean().item(), abs=1e-6) and 0.1 < ceiling < 0.9
    for end, share in (("floor", floor), ("ceiling", ceiling)):
        assert re.search(rf"at the {end} +{share:.1%}", out)
    page = Page(paths["html"])
    assert f"{floor:.1%} lie at the floor" in page.text and f"{ceiling:.1%} at the ceiling" in page.text
    tokens = [token for place in range(LIMIT) for token in page.tokens(place, "response")]
    assert sum(token["top"] for token in tokens) == round(ceiling * len(tokens))
    name = {"log": "PIR", "ratio": "exp(PIR)"}[contrast]
    words = f"weight of a token is {name}, clipped to {clip[0]:g} … {clip[1]:g}"
    assert f"Tokens by {name}" in page.text and words in page.text and f"Token weight: {name}, clipped" in page.text


def test_weights_are_the_objectives_own_and_a_tint_that_is_not_is_called_perces(scored, tmp_path):
    paths = {name: tmp_path / f"s.{name}" for name in ("html", "json", "jsonl")}
    files = ("--output", paths["html"], "--summary", paths["json"], "--jsonl", paths["jsonl"])
    out = scored("--objective", "ce", "--clip_min", 0.002, "--clip_max", 0.004, *files).out
    records = read_jsonl(paths["jsonl"])
    assert {x for record in records for x in record["weight"] + record["signal"]} == {1.0}
    summary = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert (summary["weight_mean"], summary["signal"], summary["clip"]) == (1.0, "1", None)
    assert re.search(r"mean weight +1\.000\b", out) and "at the floor" not in out
    assert re.search(r"tinted by +PerCE's weight, PIR clipped to 0\.002 … 0\.004", out)
    page = Page(paths["html"])
    assert page.data["weight"] == "PerCE's weight" and "Tinted by PerCE's weight;" in page.text
    found = [token["weight"] for place in range(LIMIT) for token in page.tokens(place, "response")]
    pir = torch.tensor([x for record in records for x in record["pir"]])
    assert found == pytest.approx(pir.clamp(0.002, 0.004).tolist(), abs=1e-5) and len(set(found)) > 1
    scored("--output", paths["html"])
    assert Page(paths["html"]).data["weight"] == "weight" and "Tinted by weight;" in Page(paths["html"]).text


def test_weights_are_those_of_the_run(scored, gemma, tmp_path):
    run = a_run(tmp_path / "run", objective="lossce", clip_min=0.5, normalize="batch", estimate="frozen")
    of_run = ("--model", shutil.copytree(gemma, run / "merged"), "--data", DATA_DIR, "--terminal", 0)
    said = lambda *argv: " ".join(scored(*argv).out.split())  # noqa: E731  # lines are wrapped
    told = "as in the run before its normalisation over each batch; it estimated them once, before training"
    assert f"weights −log p clipped to 0.5 … 5, {told} examples" in said(*of_run, "--jsonl", tmp_path / "s.jsonl")
    (record, *_) = read_jsonl(tmp_path / "s.jsonl")
    assert record["signal"] == pytest.approx([-x for x in record["logp"]])
    others = "those of the run: −log p clipped to 0.5 … 5 examples"
    assert f"weights −log p clipped to 0.5 … 3; {others}" in said(*of_run, "--clip_max", 3)
    assert f"weights p clipped to 0 … 1; {others}" in said(*of_run, "--objective", "dft")
    assert "weights PIR clipped to 0.8 … 5 examples" in said("--terminal", 0)


def test_the_highest_pir_is_of_finite_ones():
    record = {"pir": [1.0, math.nan, 3.0, math.inf, 2.0], "source": "rows:1", "response_tokens": list("abcde")}
    assert [row[:2] for row in score_report._most_personal([record]).rows] == [
        ("3.00", "c"),
        ("2.00", "e"),
        ("1.00", "a"),
    ]


@pytest.mark.parametrize("values", [[1.0, math.nan, 2.0], [-math.inf, 1.0, math.inf], [math.nan], [0.5]])
def test_the_histogram_is_of_finite_signals(values):
    found = score_report._histogram([{"signal": values}], SCORE.build(SCORE.parse([]).raw))
    assert sum(found.counts) == sum(map(math.isfinite, values))
    assert found.clipped == (sum(x <= 0.8 for x in values) / len(values), sum(x >= 5 for x in values) / len(values))
    assert all(map(math.isfinite, found.edges)) and sorted(set(found.edges)) == found.edges


def test_unmarked_data_is_labelled_by_persona_words_and_says_so(scored, tmp_path):
    rows = [json.loads(line) for line in (DATA_DIR / "test.jsonl").read_text(encoding="utf-8").splitlines()[:LIMIT]]
    data = write_jsonl(tmp_path / "rows.jsonl", [{k: v for k, v in r.items() if k != "personal_spans"} for r in rows])
    out = scored("--data", data, "--labels", "--terminal", 0).out
    assert (
        "words that occur in the persona but not in the conversation" in out
        and "persona word" not in out.split("method")[1]
    )
    plain = [{"persona": ["I ski."], "query": "Hello?", "response": "No."}]
    err = scored("--data", write_jsonl(tmp_path / "plain.jsonl", plain), "--labels", code=2).err
    assert "--labels: labels: expected tokens of both kinds, got 0 labelled" in err


def test_data_that_is_marked_in_part_says_how_much(scored, tmp_path):
    rows = [json.loads(line) for line in (DATA_DIR / "test.jsonl").read_text(encoding="utf-8").splitlines()[:LIMIT]]
    for row in rows[2:]:
        del row["personal_spans"]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    out = " ".join(scored("--data", data, "--labels", "--terminal", 0, "--summary", tmp_path / "s.json").out.split())
    assert f"personal: marked by hand in 2 of {LIMIT} examples, elsewhere words that occur in the persona" in out
    content = json.loads((tmp_path / "s.json").read_text())["identification"]
    assert content["marked"] == 2 and "persona word" not in content["methods"]


def test_tokens_that_the_model_lacks_are_refused_by_name(scored, tmp_path):
    save_tiny_model(tmp_path / "model", vocab_size=60)
    err = scored("--model", tmp_path / "model", code=2).err
    assert re.search(r"error: test\.jsonl:1: token id \d+ is outside the model's vocabulary of 60\.", err)


def test_streaming_gives_the_same_and_long_examples_are_skipped(scored, tmp_path):
    scored("--jsonl", tmp_path / "a.jsonl")
    scored("--jsonl", tmp_path / "b.jsonl", "--streaming")
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    longest = max(
        len(record["prompt_ids"]) + len(record["response_ids"]) for record in read_jsonl(tmp_path / "a.jsonl")
    )
    rows = [json.loads(line) for line in (DATA_DIR / "test.jsonl").read_text(encoding="utf-8").splitlines()[:4]]
    rows[1]["query"] = "Tell me? " * longest
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert "leaves no room" in scored("--data", data, "--max_length", 2 * longest, code=2).err
    scored("--data", data, "--max_length", 2 * longest, "--skip_bad_rows", "--jsonl", tmp_path / "c.jsonl")
    assert [record["example"] for record in read_jsonl(tmp_path / "c.jsonl")] == [0, 2, 3]


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_rows_that_are_left_out_are_counted_with_the_first_reason(scored, tmp_path, streaming):
    rows = [json.loads(line) for line in (DATA_DIR / "test.jsonl").read_text(encoding="utf-8").splitlines()[:5]]
    rows[2]["response"], rows[3]["weight"], rows[1]["query"] = "", 0, "Tell me? " * 4000
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    paths = {name: tmp_path / f"s.{name}" for name in ("html", "json")}
    flags = ("--data", data, "--skip_bad_rows", "--terminal", 0, "--streaming", streaming)
    out = "".join(scored(*flags, "--output", paths["html"], "--summary", paths["json"]).out.split())
    left_out, page = json.loads(paths["json"].read_text(encoding="utf-8"))["left_out"], Page(paths["html"])
    for note in (f"1 rows skipped; the first: {data}:3: field", "1 replies of weight 0 left out",
                 "1 examples skipped, the first: rows.jsonl:2: query and response take"):  # fmt: skip
        assert note in page.text and any(told.startswith(note) for told in left_out)
        assert "".join(note.split()) in out
    write_jsonl(data, rows[1:2])
    err = scored(*flags, code=2).err
    assert "No example is left: none can be used. The first: rows.jsonl:1: query and response take" in err
    assert "--skip_bad_rows" not in err


@pytest.mark.parametrize(
    ("jsonl", "exported"),
    [("runs/qwen-0.6", "runs/qwen-0.6"), ("w.jsonl", "w"), ("w.JSONL", "w"), ("w.json", "w"), ("w.a.jsonl", "w.a")],
)
def test_files_next_to_records_keep_the_whole_name(jsonl, exported):
    asked = SCORE.build(SCORE.parse(["--jsonl", jsonl, "--export", "swift"]).raw).score
    assert str(asked.exported) == f"{exported}.swift.jsonl"


@pytest.mark.parametrize("window", [64, 3])
def test_replies_of_a_conversation_are_scored_together(scored, tmp_path, monkeypatch, window):
    dialogue = [{"partner": f"how many on day {i} ?", "self": f"{i} bees ."} for i in range(4)]
    data = write_jsonl(
        tmp_path / "r.jsonl", [{"personality": [f"i have {i} bees ."], "dialogue": dialogue} for i in (5, 8)]
    )
    scored("--data", data, "--share", "none", "--jsonl", tmp_path / "none.jsonl")
    seen, own = [], inference.collate

    def spied(*args, **kwargs):
        seen.append(own(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(inference, "collate", spied)
    monkeypatch.setattr(scores, "WINDOW", window)
    scored("--data", data, "--jsonl", tmp_path / "a.jsonl")
    scored("--data", data, "--streaming", "--jsonl", tmp_path / "b.jsonl")
    assert all(batch["tokens"][0] < batch["tokens"][1] for batch in seen)
    a, b, none = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("a", "b", "none"))
    assert a == b and [record["example"] for record in a] == list(range(8))
    for one, other in zip(a, none, strict=True):
        for name, value in one.items():
            numbers = name in ("logp", "logp_cf", "pir", "signal", "weight")
            assert (pytest.approx(value, abs=1e-4) if numbers else value) == other[name], name


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--data", "nowhere.jsonl"], "No such file or directory: nowhere.jsonl"),
        (["--split", "dev"], "split: expected one of train, validation, test, held_out, got 'dev'"),
        (["--limit", "0"], "limit: expected >= 1"),
        (["--output", "/proc/s.html"], "/proc/s.html: cannot be written to"),
        (["--learning_rate", "1"], "learning_rate: unknown option. It is an option of python -m perce.train."),
        (["--clip_min", "9"], "clip_min, clip_max: expected finite numbers, 0 <= min <= max"),
        (["--model", "./none"], "no such directory"),
    ],
)
def test_errors_are_one_paragraph(scored, argv, fragment):
    err = scored(*argv, code=2).err
    assert fragment in err and "Traceback" not in err


@pytest.mark.slow  # config/test_options.py has one without stdout and stderr
def test_smoke_in_a_process_of_its_own(gemma, tmp_path):
    command = [sys.executable, "-m", "perce.score", "--model", str(gemma), "--limit", "2", "--jsonl", "s.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=None)
    assert done.returncode == 0, done.stderr
    assert len(read_jsonl(tmp_path / "s.jsonl")) == 2 and "mean PIR" in done.stdout


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_rows_without_a_persona_are_counted_and_have_no_pir(scored, tmp_path, streaming):
    rows = [{**row, "persona": []} if i else row for i, row in enumerate(ROWS[:3])]
    data, records = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "r.jsonl"
    flags = ("--data", data, "--streaming", streaming, "--jsonl", records, "--output", tmp_path / "s.html")
    out = " ".join(scored(*flags, "--terminal", 1).out.split())
    assert "2 of 3 examples have no persona: both passes are the same, and PIR is 0" in out
    known, *others = read_jsonl(records)
    assert known["passages"] and any(abs(pir) > 1e-3 for pir in known["pir"])
    for record in others:
        assert record["passages"] == [] and record["prompt_ids"] == record["prompt_cf_ids"]
        assert max(map(abs, record["pir"])) < 1e-5 and {round(weight, 6) for weight in record["weight"]} == {0.8}
