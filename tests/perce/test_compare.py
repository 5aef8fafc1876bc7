"""perce.compare, the command: results in, a table and JSON out, errors of one paragraph."""

import json
import subprocess
import sys

import pytest

from perce.compare import main
from perce.files.outputs import MARKS_OF_PERCE, write_json
from perce.measuring.evaluation_report import FORM, summarise
from tests.helpers import ROOT
from tests.helpers.evaluated import records
from tests.helpers.training import printed_by


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command in a directory with results of three models of one method (a0 …) and of two of another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    for name, shift in (("a0", 0.0), ("a1", 0.1), ("a2", 0.2), ("b0", 1.0), ("b1", 1.2)):
        written(name, records(shift=shift))
    return printed_by(main, capsys)


def written(name, examples, **facts):
    """A result of these examples, as perce.evaluate writes it."""
    facts = {"model": f"runs/{name}", "weights": name, "form": FORM, "temperature": 0.4} | facts
    write_json(f"{name}.json", summarise(examples, [], facts))


def test_sides_are_compared_and_written(run, tmp_path):
    out = run("--results", "a0.json,a1.json,a2.json", "--compare_with", "b0.json,b1.json", "--output", "c.json").out
    content = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert content["kind"] == "perce.compare" and content["unit"] == "user"
    assert content["sides"] == [
        {"a0.json": "runs/a0", "a1.json": "runs/a1", "a2.json": "runs/a2"},
        {"b0.json": "runs/b0", "b1.json": "runs/b1"},
    ]
    found = content["differences"]["loss_with_persona"]
    assert found["value"] == pytest.approx((0.1 - 1.1) / 10) and found["pairs"] == pytest.approx([-0.12, -0.08])
    assert not content["settings"] and not content["left_out"] and out.endswith("written  c.json\n")
    mean, difference = (x.split()[4:] for x in out.splitlines() if "loss with persona" in x)
    alone = sum(30 + number / 7 for number in range(24)) / 240
    assert mean == [f"{alone + x / 10:.4f}" for x in (0.1, 0.0, 0.2, 1.1, 1.0, 1.2)]
    assert difference[0] == "-0.1000" and difference[-1] == "yes"
    assert all(f"{side}: {name}.json, of runs/{name}\n" in out for side, name in (("A", "a0"), ("B", "b1")))
    run("--results", "a0.json", "--compare_with", "b0.json", "--output", "c.json")  # it may be replaced
    assert any(mark in (tmp_path / "c.json").read_bytes() for mark in MARKS_OF_PERCE)


def test_two_single_results_and_other_settings(run):
    written("b0", records(shift=1.0), temperature=0.0)
    out = run("--results", "a0.json", "--compare-with", " b0.json").out
    assert "one model a side: what other seeds would give is unknown" in out and "apart" not in out
    assert "not only the model differs: temperature is 0.4 in a0.json and 0.0 in b0.json" in out


@pytest.mark.parametrize(
    ("results", "others", "fragment"),
    [
        ("no.json", "b0.json", "--results no.json: cannot be read as a result of perce.evaluate"),
        ("a0.json", "b0.jsn", "Did you mean b0.json"),
        ("a0.json", "few.json", "--results a0.json, --compare_with few.json: 20 of 24 examples are in one result only"),
        ("a0.json,few.json", "b0.json", "--results a0.json, --results few.json: 20 of 24 examples are in one"),
        ("a0.json", "rows.json", "--results a0.json, --compare_with rows.json: 24 of 24 examples have another user"),
        ("a0.json", "old.json", "--compare_with old.json: was written by another version of perce"),
        ("a0.json", "plan.json", "--compare_with plan.json: expected the JSON that perce.evaluate --output writes"),
        ("a0.json", "./a0.json", "--results a0.json, --compare_with ./a0.json: both name the same file"),
        ("a0.json,a1.json,a0.json", "b0.json", "--results a0.json, --results a0.json: both name the same file"),
        ("a0.json,copy.json", "b0.json", "--results a0.json,copy.json: are results of the same weights"),
        ("a0.json,", "b0.json", "--results: expected a path, got ''"),
        ("a0.json", "~no.such.user/b.json", "--compare_with ~no.such.user/b.json: there is no user of this name"),
        ("a0.json", None, "compare_with: expected files that perce evaluate --output wrote"),
    ],
)
def test_errors_are_one_paragraph(run, tmp_path, results, others, fragment):
    written("few", records()[:4])
    written("rows", records(named=False))
    written("old", records(), form=0)
    written("copy", records(), weights="a0")
    (tmp_path / "plan.json").write_text('{"kind": "perce.plan"}')
    printed = run("--results", results, *(["--compare_with", others] if others else []), "--output", "c.json", code=2)
    assert fragment in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "c.json").exists()


def test_results_are_not_overwritten(run):
    err = run("--results", "a0.json,a1.json", "--compare_with", "b0.json", "--output", "./a1.json", code=2).err
    assert "--output ./a1.json: would overwrite file 2 of --results a1.json" in err


def test_it_runs_as_a_command_and_loads_no_model(run, tmp_path):
    code = (
        "import sys; from perce.__main__ import main; "
        "code = main(['compare', '--results', 'a0.json,a1.json', '--compare_with', 'b0.json']); "
        "print(code, {'torch', 'transformers', 'datasets'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "A − B" in done.stdout and done.stdout.splitlines()[-1] == "0 set()"
