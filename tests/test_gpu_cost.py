"""What backend "triton" costs in products, memory and host syncs; its chunk sizes, and the table of tiles."""

import gc
import itertools

import pytest
import torch

from tests.kernels import DEVICE, D, N, V, drop_cf, make_inputs, weights_of, with_source
from tests.numerics import IGNORE, beneath

pytest.importorskip("triton")
from benchmarks.gpu.sizes import SIZES
from perce_kernels.gpu import driver, tiles
from perce_kernels.gpu.cut import Cut, block_of, cut_of
from perce_kernels.gpu.product import pitch
from tests.driver import CUT, several_chunks, watching  # noqa: F401  fixtures

pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter_rounds", "several_chunks")
on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="looks at the CPU's products or errors")


# --- Cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needed", "per_token"),
    [((True, True, True), 8), ((True, False, False), 6), ((False, True, False), 6), ((False, False, False), 4),
     ((False, False, True), 4)],
    ids=["trainable", "frozen head", "frozen hidden", "statistics only", "bias only"],
)  # fmt: skip
@pytest.mark.parametrize("compact", [True, False])
def test_products_cost_the_floor_and_ignored_rows_nothing(watch, compact, needed, per_token):
    inputs = make_inputs(bias=True)
    rows = int((inputs.target != IGNORE).sum()) if compact else N
    with watch:
        out = driver.sweep(*beneath(inputs, compact=compact, needed=needed))
    assert watch.flop == per_token * rows * D * V
    assert [gradient.numel() > 0 for gradient in out[-3:]] == list(needed)


@pytest.mark.parametrize("source", ["logp_cf", "token_weight"])
def test_without_a_counterfactual_pass_the_floor_is_six(watch, source):
    inputs = drop_cf(make_inputs(ignored=0.0))
    with watch:
        driver.sweep(*beneath(inputs, weights=weights_of(source)))
    assert watch.flop == 6 * N * D * V


@pytest.mark.parametrize("compact", [True, False])
def test_token_logprobs_cost_one_product(watch, compact):
    inputs = make_inputs()
    rows = int((inputs.target != IGNORE).sum()) if compact else N
    with watch:
        driver.logprobs(beneath(inputs, compact=compact)[0], return_entropy=True)
    assert watch.flop == 2 * rows * D * V


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("source", ["hidden_cf", "token_weight"])
def test_host_syncs(watch, source, dtype):
    """One with compact=True, none without; what the interpreter looks at does not pass through the dispatcher."""
    inputs, weights = with_source(make_inputs(bias=True).to(dtype), source)
    with watch:
        driver.sweep(*beneath(inputs, compact=False, weights=weights))
        driver.logprobs(beneath(inputs, compact=False)[0], return_entropy=True)
    assert watch.syncs == []
    with watch:
        driver.sweep(*beneath(inputs, compact=True, weights=weights))
    assert watch.syncs == ["nonzero"]


@on_cpu
@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("source", ["hidden_cf", "token_weight"])
def test_peak_bytes_follow_the_formula(watch, source, compact, ignored, needed):
    n, d, v = 24, 32, 253
    inputs, weights = with_source(make_inputs(n, d, v, ignored=ignored, bias=True), source)
    gc.collect()
    with watch:
        out = driver.sweep(*beneath(inputs, compact=compact, needed=needed, weights=weights))
    rows = int((inputs.target != IGNORE).sum()) if compact else n
    expected = driver.extra_bytes(
        rows, d, v, 4, cut=CUT, way="fused", passes=2 if source == "hidden_cf" else 1, gathered=rows < n,
        masked=not compact, needed=needed,
    )  # fmt: skip
    extra = watch.peak - sum(x.untyped_storage().nbytes() for x in out)
    assert expected - v * 4 * needed[2] <= extra <= expected + 40 * n
    assert n * v * 4 > 1.5 * extra, "an (N, V) tensor would not have passed"


# --- Blocks and chunks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", [211, 49152, 128256, 151936, 262144])
@pytest.mark.parametrize("d", [576, 2304, 8192])
@pytest.mark.parametrize("way", ["fused", "stored"])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_a_cut_keeps_the_budget_and_uses_it(v, d, way, multiprocessors):
    for n, itemsize, budget in itertools.product((1, 1000, 4096, 32768, 10**6), (2, 4), (2**20, 2**28, 2**31)):
        cut = cut_of(n, d, v, itemsize, way, multiprocessors, budget)
        held = driver.extra_bytes(
            n, d, v, itemsize, cut=cut, way=way, passes=1, gathered=False, masked=False, needed=(True, True, False)
        )
        assert 1 <= cut.chunk <= cut.block
        if cut.block == 16:
            continue  # as few as there may be
        assert held <= budget * 1.001
        assert n <= cut.block or held > budget / 3, "the budget is there to be used"
        assert way == "fused" or cut.chunk == cut.block


