"""Every kernel at every shipped tile, through the compilers for absent GPUs (tests/helpers/aot.py in a process).

The quick tests compile what "auto" launches. The whole table, with candidates for "auto" and each dtype, is slow.
"""

import functools
import json
import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

pytest.importorskip("triton")
from perce_kernels.gpu import tiles

QUICK = ("sm_80", "sm_90", "sm_100", "gfx942")
NVIDIA = ("sm_80", "sm_86", "sm_90", "sm_100")
ROWS = ("row_loss", "row_halves", "stored_rows")
COMPILED = {"rows": ("row_loss", "row_halves")}  # kernels of one group of the table
GEMMS = ("lse_gemm", "store_gemm")


def aot_module():
    from tests.helpers import aot  # not at the top, because it asks Triton for its compilers

    return aot


def aot(*arguments: str) -> list[str]:
    """The lines that tests.helpers.aot prints. The interpreter must be off there, and this process has it on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"  # as from Triton 3.10 on
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.aot", *arguments], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.splitlines()


@functools.cache
def compiled(arch: str, whole: bool) -> list[dict]:
    """What the compilers report; `QUICK` in one process."""
    lines = aot("--json", arch) if whole else quick()
    return [result for result in map(json.loads, lines) if result["arch"] == arch]


@functools.cache
def quick() -> list[str]:
    return aot("--json", "--quick", *QUICK)


def of_each(*archs: str):
    """Parametrises `built`, the results of an architecture."""
    cases = [pytest.param((arch, False), id=arch) for arch in archs if arch in QUICK]
    whole = [pytest.param((arch, True), id=f"{arch}, whole table", marks=pytest.mark.slow) for arch in archs]
    return pytest.mark.parametrize("built", cases + whole, indirect=True)


@pytest.fixture
def built(request) -> list[dict]:
    return compiled(*request.param)


@of_each(*NVIDIA, "gfx942")
def test_every_tile_was_compiled(built, request):
    arch, whole = request.node.callspec.params["built"]
    candidates = set() if whole or tiles.WAY[arch] == "stored" else {"store_gemm", "stored_rows"}
    for row in tiles.TABLE:
        if row.arch == arch and row.kernel not in candidates:
            for kernel in COMPILED.get(row.kernel, [row.kernel]):
                found = [r for r in built if (r["kernel"], tiles.Tile(*r["tile"])) == (kernel, row.tile)]
                assert len(found) >= 2, row
    assert {r["kernel"] for r in built} == {*ROWS, *GEMMS, "combine", "scale"} - candidates


@of_each(*NVIDIA)
def test_no_spills_and_shared_memory_within_the_limit(built):
    for result in built:
        limit = tiles.SHARED_MEMORY_LIMIT[result["arch"]]
        assert "error" not in result, result
        assert result["spilled"] == 0, result
        assert result["shared"] <= limit, result
        if result["kernel"] in ROWS:
            threads = 32 * result["tile"][3]
            assert 2 * threads * result["registers"] <= 65536, f"fewer than two programs a multiprocessor: {result}"
            assert result["shared"] < limit / 2 or "bias" in result["variant"], result


MATRIX = {"sm_80": "mma.sync", "sm_86": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


@of_each(*NVIDIA)
def test_the_gemm_uses_the_matrix_units_and_the_copy_engine(built):
    gemms = [r for r in built if r["kernel"] in GEMMS and not r["variant"].startswith("fp32")]
    assert "lse_gemm" in {r["kernel"] for r in gemms}
    for result in gemms:
        assert MATRIX[result["arch"]] in result["instructions"], result
        assert ("cp.async.bulk.tensor" in result["instructions"]) == ("TMA" in result["variant"]), result


@of_each("sm_90")
def test_the_machine_code_of_the_gemm_has_them_too(built):
    """Hopper's own: HGMMA, operands by UTMALDG, and stored logits by UTMASTG."""
    for result in built:
        if result["kernel"] in GEMMS and not result["variant"].startswith("fp32"):
            expected = {"HGMMA"}
            if "TMA" in result["variant"]:
                expected |= {"UTMALDG"} | ({"UTMASTG"} if result["kernel"] == "store_gemm" else set())
            assert expected <= set(result["machine"]), result


@of_each(*NVIDIA)
def test_references_are_rounded_before_they_are_subtracted(built):
    """If a compiler fuses a product with a difference, two references of one maximum differ: by 2⁻⁷ at 65536."""
    plain = [r for r in built if r["kernel"] in GEMMS or r["variant"].startswith("parts")]
    for result in plain:
        assert result["contracted"] == [], result


