"""The head sharded over gloo ranks: three processes are started once, and each runs every case."""

import json
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import start_ranks
from tests.perce_kernels import vocab_parallel_cases
from tests.perce_kernels.vocab_parallel_cases import CASES, SLOW

MODULE = vocab_parallel_cases.__name__


def run_ranks(directory: Path, slow: bool) -> list[dict[str, str]]:
    call = [sys.executable, "-W", "ignore", "-m", MODULE, str(directory), *["slow"] * slow]
    processes = start_ranks(call, 3, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    errors = [process.communicate(timeout=280)[1] for process in processes]
    return [
        json.loads(path.read_text()) if (path := directory / f"{rank}.json").exists() else {"start": errors[rank]}
        for rank in range(3)
    ]


@pytest.fixture(scope="module")
def quick_results(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("quick"), slow=False)


@pytest.fixture(scope="module")
def slow_results(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("slow"), slow=True)


@pytest.mark.parametrize("name", [name for name in CASES if name not in SLOW])
def test_on_three_ranks(quick_results, name):
    assert_passed(quick_results, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name in SLOW])
def test_on_three_ranks_slow(slow_results, name):
    assert_passed(slow_results, name)


def assert_passed(results: list[dict[str, str]], name: str) -> None:
    for rank, result in enumerate(results[: 2 if ", two" in name else 3]):
        assert result.get(name) == "", f"rank {rank}: {result.get(name) or list(result.items())[-1:]}"