def test_cuts_of_known_shapes():
    """The four sizes of the benchmarks. 4096 tokens of Llama-3's vocabulary: one block, which nothing is added to."""
    cuts = [cut_of(*size, 2, "fused", 132) for size in SIZES]
    assert cuts == [(4096, 2048), (4096, 1408), (2816, 640), (4736, 1664)]
    assert cut_of(100, 4096, 2**30, 2, "fused", 132) == (16, 16)
    assert cut_of(0, 64, 128, 2, "fused", 132).chunk >= 1


def test_the_head_gradient_is_read_and_written_half_as_often(monkeypatch, watch):
    """16384 tokens of Gemma-2's vocabulary at 2 GiB, in its proportions, tokens by 128 and the vocabulary by 1024."""
    size = next(size for size in SIZES if size.v == 262144)
    whole = cut_of(*size, 2, "fused", 132)
    assert whole.chunk >= 512, "reading W for fewer takes as long as multiplying it"
    n = size.n // 128
    monkeypatch.setattr(driver, "cut_of", lambda *_: Cut(whole.block // 128, whole.chunk // 128))
    inputs = make_inputs(n, D, size.v // 1024, ignored=0.0)
    with watch:
        driver.sweep(*beneath(inputs, weights={}))
    read_or_written = sum(1 + product.added for product in watch.products if product.m == size.v // 1024)
    before = 2 * (size.n // 1024) - 1  # chunks of 1024, each of which was added
    assert read_or_written <= 0.55 * before


def test_blocks_are_as_square_as_the_buffer_allows():
    assert block_of(4096, 128256, 2048 * 128256) == (4096, 64128)
    assert block_of(4736, 128256, 1664 * 128256) == (4736, 42752)
    assert block_of(10**6, 262144, 2**27) == (2**15, 4096), "no columns fewer than make a product worth it"
    assert block_of(100, 211, 256 * 30) == (30, 256) and block_of(20, 211, 256 * 10) == (10, 256)
    assert block_of(3, 0, 64) == (1, 64) and block_of(3, 0, 192) == (3, 64)
    for n, v, elements in ((1, 1, 64), (14, 33, 7 * 64), (7, 211, 256), (5000, 50257, 2**20)):
        rows, columns = block_of(n, v, elements)
        assert 1 <= rows <= n and columns % 64 == 0 and rows * columns <= elements


def test_pitch():
    assert [pitch(v) for v in (0, 1, 64, 65, 128256, 50257)] == [64, 64, 64, 128, 128256, 50304]


# --- Tiles -----------------------------------------------------------------------------------------------------------


def test_every_kernel_has_a_tile_on_every_architecture():
    for arch in (*tiles.SHARED_MEMORY_LIMIT, tiles.INTERPRETER):
        for kernel in ("row_loss", "row_halves", "lse_gemm"):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for d in (1, 256, 257, 8192):
                    tile = tiles.find(kernel, arch, dtype, d)
                    assert tile.block_n & (tile.block_n - 1) == 0
    with pytest.raises(ValueError, match=r"backend.*float64"):
        tiles.find("row_loss", "sm_90", torch.float64, 64)


def test_a_row_of_the_table_may_be_for_a_range_of_d(monkeypatch):
    small, large = tiles.Tile(64, 64, 64, 4, 2), tiles.Tile(128, 128, 64, 8, 3)
    table = [tiles.Row("lse_gemm", "sm_90", tiles.HALF, d, tile) for d, tile in ((256, small), (None, large))]
    monkeypatch.setattr(tiles, "TABLE", table)
    assert [tiles.find("lse_gemm", "sm_90", torch.bfloat16, d) for d in (8, 256, 257)] == [small, small, large]


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_80"), ((8, 9), "sm_86"), ((9, 0), "sm_90"), ((10, 0), "sm_100"),
     ((10, 3), "sm_100"), ((12, 0), "sm_86"), ((12, 1), "sm_86")],
)  # fmt: skip
def test_architecture(monkeypatch, capability, arch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert tiles.architecture(torch.device("cuda")) == arch
    assert tiles.is_supported(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert not tiles.is_supported(torch.device("cuda"))
