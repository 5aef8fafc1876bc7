"""The table of tiles."""

import itertools

import pytest
import torch

pytest.importorskip("triton")
from perce_kernels import backends
from perce_kernels.gpu import tiles


def test_every_kernel_has_a_tile_on_every_architecture():
    dtypes = {
        "rows": tiles.FULL,
        "lse_gemm": tiles.HALF + tiles.FULL,
        "store_gemm": tiles.HALF,
        "stored_rows": tiles.HALF,
    }
    for arch, kernel in itertools.product((*tiles.SHARED_MEMORY_LIMIT, tiles.INTERPRETER), dtypes):
        for dtype in dtypes[kernel]:
            tile = tiles.find(kernel, arch, dtype)
            assert tile.block_n & (tile.block_n - 1) == 0
    with pytest.raises(ValueError, match=r"backend.*float64"):
        tiles.find("rows", "sm_90", torch.float64)


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


def test_an_amd_gpu_runs_the_kernels_only_if_they_are_named(monkeypatch):
    """None has run them yet."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert tiles.architecture(torch.device("cuda")) == "gfx942"
    monkeypatch.setattr(backends, "TRITON_FOUND", True)
    assert backends.chosen("auto", torch.device("cuda")) == (
        "torch", 'the Triton kernels have run on no AMD GPU yet; backend "triton" tries them'
    )  # fmt: skip
    assert backends.chosen("triton", torch.device("cuda"))[0] == "triton"
