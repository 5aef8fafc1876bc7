"""Fixtures of the benchmarks."""

import pytest
import torch


@pytest.fixture(autouse=True)
def reported_machine(benchmark):
    """Numbers without the hardware mean nothing."""
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.extra_info["threads"] = torch.get_num_threads()


@pytest.fixture(autouse=True)
def fresh_compiler():
    """One compiled graph a size, never a dynamic one from the size before."""
    torch.compiler.reset()
