"""The benchmarks run outside the suite: that each can still be imported is held here."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "benchmarks").rglob("*.py")]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_benchmark_can_be_imported(name):
    if "gpu" in name.split("."):
        pytest.importorskip("triton")
    importlib.import_module(name)
