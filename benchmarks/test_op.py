"""The op compared with plain PyTorch: time, measured alternately, peak extra memory, and memory over N.

pytest-benchmark's columns show the op; ratios and memory are in `extra_info` and printed with -s.
"""

import shutil
import time
from statistics import median

import pytest
import torch
from torch.nn import functional as F

from benchmarks.implementations import IMPLEMENTATIONS, make_inputs, step
from benchmarks.memory import peak_extra_bytes

SMALL, MIDDLE, WIDE = (512, 576, 49152), (2048, 576, 49152), (1024, 1024, 32000)
CASES = [
    pytest.param(SMALL, "float32", id="512x576x49152-fp32"),
    pytest.param(MIDDLE, "float32", id="2048x576x49152-fp32"),
    pytest.param(WIDE, "float32", id="1024x1024x32000-fp32"),
    pytest.param(MIDDLE, "bfloat16", id="2048x576x49152-bf16"),
]
MIB = 2**20


def _skip_unless_available(rival: str) -> None:
    if rival == "linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy (2.13 has)")
    if rival == "compiled" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler: no g++ or clang++ on the PATH")


def _race(benchmark, challenger: str, inputs, rounds: int) -> None:
    """Time `challenger` in pytest-benchmark's rounds, with naive before each, so that a busy machine slows both.

    The first step of each is the correctness check, which must pass, and with rounds > 1 an untimed warm-up.
    """
    times: dict[str, list[float]] = {challenger: [], "naive": []}
    first_outcome: dict[str, list[torch.Tensor]] = {}

    def timed(name: str) -> None:
        start = time.perf_counter()
        loss = step(IMPLEMENTATIONS[name], inputs)
        times[name].append(time.perf_counter() - start)
        first_outcome.setdefault(name, [loss, *(x.grad for x in inputs[:2])])

    warm_up = int(rounds > 1)
    benchmark.pedantic(timed, args=(challenger,), setup=lambda: timed("naive"), rounds=rounds, warmup_rounds=warm_up)
    rtol = 1e-3 if inputs[0].dtype == torch.float32 else 2**-6
    for actual, expected in zip(first_outcome[challenger], first_outcome["naive"], strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))

    ours, naive = (times[name][warm_up:] for name in (challenger, "naive"))
    benchmark.extra_info["ratio_to_naive"] = round(median(ours) / median(naive), 3)
    benchmark.extra_info["ratio_to_naive_fastest"] = round(min(ours) / min(naive), 3)
    benchmark.extra_info["naive_seconds"] = round(median(naive), 3)


@pytest.mark.parametrize(("size", "dtype"), CASES)
@pytest.mark.benchmark(group="time: perce against the naive loss")
def test_perce_against_naive(benchmark, size, dtype):
    _race(benchmark, "perce", make_inputs(*size, getattr(torch, dtype)), rounds=3)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [CASES[0], *(pytest.param(*case.values, id=case.id, marks=pytest.mark.slow) for case in CASES[1:3])],
)
@pytest.mark.parametrize("rival", ["linear_cross_entropy", "compiled"])
@pytest.mark.benchmark(group="time: rivals against the naive loss")
def test_rival_against_naive(benchmark, rival, size, dtype):
    """Rivals are compared by their `ratio_to_naive`."""
    _skip_unless_available(rival)
    # One round of F.linear_cross_entropy takes some 10 s and is precise enough for a factor of 3 to 10.
    _race(benchmark, rival, make_inputs(*size, getattr(torch, dtype)), 1 if rival == "linear_cross_entropy" else 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.benchmark(group="memory: perce against the naive loss")
def test_peak_memory_is_a_quarter_of_naive(benchmark, dtype):
    peak = benchmark.pedantic(peak_extra_bytes, args=("perce", *MIDDLE, dtype), rounds=1)
    naive = peak_extra_bytes("naive", *MIDDLE, dtype)
    benchmark.extra_info["peak_extra_mib"] = round(peak / MIB)
    benchmark.extra_info["naive_peak_extra_mib"] = round(naive / MIB)
    benchmark.extra_info["memory_ratio_to_naive"] = round(peak / naive, 3)
    assert peak <= naive / 4


@pytest.mark.slow
@pytest.mark.parametrize("rival", ["linear_cross_entropy", "compiled"])
@pytest.mark.benchmark(group="memory: rivals")
def test_peak_memory_of_rival(benchmark, rival):
    _skip_unless_available(rival)
    peak = benchmark.pedantic(peak_extra_bytes, args=(rival, *MIDDLE, "float32"), rounds=1)
    benchmark.extra_info["peak_extra_mib"] = round(peak / MIB)


@pytest.mark.benchmark(group="memory: perce over N")
def test_peak_memory_is_flat_in_n(benchmark):
    d, v = 64, 49152
    sizes = (2048, 8192, 32768)
    peaks = benchmark.pedantic(lambda: [peak_extra_bytes("perce", n, d, v, "float32") for n in sizes], rounds=1)
    benchmark.extra_info["peak_extra_mib"] = {n: round(peak / MIB) for n, peak in zip(sizes, peaks, strict=True)}
    dhidden = (sizes[-1] - sizes[0]) * d * 4  # what must grow: the stored gradient and its scaled copy
    assert peaks[-1] - peaks[0] <= 2 * dhidden + 16 * MIB
