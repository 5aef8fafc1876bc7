"""`pytest benchmarks/ --benchmark-only` on a GPU: each size's measurement as one entry, its numbers in `extra_info`."""

import pytest
import torch

from benchmarks.gpu.measure import SIZES, Job
from benchmarks.gpu.run import BUDGET, SHARES, Results, run_size
from benchmarks.gpu.tables import report

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: none is visible to torch")


@pytest.fixture(scope="module")
def results():
    """All sizes', in one file; printed at the end."""
    collected = Results(None)
    yield collected
    print(f"\n{report(collected.tree)}\n\nwritten to {collected.path}")


@pytest.mark.parametrize(
    ("size", "share"),
    zip(SIZES, SHARES, strict=True),
    ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else "",
)
@pytest.mark.benchmark(group="gpu: perce and its peers")
def test_size(benchmark, results, size, share):
    job = Job(*size, seconds=BUDGET * share)
    measured = benchmark.pedantic(run_size, args=(job, results), rounds=1)
    benchmark.extra_info |= measured.entry
    for head in job.heads:
        assert "seconds" in measured.steps(head)["peers"].get("perce", {}), measured.entry
