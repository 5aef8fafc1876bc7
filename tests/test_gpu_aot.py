"""Every kernel at every shipped tile, through the compilers for GPUs that are not here (tests/aot.py in a process)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from perce_kernels.gpu import tiles

NVIDIA = ("sm_80", "sm_86", "sm_90", "sm_100")
ROWS = ("row_loss", "shard_rows", "stored_rows")
GEMMS = ("lse_gemm", "store_gemm")


def aot(option: str) -> list[str]:
    """The lines that tests.aot prints. The interpreter must be off there, and this process has it on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.aot", option], cwd=Path(__file__).parents[1], env=environment,
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[dict]]:
    """What the compilers report, by architecture."""
    results: dict[str, list[dict]] = {}
    for line in aot("--json"):
        result = json.loads(line)
        results.setdefault(result["arch"], []).append(result)
    return results


def test_every_tile_of_the_table_was_compiled(compiled):
    for row in tiles.TABLE:
        if row.arch != tiles.INTERPRETER:
            built = [r for r in compiled[row.arch] if r["kernel"] == row.kernel and tiles.Tile(*r["tile"]) == row.tile]
            assert len(built) >= 2, row
    for arch, results in compiled.items():
        assert {r["kernel"] for r in results} == {row.kernel for row in tiles.TABLE} | {"combine"}, arch


@pytest.mark.parametrize("arch", NVIDIA)
def test_no_spills_and_shared_memory_within_the_limit(compiled, arch):
    for result in compiled[arch]:
        assert "error" not in result, result
        assert result["spilled"] == 0, result
        assert result["shared"] <= tiles.SHARED_MEMORY_LIMIT[arch], result
        if result["kernel"] in ROWS:
            assert result["registers"] <= 128, f"fewer than two programs a multiprocessor: {result}"


@pytest.mark.parametrize(
    ("arch", "matrix"),
    [("sm_80", "mma.sync"), ("sm_86", "mma.sync"), ("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma")],
)
def test_the_gemm_uses_the_matrix_units_and_the_copy_engine(compiled, arch, matrix):
    gemms = [r for r in compiled[arch] if r["kernel"] in GEMMS and not r["variant"].startswith("fp32")]
    assert {r["kernel"] for r in gemms} == set(GEMMS)
    for result in gemms:
        assert matrix in result["instructions"], result
        assert ("cp.async.bulk.tensor" in result["instructions"]) == ("TMA" in result["variant"]), result


def test_the_gemm_in_fp32_keeps_ieee_products(compiled):
    for arch in NVIDIA:
        for result in compiled[arch]:
            if result["kernel"] == "lse_gemm" and result["variant"].startswith("fp32"):
                assert not {"mma.sync", "wgmma.mma_async", "tcgen05.mma"} & set(result["instructions"]), result


@pytest.mark.parametrize("arch", NVIDIA)
def test_the_row_kernel_copies_ahead_and_synchronises_its_overlay(compiled, arch):
    for result in (r for r in compiled[arch] if r["kernel"] in ROWS):
        expected = {"bar.sync"} if result["variant"].startswith("gradient") else {"cp.async.cg", "bar.sync"}
        assert expected <= set(result["instructions"]), result


def test_amd(compiled):
    """Informational: no AMD GPU has run this."""
    failed = [r for r in compiled["gfx942"] if "error" in r]
    if failed:
        pytest.skip(f"this Triton cannot build {len(failed)} kernels for gfx942, such as {failed[0]}")
    for result in compiled["gfx942"]:
        assert result["spilled"] == 0 and result["shared"] <= tiles.SHARED_MEMORY_LIMIT["gfx942"], result


def test_what_the_launchers_pass_compiles():
    """Specialised as Triton does it: sizes of 1, absent tensors, descriptors, a 64-bit ignore_index."""
    built = [line.split()[0] for line in aot("--launchers")]
    # Per shape: three calls of the loss by the row kernel, one sharded, one storing; three of token_logprobs, each a
    # product and a combination, as the one that stores has.
    assert built.count("row_loss_kernel") == 3 * 3
    assert built.count("row_parts_kernel") == built.count("row_gradient_kernel") == 3
    assert built.count("stored_gradient_kernel") == 3
    assert built.count("lse_gemm_kernel") == built.count("combine_kernel") == 3 * 4
