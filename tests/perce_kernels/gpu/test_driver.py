"""The cost of backend "triton" in products, memory and host syncs, for each way."""

import gc

import pytest
import torch

from tests.helpers.device import DEVICE
from tests.helpers.numerics import IGNORE, beneath

pytest.importorskip("triton")
from benchmarks.gpu.sizes import SIZES
from perce_kernels import chunked
from perce_kernels.gpu import driver
from perce_kernels.gpu.cut import Cut, cut_of
from tests.helpers.driver import CUT, watching  # noqa: F401  fixtures
from tests.helpers.subjects import TRITON, of_each
from tests.helpers.watch import NEEDED_AND_COST

D, N, V = TRITON.d, TRITON.n, TRITON.v
pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter_rounds", "several_chunks")


def test_the_usual_inputs_take_several_blocks_and_chunks():
    inputs = TRITON.inputs()
    valid = inputs.target != IGNORE
    assert CUT.block < int(valid.sum()) < N, "gathered rows, several blocks"
    for rows in (N, int(valid.sum()), CUT.block):
        assert rows % CUT.chunk or rows % CUT.block, "the last block or chunk is not full"


def test_fp64_is_the_chunked_backend():
    inputs = TRITON.inputs(dtype=torch.float64, bias=True)
    ours, theirs = (backend.sweep(*beneath(inputs)) for backend in (driver, chunked))
    assert all(torch.equal(a, b) and a.dtype == torch.float64 for a, b in zip(ours, theirs, strict=True))
    assert TRITON.call(inputs, reduction="none").loss.dtype == torch.float64


on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="looks at the CPU's products or errors")


@NEEDED_AND_COST
@of_each(
    "compact",
    *(("triton", True), ("stored", False)),
    slow=[("triton", False), ("fused", True), ("fused", False), ("stored", True)],
)
def test_products_cost_the_floor_and_ignored_rows_nothing(subject, watch, compact, needed, per_token):
    inputs = subject.inputs(bias=True)
    rows = int((inputs.target != IGNORE).sum()) if compact else subject.n
    with watch:
        out = driver.sweep(*beneath(inputs, compact=compact, needed=needed))
    column_sums = 2 * rows * subject.v * needed[2]
    assert watch.flop == per_token * rows * subject.d * subject.v + column_sums
    assert watch.syncs == (["nonzero"] if compact else [])
    assert [gradient.numel() > 0 for gradient in out[-3:]] == list(needed)


@pytest.mark.parametrize("source", ["logp_cf", "token_weight"])
def test_without_a_counterfactual_pass_the_floor_is_six(watch, source):
    inputs, weights = TRITON.with_source(TRITON.inputs(ignored=0.0), source)
    with watch:
        driver.sweep(*beneath(inputs, weights=weights))
    assert watch.flop == 6 * N * D * V + 2 * N * V, "the last term is dbias"


@pytest.mark.parametrize("compact", [True, False])
def test_token_logprobs_cost_one_product(watch, compact):
    inputs = TRITON.inputs()
    rows = int((inputs.target != IGNORE).sum()) if compact else N
    with watch:
        driver.logprobs(beneath(inputs, compact=compact)[0], return_entropy=True)
    assert watch.flop == 2 * rows * D * V


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("source", ["hidden_cf", "token_weight"])
def test_host_syncs(watch, source, dtype):
    """One with compact=True, none without; reads by the interpreter do not pass through the dispatcher."""
    inputs, weights = TRITON.with_source(TRITON.inputs(bias=True).to(dtype), source)
    with watch:
        driver.sweep(*beneath(inputs, compact=False, weights=weights))
        driver.logprobs(beneath(inputs, compact=False)[0], return_entropy=True)
    assert watch.syncs == []
    with watch:
        driver.sweep(*beneath(inputs, compact=True, weights=weights))
    assert watch.syncs == ["nonzero"]


@on_cpu
@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
@pytest.mark.parametrize(
    ("compact", "ignored"),
    [
        (True, 0.3),
        (False, 0.3),
        pytest.param(True, 0.0, marks=pytest.mark.slow),
        pytest.param(False, 0.0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("source", ["hidden_cf", "token_weight"])
def test_peak_bytes_follow_the_formula(watch, source, compact, ignored, needed):
    n, d, v = 24, 32, 253
    inputs, weights = TRITON.with_source(TRITON.inputs(n, d, v, ignored=ignored, bias=True), source)
    gc.collect()
    with watch:
        out = driver.sweep(*beneath(inputs, compact=compact, needed=needed, weights=weights))
    rows = int((inputs.target != IGNORE).sum()) if compact else n
    expected = driver.extra_bytes(
        rows, d, v, 4, cut=CUT, way="fused", passes=2 if source == "hidden_cf" else 1, gathered=rows < n,
        masked=not compact, needed=needed,
    )  # fmt: skip
    extra = watch.peak - sum(x.untyped_storage().nbytes() for x in out)
    assert expected <= extra <= expected + 40 * n
    assert n * v * 4 > 1.5 * extra, "an (N, V) tensor would exceed the limit"


def test_the_head_gradient_is_read_and_written_half_as_often(monkeypatch, watch):
    """16384 tokens with Gemma-2's vocabulary at 2 GiB, scaled down: tokens by 128 and the vocabulary by 1024."""
    size = next(size for size in SIZES if size.v == 262144)
    whole = cut_of(*size, 2, "fused", 132)
    assert whole.chunk >= 512, "with fewer tokens, reading W takes as long as multiplying it"
    n = size.n // 128
    monkeypatch.setattr(driver, "cut_of", lambda *_: Cut(whole.block // 128, whole.chunk // 128))
    inputs = TRITON.inputs(n, D, size.v // 1024, ignored=0.0)
    with watch:
        driver.sweep(*beneath(inputs, weights={}))
    read_or_written = sum(1 + product.added for product in watch.products if product.m == size.v // 1024)
    before = 2 * (size.n // 1024) - 1  # with chunks of 1024, all but the first were added
    assert read_or_written <= 0.55 * before
