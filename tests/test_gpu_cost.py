"""What backend "triton" costs in products, memory and host syncs; its chunk sizes, and the table of tiles."""

import gc

import pytest
import torch

from tests.kernels import DEVICE, D, N, V, drop_cf, make_inputs, weights_of, with_source
from tests.numerics import IGNORE, beneath

pytest.importorskip("triton")
from perce_kernels.gpu import driver, tiles
from tests.driver import CHUNK, several_chunks, watching  # noqa: F401  fixtures

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
        out = driver.fused_perce_loss(*beneath(inputs, compact=compact, needed=needed))
    assert watch.flop == per_token * rows * D * V
    assert [gradient.numel() > 0 for gradient in out[-3:]] == list(needed)


@pytest.mark.parametrize("source", ["logp_cf", "token_weight"])
def test_without_a_counterfactual_pass_the_floor_is_six(watch, source):
    inputs = drop_cf(make_inputs(ignored=0.0))
    with watch:
        driver.fused_perce_loss(*beneath(inputs, weights=weights_of(source)))
    assert watch.flop == 6 * N * D * V


@pytest.mark.parametrize("compact", [True, False])
def test_token_logprobs_cost_one_product(watch, compact):
    inputs = make_inputs()
    rows = int((inputs.target != IGNORE).sum()) if compact else N
    with watch:
        driver.token_logprobs(beneath(inputs, compact=compact)[0], return_entropy=True)
    assert watch.flop == 2 * rows * D * V


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("source", ["hidden_cf", "token_weight"])
def test_host_syncs(watch, source, dtype):
    """One with compact=True, none without; what the interpreter looks at does not pass through the dispatcher."""
    inputs, weights = with_source(make_inputs(bias=True).to(dtype), source)
    with watch:
        driver.fused_perce_loss(*beneath(inputs, compact=False, weights=weights))
        driver.token_logprobs(beneath(inputs, compact=False)[0], return_entropy=True)
    assert watch.syncs == []
    with watch:
        driver.fused_perce_loss(*beneath(inputs, compact=True, weights=weights))
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
        out = driver.fused_perce_loss(*beneath(inputs, compact=compact, needed=needed, weights=weights))
    rows = int((inputs.target != IGNORE).sum()) if compact else n
    expected = driver.extra_bytes(
        rows, d, v, 4, chunk=CHUNK, passes=2 if source == "hidden_cf" else 1, gathered=rows < n, masked=not compact,
        needed=needed,
    )  # fmt: skip
    extra = watch.peak - sum(x.untyped_storage().nbytes() for x in out)
    assert expected - v * 4 * needed[2] <= extra <= expected + 40 * n
    assert n * v * 4 > 1.5 * extra, "an (N, V) tensor would not have passed"


# --- Chunk size ------------------------------------------------------------------------------------------------------

chunk_rows = driver.chunk_rows  # before the module's fixture replaces it


@pytest.mark.parametrize("v", [211, 49152, 128256, 151936, 262144])
@pytest.mark.parametrize("d", [576, 2304, 4096, 8192])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("sms", [1, 108, 132, 148])
def test_chunk_rows_keep_the_budget_and_fill_waves(v, d, passes, sms):
    for budget in (2**20, 2**28, 2**31):
        rows = chunk_rows(d, v, passes, sms, budget)
        bytes_of = passes * driver.pitch(v) * 4
        assert rows == 16 or rows * bytes_of <= budget
        if rows >= 128:
            assert rows % 128 == 0
            assert rows > budget / bytes_of / 2 - 256, "at least half of what the budget allows"


def test_chunk_rows_of_known_shapes():
    """By hand: D = 4096 is 16 column tiles, so 8 row tiles fill 128 of 132 multiprocessors and a 9th begins a wave."""
    budget = 2 * 4 * 128256 * 1500
    assert chunk_rows(4096, 128256, 2, 132, budget) == 1024
    assert chunk_rows(4096, 128256, 2, 128, budget) == 1024
    assert chunk_rows(4096, 128256, 2, 144, budget) == 1152
    assert chunk_rows(4096, 128256, 2, 1, budget) == 1408
    assert chunk_rows(4096, 2**30, 2, 132, 2**31) == 16


def test_the_default_budget_holds_enough_tokens_for_the_head_gradient():
    for v in (128256, 151936):
        assert chunk_rows(4096, v, 2, 132) >= 1024
    assert chunk_rows(2304, 262144, 2, 132) >= 750


def test_pitch():
    assert [driver.pitch(v) for v in (1, 64, 65, 128256, 50257)] == [64, 64, 128, 128256, 50304]


# --- Tiles -----------------------------------------------------------------------------------------------------------


def test_every_kernel_has_a_tile_on_every_architecture():
    for arch in (*tiles.SHARED_MEMORY_LIMIT, tiles.INTERPRETER):
        for kernel in ("row_loss", "shard_rows", "lse_gemm"):
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
