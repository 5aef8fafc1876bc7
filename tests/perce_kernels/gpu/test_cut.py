"""How many tokens a block and a chunk have."""

import itertools

import pytest

pytest.importorskip("triton")
from benchmarks.gpu.sizes import SIZES
from perce_kernels.gpu import cut, driver
from perce_kernels.gpu.cut import block_of, cut_of


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
            continue  # already the minimum
        assert held <= budget * 1.001
        assert n <= cut.block or held > budget / 3, "most of the budget is used"
        assert way == "fused" or cut.chunk == cut.block


def test_cuts_of_known_shapes():
    """The four sizes of the benchmarks. 4096 tokens with Llama-3's vocabulary are one block, so dW is never added."""
    cuts = [cut_of(*size, 2, "fused", 132) for size in SIZES]
    assert cuts == [(4096, 2048), (4096, 1408), (2816, 640), (4736, 1664)]
    assert cut_of(100, 4096, 2**30, 2, "fused", 132) == (16, 16)
    assert cut_of(0, 64, 128, 2, "fused", 132).chunk >= 1


def test_the_budget_is_read_at_each_call(monkeypatch):
    before = cut_of(4096, 64, 32000, 2, "fused", 132)
    monkeypatch.setattr(cut, "BUDGET", cut.BUDGET // 64)
    assert cut_of(4096, 64, 32000, 2, "fused", 132).block < before.block


def test_blocks_are_as_square_as_the_buffer_allows():
    assert block_of(4096, 128256, 2048 * 128256) == (4096, 64128)
    assert block_of(4736, 128256, 1664 * 128256) == (4736, 42752)
    assert block_of(10**6, 262144, 2**27) == (2**15, 4096), "a product needs a minimum of columns to be efficient"
    assert block_of(100, 211, 256 * 30) == (30, 256) and block_of(20, 211, 256 * 10) == (10, 256)
    assert block_of(3, 0, 64) == (1, 64) and block_of(3, 0, 192) == (3, 64)
    for n, v, elements in ((1, 1, 64), (14, 33, 7 * 64), (7, 211, 256), (5000, 50257, 2**20)):
        rows, columns = block_of(n, v, elements)
        assert 1 <= rows <= n and columns % 64 == 0 and rows * columns <= elements
