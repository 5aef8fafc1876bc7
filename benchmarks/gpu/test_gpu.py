"""`pytest benchmarks/ --benchmark-only` on a GPU: the op and the installed peers; every line is in extra_info."""

import pytest
import torch

from benchmarks.gpu.command import in_turn
from benchmarks.gpu.compare import stages
from benchmarks.gpu.results import Results
from benchmarks.gpu.supervise import run
from benchmarks.gpu.tables import report

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: none is visible to torch")


@pytest.mark.benchmark(group="gpu: perce and its peers")
def test_perce_and_its_peers(benchmark, tmp_path):
    results = Results("gpu_benchmark", tmp_path)
    benchmark.pedantic(run, args=(in_turn(stages("cuda"), ["peers"]), results), rounds=1)
    benchmark.extra_info |= results.lines
    print(f"\n{report([results.tree])}")
    measured = [line for key, line in results.lines.items() if key.endswith("/perce") and "seconds" in line]
    assert measured and all(line["correct"] for line in measured)
