"""Nothing that data, names or errors hold acts on a terminal, a page or a file that a command writes; and progress
bars."""

import io
import json
import os
import re
import shutil
import sys

import pytest
import yaml

from perce import evaluate, load_examples, plan, score
from perce import train as train_command
from perce.config.yaml_file import dump_yaml
from perce.data.dataset import pair_dataset
from perce.visible import as_json, listed, progress, shortened, visible
from tests.helpers.pages import Page
from tests.helpers.pairs import builder
from tests.helpers.tiny import read_jsonl, write_jsonl
from tests.helpers.training import ROWS

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
ACTING = "".join(map(chr, (*range(1, 32), *range(0x7F, 0xA0)))) + BIDI + "\u2028\u2029"
MARKUP = "[bold][red][link=x]:smile:<b onclick=x>|`*"
NAME = f"{ACTING}\nFORGED {MARKUP}"  # of a file: without a slash and NUL
TEXT = f"{NAME}[/b]\x00"  # ends what "[bold]" did not begin
USER = TEXT  # half of a surrogate pair in it is refused


def unseen(text: str, allowed: str = "\n") -> set[str]:
    """Characters that act on whatever shows the text, and halves of surrogate pairs."""
    return {c for c in text if (c in f"{ACTING}\x00" and c not in allowed) or 0xD800 <= ord(c) < 0xE000}


def test_what_acts_is_shown_and_all_else_stays():
    assert visible("a\x1b[31m\n\u202e\x85\ud83d") == r"a\x1b[31m\n\u202e\x85\ud83d"
    letters = "naïve \u0645\u06cc\u200c\u062e 👩\u200d🚀 [/b] C:\\x1b"
    assert visible(letters) == letters and visible(f"{ACTING}\n", keep=f"{ACTING}\n") == f"{ACTING}\n"
    assert not unseen(visible(USER), "") and visible("a\tb\n", keep="\t\n") == "a\tb\n"


def test_json_comes_back_as_it_was():
    value = {USER: [NAME, letters := "naïve 👩\u200d🚀", 1.5, None]}
    for indent in (None, 1):
        text = as_json(value, indent)
        assert json.loads(text) == value and not unseen(text) and letters in text
    assert yaml.safe_load(dump_yaml({"a": USER, "b": letters})) == {"a": USER, "b": letters}
    assert letters in dump_yaml({"b": letters}) and not unseen(dump_yaml({"a": NAME}))


def check_printed(printed, told: str) -> None:
    out, err = printed
    assert not unseen(out) and not unseen(err, "\n\r"), "the progress bars' own \\r alone"
    assert "\nFORGED" not in out + err and "Traceback" not in err and told in out + err


def check_page(path) -> None:
    page = Page(path)
    assert not unseen(page.html, "\n\t") and "<b onclick" not in page.html and "FORGED" in page.text + page.json
    assert not unseen(page.json, "") and not unseen(page.words(), "\n\t")


@pytest.fixture(scope="module")
def named(model, tmp_path_factory):
    """A directory whose name ends markup across its slash, with a model and rows of names that no one would choose."""
    directory = tmp_path_factory.mktemp("named") / "x["
    shutil.copytree(model, directory / f"b]{NAME}")
    rows = [
        {**row, "user_id": USER + str(i), "persona": [TEXT, *row["persona"]], "query": TEXT + row["query"],
         "response": f"In [/b]{ACTING}{MARKUP} town {i}."}
        for i, row in enumerate(ROWS[:4])
    ]  # fmt: skip
    write_jsonl(directory / f"{NAME}.jsonl", rows)
    return directory


def test_score(named, capsys):
    paths = {name: named / f"s{NAME}.{name}" for name in ("jsonl", "html", "json")}
    argv = ["--model", named / f"b]{NAME}", "--data", named / f"{NAME}.jsonl", "--labels", "--limit", 2]
    argv += ["--jsonl", paths["jsonl"], "--output", paths["html"], "--summary", paths["json"]]
    assert score.main(list(map(str, argv))) == 0
    printed = capsys.readouterr()
    head, body = printed.out.split("\n", 1)
    check_printed((head, printed.err), "examples")
    assert "[/b]" in body and not unseen(body, "\n\t"), "a reply keeps its lines and tabs"
    assert "\nFORGED" not in body
    check_page(paths["html"])
    raw = paths["jsonl"].read_bytes().decode()
    assert not unseen(raw)
    assert [record["user_id"] for record in read_jsonl(paths["jsonl"])] == [f"{USER}{i}" for i in range(2)]
    assert not unseen(paths["json"].read_bytes().decode())


def test_evaluate(named, capsys):
    output = named / f"e{NAME}.json"
    argv = ["--model", named / f"b]{NAME}", "--data", named / f"{NAME}.jsonl", "--generate", "false", "--limit", 2]
    assert evaluate.main(list(map(str, [*argv, "--output", output]))) == 0
    check_printed(capsys.readouterr(), "loss with persona")
    assert not unseen(output.read_bytes().decode())
    other = named / f"f{NAME}.json"
    result = json.loads(output.read_text(encoding="utf-8"))
    result["run"] |= {"model": TEXT, "split": TEXT}
    other.write_text(json.dumps(result), encoding="utf-8")
    assert evaluate.main(list(map(str, [*argv, "--compare_with", other]))) == 0
    check_printed(capsys.readouterr(), "not only the model differs")


