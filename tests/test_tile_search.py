"""The search for block sizes, in Triton's interpreter with a tiny grid."""

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import tile_search
from benchmarks.gpu import clock
from perce_kernels.gpu import lse_gemm, tiles

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="searches the interpreter's tiny grid")


@on_cpu
@pytest.mark.parametrize("kernel", sorted(tile_search.SUBJECTS))
def test_tile_search_prints_a_row_of_the_table(kernel, monkeypatch, capsys):
    monkeypatch.setattr(tile_search, "ROUNDS", 1)
    dtype = "bfloat16" if kernel.startswith("store") else "float32"
    tile_search.main([kernel, "4", "16", "65", "--dtype", dtype, "--show", "2"])
    *listed, row = capsys.readouterr().out.splitlines()
    assert len(listed) == 3 and "0 that do not compile" in listed[0]
    code, comment = row.split("#")
    found = eval(code.strip().rstrip(","), vars(tiles))
    assert found.kernel == kernel and found.arch == tiles.INTERPRETER and found.tile.block_n in (32, 64, 128)
    assert found.d_max == (None if kernel in tile_search.ROW_KERNELS else 16)
    assert found.in_use == (kernel != "store_gemm"), "found to be right, not to be the way to go"
    assert "at 4 × 16 × 65" in comment


@on_cpu
def test_tile_search_passes_over_what_is_wrong_or_breaks(monkeypatch):
    right, said = tiles.find("lse_gemm", tiles.INTERPRETER, torch.float32, 16), []
    wrong, broken = right._replace(block_m=16), right._replace(block_m=8)
    launch = lse_gemm.logprobs

    def logprobs(*args, **options):
        tile = tiles.lookup("lse_gemm", args[0], 16)
        if tile == broken:
            raise RuntimeError("out of resources")
        logp, entropy = launch(*args, **options)
        return logp + (tile == wrong), entropy

    monkeypatch.setattr(lse_gemm, "logprobs", logprobs)
    monkeypatch.setattr(tile_search, "candidates", lambda *_: [wrong, broken, right])
    monkeypatch.setattr(tile_search, "ROUNDS", 2)
    found = tile_search.search("lse_gemm", 4, 16, 65, torch.float32, "cpu", budget=60, say=said.append)
    assert [timed.tile for timed in found] == [right]
    assert any("is wrong" in line for line in said) and "1 tiles right, 1 that" in said[-1]
    monkeypatch.setattr(clock.HostClock, "is_alive", lambda _: False)
    monkeypatch.setattr(tile_search, "candidates", lambda *_: [broken])
    tile_search.search("lse_gemm", 4, 16, 65, torch.float32, "cpu", budget=60, say=said.append)
    assert any("lost the device" in line for line in said)
    tile_search.search("lse_gemm", 4, 16, 65, torch.float32, "cpu", budget=-1, say=said.append)
    assert any("out of time" in line for line in said)


@pytest.mark.parametrize("arch", sorted(tiles.SHARED_MEMORY_LIMIT))
@pytest.mark.parametrize("kernel", sorted(tile_search.SUBJECTS))
def test_tile_candidates_fit_and_hold_the_shipped_one(arch, kernel):
    for dtype in (torch.bfloat16, torch.float32):
        found = tile_search.candidates(kernel, arch, dtype)
        assert 20 < len(found) == len(set(found))
        assert all((t.block_m + t.block_n) * t.block_k * dtype.itemsize <= 232448 for t in found)
    shipped = tiles.find(kernel, arch, torch.bfloat16, 4096)
    assert shipped in tile_search.candidates(kernel, arch, torch.bfloat16)


@on_cpu
def test_tile_search_needs_triton(monkeypatch):
    monkeypatch.setattr(tile_search.ops, "TRITON_INTERPRETED", False)
    with pytest.raises(SystemExit, match="expected a CUDA or ROCm device"):
        tile_search.main(["row_loss", "4", "16", "65"])


@on_cpu
def test_logits_are_kept_in_sixteen_bits_only():
    with pytest.raises(SystemExit, match="expected --dtype bfloat16 or float16"):
        tile_search.main(["stored_rows", "4", "16", "65", "--dtype", "float32"])