def test_contracted_products_are_found():
    log2e = "0f3FB8AA3B"
    right = (
        f"fma.rn.f32 %r1, %a, {log2e}, 0f00000000; fma.rn.f32 %r2, %b, {log2e}, 0f00000000; sub.f32 %r3, %r1, %r2;"
        f"neg.f32 %r4, %r2; fma.rn.f32 %r5, %z, {log2e}, %r4; fma.rn.f32 %r6, %b, {log2e}, %r4;"
    )
    assert aot_module().contracted(right) == []
    product, fused = "mul.f32 %r1, %b, 0fBFB8AA3B;", f"fma.rn.f32 %r2, %a, {log2e}, %r1;"
    assert aot_module().contracted(product + fused) == [product]
    assert aot_module().contracted(right + f"fma.rn.f32 %r7, %a, {log2e}, %r4;") == [
        f"fma.rn.f32 %r7, %a, {log2e}, %r4;"
    ]


LOOPS = {  # instructions and barriers of a thread for a step: 8 logits of sweep 1 and of stored ones, 16 of a gradient
    ("row_loss", "bf16, plain"): [(90, 2), (96, 0)],
    ("row_halves", "parts, plain"): [(90, 2)],
    ("row_halves", "gradient, bf16, plain"): [(104, 0)],
    ("stored_rows", "bf16, plain"): [(90, 2)],
}


@of_each("sm_80", "sm_90")
def test_the_loops_over_a_row_have_few_instructions(built):
    """Counted by the disassembler; with masks everywhere, 8 logits took 166 and 145, with 3 barriers and 1."""
    found = {(r["kernel"], r["variant"]): r.get("loops") for r in built}
    for key, most in LOOPS.items():
        if key[0] not in {kernel for kernel, _ in found}:
            continue  # a candidate
        loops = found[key][-len(most) :]  # the loop of an ignored row comes before them
        assert [barriers for _, barriers in loops] == [barriers for _, barriers in most], (key, loops)
        assert all(count <= limit for (count, _), (limit, _) in zip(loops, most, strict=True)), (key, loops)


def test_a_loop_is_not_a_wait_nor_code_that_was_moved_away():
    def line(address: int, instruction: str) -> str:
        return f"        /*{address:04x}*/                   {instruction} ;  /* 0x000 */\n"

    def body(start: int, count: int) -> str:
        return "".join(line(start + 16 * i, "BAR.SYNC.DEFER_BLOCKING 0x0" if i == 3 else "FADD R1, R2, R3")
                       for i in range(count))  # fmt: skip

    inner = body(0x100, 20) + line(0x240, "@P0 BRA 0x100")
    wait = line(0x250, "SYNCS R1") + line(0x260, "@!P1 BRA 0x250")
    outer = line(0x270, "@P0 BRA 0x0")
    moved = line(0x280, "@P2 EXIT") + body(0x290, 20) + line(0x3D0, "BRA 0x250")
    assert aot_module().loops(body(0, 16) + inner + wait + outer + moved) == [(21, 1)]


@of_each(*NVIDIA)
def test_the_gemm_in_fp32_keeps_ieee_products(built):
    for result in built:
        if result["kernel"] == "lse_gemm" and result["variant"].startswith("fp32"):
            assert not {"mma.sync", "wgmma.mma_async", "tcgen05.mma"} & set(result["instructions"]), result


@of_each(*NVIDIA)
def test_the_row_kernels_copy_ahead_but_for_the_gradient(built):
    """The gradient marks what it reads for eviction, which asynchronous copies cannot; its target's entry waits."""
    for result in (r for r in built if r["kernel"] in ROWS):
        gradient = result["variant"].startswith("gradient")
        assert ("cp.async.cg" in result["instructions"]) != gradient, result
        marks = result["kernel"] != "stored_rows" and not result["variant"].startswith(("parts", "bf16, statistics"))
        assert {"bar.sync"} | ({"ld.global.L1::evict_first"} if marks else set()) <= set(result["instructions"]), result


@of_each("gfx942")
def test_amd(built):
    """Informational: no AMD GPU has run this."""
    failed = [r for r in built if "error" in r]
    if failed:
        pytest.skip(f"this Triton cannot build {len(failed)} kernels for gfx942, such as {failed[0]}")
    for result in built:
        assert result["spilled"] == 0 and result["shared"] <= tiles.SHARED_MEMORY_LIMIT["gfx942"], result


def test_what_the_launchers_pass_compiles():
    """Specialised as Triton does it: sizes of 1, absent tensors, descriptors, a 64-bit ignore_index."""
    lines = [line.split() for line in aot("--launchers")]
    assert {fused for _, _, fused in lines} == {"fused"}, "whatever Triton's default is"
    built = [name for name, *_ in lines]
    # Per shape: the loss by cuBLAS (one of three has a counterfactual pass), sharded, storing (each has one); and three
    # calls of token_logprobs. Counterfactual passes and results of our GEMM are combined.
    assert built.count("row_loss_kernel") == 3 * 3
    assert built.count("row_parts_kernel") == 3 * (1 + 2) and built.count("row_gradient_kernel") == 3
    assert built.count("stored_gradient_kernel") == built.count("scale_kernel") == 3
    assert built.count("lse_gemm_kernel") == 3 * (2 + 3)
    assert built.count("combine_kernel") == 3 * (1 + 1 + 2 + 3)