def test_plan(named, capsys, monkeypatch):
    monkeypatch.setattr("perce.planning.plans.variants", lambda options, device: [])
    argv = ["--model", named / f"b]{NAME}", "--json", named / f"p{NAME}.json", "--context", 64, "--query", 16]
    assert plan.main(list(map(str, [*argv, "--response", 16, "--tflops", 1]))) == 0
    check_printed(capsys.readouterr(), "peak memory")


def test_train(named, capsys):
    run = named / f"run{NAME}"
    argv = ["--model", named / f"b]{NAME}", "--data", named / f"{NAME}.jsonl", "--output_dir", run]
    argv = list(map(str, [*argv, "--max_steps", 1, "--precision", "fp32", "--disable_tqdm", "true"]))
    assert train_command.main([*argv, "--print_config"]) == 0
    printed = capsys.readouterr()
    assert not unseen(printed.out) and yaml.safe_load(printed.out)["output_dir"] == str(run)
    assert train_command.main(argv) == 0
    check_printed(capsys.readouterr(), "loss with persona")
    check_page(run / "report.html")
    for name in ("config.yaml", "README.md", "held_out.json", "run.json", "base.json", "trainer_state.json"):
        text = (run / name).read_bytes().decode()
        assert not unseen(text) and "\nFORGED" not in text, name
    assert yaml.safe_load((run / "config.yaml").read_bytes())["data"] == str(named / f"{NAME}.jsonl")
    card = (run / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("\n---\n")[0])["license"] == "other" and "FORGED" in card
    assert "<b onclick" not in re.sub(r"\\<", "", card.split("\n---\n")[1])
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows), "a name ends no cell"
    assert train_command.main(argv) == 2
    check_printed(capsys.readouterr(), "holds a run already")


@pytest.mark.parametrize(
    "argv",
    [
        ["--data", f"{NAME}.jsonl"], ["--config", NAME], [f"--{NAME}"], [f"-{NAME}"], [NAME], ["--model", f"./{NAME}"],
        ["--model", "none/of/[/b]"], ["--columns", f"persona={TEXT}"], ["--format", TEXT], ["--limit", TEXT],
        ["--retriever_model", TEXT], ["--chat_template_kwargs", TEXT], ["--prompt", TEXT],
    ],
)  # fmt: skip
def test_mistakes(argv, capsys):
    assert score.main(argv) == 2
    check_printed(capsys.readouterr(), "error: ")


@pytest.mark.parametrize(
    "row",
    [
        b"{" + NAME.encode(), b"\xff" + TEXT.encode(), json.dumps(TEXT).encode(), json.dumps({TEXT: 1}).encode(),
        json.dumps({"persona": {TEXT: 1}, "query": "q", "response": "r"}).encode(),
        json.dumps({"persona": "p", "query": "\ud83d", "response": "r"}).encode(),
        json.dumps({"persona": [{TEXT: 1}], "query": "q", "response": "r"}, ensure_ascii=False).encode(),
    ],
    ids=range(7),
)  # fmt: skip
def test_bad_rows(row, tmp_path, capsys):
    path = tmp_path / f"{NAME}.jsonl"
    path.write_bytes(row.replace(b"\n", b" "))
    assert score.main(["--data", str(path)]) == 2
    check_printed(capsys.readouterr(), "error: ")


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_names_that_are_not_utf8(model, tmp_path, capsys):
    data = tmp_path / os.fsdecode(b"\xff.jsonl")
    shutil.copy(write_jsonl(tmp_path / "rows.jsonl", ROWS), data)
    output = tmp_path / os.fsdecode(b"\xfe.jsonl")
    assert score.main(["--model", model, "--data", str(data), "--limit", "1", "--jsonl", str(output)]) == 0
    check_printed(capsys.readouterr(), r"\udcff.jsonl")
    assert read_jsonl(output)[0]["source"] == f"{data.name}:1"
    for argv in (["--data", str(data) + "x"], ["--model", str(tmp_path / os.fsdecode(b"\xfd"))]):
        assert score.main(argv) == 2
        check_printed(capsys.readouterr(), r"\udcf")
    run = tmp_path / os.fsdecode(b"\xfc")
    argv = ["--model", model, "--data", str(data), "--output_dir", str(run), "--print_config"]
    assert train_command.main(argv) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"] == str(data)


def test_what_is_long_is_shortened():
    assert shortened("a" * 60) == "a" * 60 and shortened("a" * 61) == "a" * 57 + "..."
    assert listed(["a", "b" * 41]) == "a, " + "b" * 37 + "..."
    assert listed(map(str, range(13))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …" and listed([]) == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("terminal", "patience", "shown"), [(True, 0.0, True), (True, 60.0, False), (False, 0.0, False)]
)
def test_progress_is_shown_on_a_terminal_where_it_takes_long(monkeypatch, terminal, patience, shown):
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr("perce.visible.PATIENCE", patience)
    assert [*progress("reading", "example", range(3))] == [0, 1, 2]
    with progress("pairing", "example", total=3) as bar:
        bar.update(3)
    assert [what in out.getvalue() for what in ("reading", "pairing")] == [shown, shown]


def test_reading_and_pairing_show_progress(monkeypatch, tmp_path):
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr("perce.visible.PATIENCE", 0.0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = load_examples(write_jsonl(tmp_path / "rows.jsonl", ROWS), "train")
    pair_dataset(rows.all, builder())
    assert "reading" in out.getvalue() and "pairing:" in out.getvalue()
