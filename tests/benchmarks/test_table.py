"""The benchmarks are not part of the suite. These tests import each of them, and print tables of made-up results."""

import importlib
import json
import sys

import pytest

from benchmarks import table
from tests.helpers import ROOT

MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "benchmarks").rglob("*.py")]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_benchmark_can_be_imported(name):
    if "gpu" in name.split("."):
        pytest.importorskip("triton")
    importlib.import_module(name)


MACHINE = {"torch": "2.13.0", "threads": 2}
RACE = "test_perce_against_naive[512x576x49152-fp32]"


def context(persona, **sizes):
    return {"persona_tokens": persona, "peak_extra_mib": sizes}


def by_trainer(persona, lost=(), **sizes):
    return context(persona, **sizes) | {"tokens_per_second": dict.fromkeys(sizes, 9), "out_of_memory": list(lost)}


NUMBERS = {
    RACE: {"ratio_to_naive": 0.9},
    "test_rival_against_naive[compiled-512x576x49152-fp32]": {},  # failed its check, so that it has no ratio
    "test_memory_of_a_step[4096]": context(4096, checkpointing=20),
    "test_memory_of_a_step[512]": context(512, full=80, checkpointing=10),
    "test_a_step_by_trainer[512]": by_trainer(512, perce=1, naive=2),
    "test_a_step_by_trainer[2048]": by_trainer(2048, lost=["naive", "trl-ce"], perce=3),
}


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    def run(results):
        path = tmp_path / "results.json"
        path.write_text(json.dumps(results), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["table", str(path)])
        table.main()
        return capsys.readouterr().out

    return run


def test_tables_say_nothing_of_what_was_not_measured(printed):
    entries = [
        {"name": name, "stats": {"median": 1.5}, "extra_info": MACHINE | extra} for name, extra in NUMBERS.items()
    ]
    results = {"machine_info": {"cpu": {}}, "datetime": "2026-01-01T10", "benchmarks": entries}
    out = printed(results)
    assert out.startswith("unknown CPU, 2 threads, torch 2.13.0, 2026-01-01.\n")
    assert "| **perce** | 512 × 576 × 49152, fp32 | 1.50 | 0.90 |" in out
    assert "torch.compile" not in out and "peak extra memory" not in out and "planned" not in out
    assert "| checkpointing | 20 | 10 |\n| full | not measured | 80 |\n" in out
    assert "| perce | 1 (9) | 3 (9) |\n| naive | 2 (9) | out of memory |\n" in out
    assert "| trl-ce | not measured | out of memory |" in out

    results["benchmarks"] = []
    with pytest.raises(SystemExit, match="found none with numbers"):
        printed(results)


def test_tables_of_the_slow_run(printed):
    def test(outcome, extra):
        return {"outcome": outcome, "seconds": 9.0, "benchmark": {"median": 1.5, "extra_info": MACHINE | extra}}

    tests = {
        f"benchmarks/test_op.py::{RACE}": test("passed", NUMBERS[RACE]),
        "benchmarks/test_context.py::test_memory_of_a_step[512]": test("failed", context(512, full=1)),
        "tests/test_study.py::test_all": {"outcome": "passed", "seconds": 9.0},
    }
    out = printed({"cpu": "A CPU", "date": "2026-01-01 10:00 UTC", "tests": tests})
    assert out.startswith("A CPU, 2 threads, torch 2.13.0, 2026-01-01.\n")
    assert "| **perce** | 512 × 576 × 49152, fp32 | 1.50 | 0.90 |" in out and "persona" not in out
