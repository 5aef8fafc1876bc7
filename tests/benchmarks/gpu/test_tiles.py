"""The named tiles of each kernel, in Triton's interpreter with two tiny ones."""

from functools import partialmethod

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.gpu import clock
from benchmarks.gpu import tiles as tile_search
from benchmarks.gpu.child import Child, Request
from benchmarks.gpu.sizes import TINY
from perce_kernels.gpu import lse_gemm, tiles

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="times the interpreter's tiny tiles")


@on_cpu
@pytest.mark.parametrize("kernel", sorted(tile_search.SUBJECTS))
def test_the_command_prints_a_row_of_the_table(kernel, capsys, monkeypatch):
    monkeypatch.setattr(tile_search.Contest, "measure", partialmethod(tile_search.Contest.measure, rounds=1))
    tile_search.main([kernel, "4", "16", "65"])
    *listed, row = capsys.readouterr().out.splitlines()
    assert len(listed) in (2, 3) and all(" of the tile in use" in line for line in listed)
    code, comment = row.split("#")
    found = eval(code.strip().rstrip(","), vars(tiles))
    assert (
        found.kernel == tile_search.TABLED.get(kernel, kernel)
        and found.arch == tiles.INTERPRETER
        and found.tile.block_n in (32, 64, 128)
    )
    assert "at 4x16x65" in comment


def said_by(kernel: str, **request) -> dict[str, dict]:
    lines: dict[str, dict] = {}

    def say(event):
        if "line" in event:
            lines[event.pop("line")] = event

    options = {"kernels": [kernel], "sizes": 1}
    tile_search.stage(Child(Request("tiles", 60.0, "cpu", options=options, **request), say))
    return lines


@on_cpu
def test_a_tile_that_is_wrong_or_breaks_is_a_line_with_the_reason(monkeypatch):
    shipped, wrong, broken = tile_search.candidates("lse_gemm", tiles.INTERPRETER, torch.bfloat16)
    launch = lse_gemm.logprobs

    def logprobs(*args, **options):
        tile = tiles.lookup("lse_gemm", args[0])
        if tile == broken:
            raise RuntimeError("out of resources")
        logp, *rest = launch(*args, **options)
        return logp + (tile == wrong), *rest

    monkeypatch.setattr(lse_gemm, "logprobs", logprobs)
    lines = said_by("lse_gemm")
    place = f"tiles/lse_gemm/{TINY[0]}"
    assert lines[f"{place}/{tile_search.named(shipped)}"].keys() == {"seconds", "ratio"}
    assert "wrong, by 1e+04 times" in lines[f"{place}/{tile_search.named(wrong)}"]["reason"]
    assert lines[f"{place}/{tile_search.named(broken)}"]["reason"] == "RuntimeError: out of resources"
    assert said_by("lse_gemm", finished=list(lines)) == {}
    monkeypatch.setattr(clock.HostClock, "is_alive", lambda _: False)
    with pytest.raises(SystemExit, match="the device is lost"):
        tile_search.main(["lse_gemm", "4", "16", "65"])
    monkeypatch.setattr(clock.HostClock, "is_alive", lambda _: True)
    monkeypatch.setattr(tile_search, "candidates", lambda *_: (broken, wrong))
    monkeypatch.setattr(tiles, "TABLE", [tiles.Row("lse_gemm", tiles.INTERPRETER, tiles.HALF, broken)])
    found = said_by("lse_gemm")
    assert [line["reason"] for line in found.values() if "reason" in line] == ["RuntimeError: out of resources"]
    assert list(found) == [f"{place}/operands"], "a shipped tile that fails is a line of its own"
    assert said_by("lse_gemm", lost={f"{place}/operands": "it crashed"}) == {}


@pytest.mark.parametrize("arch", sorted(tiles.SHARED_MEMORY_LIMIT))
@pytest.mark.parametrize("kernel", sorted(tile_search.SUBJECTS))
def test_about_ten_named_tiles_the_shipped_one_first(arch, kernel):
    found = tile_search.candidates(kernel, arch, torch.bfloat16)
    names = [tile_search.named(tile) for tile in found]
    assert 10 <= len(found) == len(set(names)) <= 12
    dtype = torch.float32 if kernel in tile_search.FP32_ROWS else torch.bfloat16
    assert found[0] == tiles.find(tile_search.TABLED.get(kernel, kernel), arch, dtype)
    if kernel not in tile_search.ROW_KERNELS:
        assert {tile.group_m for tile in found} == {8, 16, 32}
        assert len({tile.use_tma for tile in found}) == 1


def test_the_tiles_that_are_to_be_tried_on_sm_90_fit_its_shared_memory():
    for kernel in ("lse_gemm", "store_gemm"):
        for tile in tile_search.candidates(kernel, "sm_90", torch.bfloat16):
            operands = (tile.block_m + tile.block_n) * tile.block_k * 2 * tile.num_stages
            assert operands <= tiles.SHARED_MEMORY_LIMIT["sm_90"], tile_search.named(tile)


@on_cpu
def test_the_command_needs_triton(monkeypatch):
    monkeypatch.setattr(tile_search.backends, "TRITON_INTERPRETED", False)
    with pytest.raises(SystemExit, match="expected a CUDA or ROCm device"):
        tile_search.main(["row_loss", "4", "16", "65"])
