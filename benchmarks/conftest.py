"""Fixtures of the benchmarks."""

import pytest
import torch


@pytest.fixture(autouse=True)
def reported_machine(benchmark):
    """Records torch's version and the threads: numbers mean nothing without them. All is printed with -s."""
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.extra_info["threads"] = torch.get_num_threads()
    yield
    print(f"\n{benchmark.name}: {dict(benchmark.extra_info)}")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Compiles one graph per size instead of reusing a dynamic graph of an earlier size."""
    torch.compiler.reset()
