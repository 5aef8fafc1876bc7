"""The table of tiles."""

import pytest
import torch

pytest.importorskip("triton")
from perce_kernels.gpu import tiles


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
