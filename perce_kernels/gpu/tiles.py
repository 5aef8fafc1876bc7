"""Block sizes of the kernels: one table, looked up by kernel, architecture and dtype. Nothing is tuned at import.

The values are chosen by the compiler's report (no spills, shared memory within the limit; test_aot.py checks both for
every row), not by time. A comment marks each row that was measured on a GPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

INTERPRETER = "interpreter"

SHARED_MEMORY_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
"""Bytes of shared memory that one thread block may use."""


STATISTICS_COLUMNS = 128
"""The most columns for which the GEMM keeps one maximum and one sum per row."""

FP_FUSION = True
"""Launch option of every kernel: a product and its sum may be rounded once. From Triton 3.10 on the default is that
they are not. With softcap and bias, the GEMM then spills, and the row kernels have a fifth more instructions."""


class Tile(NamedTuple):
    """How a kernel is launched; a size that a kernel does not have is 0."""

    block_m: int  # rows (tokens) of a program
    block_n: int  # vocabulary entries of one step
    block_k: int  # hidden units of one step
    num_warps: int
    num_stages: int
    use_tma: bool = False  # tensor descriptors for the operands; pointers if a tensor is not aligned for them
    group_m: int = 8  # in the GEMM, row tiles that share a column tile of W in the L2 cache
    persistent: bool = False  # in the GEMM, one program per multiprocessor takes tile after tile

    @property
    def statistics_columns(self) -> int:
        """Columns of a tile of statistics in the GEMM, which reduces a wider tile in halves."""
        return min(self.block_n, STATISTICS_COLUMNS)


class Row(NamedTuple):
    """One line of the table; the first line that fits is used."""

    kernel: str
    arch: str
    dtypes: tuple[torch.dtype, ...]
    tile: Tile


HALF = (torch.bfloat16, torch.float16)
FULL = (torch.float32,)

WAYS = {
    "fused": "fp32 logits of both passes by cuBLAS",
    "stored": "no counterfactual logits, factual ones in 16 bits, by our GEMM",
}
"""The ways in which a call with 16-bit operands computes log-probabilities and dz; steps.py has them."""
WAY = dict.fromkeys((*SHARED_MEMORY_LIMIT, INTERPRETER), "fused") | {"sm_90": "stored"}
"""The way in use, by architecture. On an H100 "stored" is the fastest, or within 2 % of it (docs/LOG.md, 2026-11-27).
Architectures that have not been measured use "fused", which needs the fewest kernels of our own."""

# "rows" is row_loss.py and row_halves.py, which read fp32 logits: the shared memory of six stages leaves room for two
# programs of 16 warps per multiprocessor. So few rows are in flight that the L2 cache still holds the end of a row when
# its gradient begins there. Steps of 8192 entries spilled. The GEMM: 128 × 256 with one program per multiprocessor
# reads least from shared memory, and on sm_90 the persistent form loads the next tile's operands while the epilogue
# runs. fp32 products are IEEE, on the ordinary units: accurate, but slow.
TABLE = (
    Row("rows", "sm_80", FULL, Tile(1, 4096, 0, 16, 6)),
    Row("rows", "sm_86", FULL, Tile(1, 4096, 0, 16, 3)),
    Row("rows", "sm_90", FULL, Tile(1, 4096, 0, 16, 6)),
    Row("rows", "sm_100", FULL, Tile(1, 4096, 0, 16, 6)),
    Row("rows", "gfx942", FULL, Tile(1, 4096, 0, 8, 1)),
    Row("rows", INTERPRETER, FULL, Tile(1, 128, 0, 1, 1)),
    Row("lse_gemm", "sm_80", HALF, Tile(128, 128, 64, 8, 3)),
    Row("lse_gemm", "sm_80", FULL, Tile(64, 64, 16, 8, 2)),
    Row("lse_gemm", "sm_86", HALF, Tile(128, 128, 32, 8, 3)),
    Row("lse_gemm", "sm_86", FULL, Tile(64, 64, 16, 8, 2)),
    # measured: 0.76 of the time of one program per tile with 4 stages
    Row("lse_gemm", "sm_90", HALF, Tile(128, 256, 64, 8, 3, True, group_m=16, persistent=True)),
    Row("lse_gemm", "sm_90", FULL, Tile(64, 64, 16, 8, 2)),
    Row("lse_gemm", "sm_100", HALF, Tile(128, 256, 64, 8, 4, True)),
    Row("lse_gemm", "sm_100", FULL, Tile(64, 64, 16, 8, 2)),
    Row("lse_gemm", "gfx942", HALF, Tile(128, 128, 64, 8, 2)),
    Row("lse_gemm", "gfx942", FULL, Tile(64, 64, 16, 8, 1)),
    Row("lse_gemm", INTERPRETER, HALF + FULL, Tile(32, 128, 32, 1, 1)),
    # lse_gemm when it stores 16-bit logits, and the row kernel over them.
    Row("store_gemm", "sm_80", HALF, Tile(128, 128, 64, 8, 3)),
    Row("store_gemm", "sm_86", HALF, Tile(128, 128, 32, 8, 3)),
    # measured: 0.75 of the time of one program per tile
    Row("store_gemm", "sm_90", HALF, Tile(128, 256, 64, 8, 3, True, group_m=16, persistent=True)),
    Row("store_gemm", "sm_100", HALF, Tile(128, 128, 64, 8, 3, True)),  # wider or persistent ones spilled
    Row("store_gemm", "gfx942", HALF, Tile(128, 128, 64, 8, 2)),
    Row("store_gemm", INTERPRETER, HALF, Tile(16, 128, 32, 1, 1, persistent=True)),
    Row("stored_rows", "sm_80", HALF, Tile(1, 2048, 0, 8, 3)),
    Row("stored_rows", "sm_86", HALF, Tile(1, 2048, 0, 8, 3)),
    Row("stored_rows", "sm_90", HALF, Tile(1, 2048, 0, 8, 3)),
    Row("stored_rows", "sm_100", HALF, Tile(1, 2048, 0, 8, 3)),
    Row("stored_rows", "gfx942", HALF, Tile(1, 2048, 0, 8, 1)),
    Row("stored_rows", INTERPRETER, HALF, Tile(1, 128, 0, 1, 1)),
)


def architecture(device: torch.device) -> str:
    """The table's name for a device; a related GPU that is not listed uses the rows whose limits it meets."""
    if device.type == "cpu":
        return INTERPRETER
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 9:
        return "sm_90"
    if major in (10, 11):
        return "sm_100"
    # 8.6, 8.9 and 12.x have 99 KiB of shared memory per block, 8.0 and 8.7 have 163.
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"


def find(kernel: str, arch: str, dtype: torch.dtype) -> Tile:
    """The tile of `kernel` for operands of `dtype`."""
    for row in TABLE:
        if (row.kernel, row.arch) == (kernel, arch) and dtype in row.dtypes:
            return row.tile
    raise ValueError(f"backend: the Triton kernels have no tile of {kernel} for {dtype} on {arch}")


def way(like: Tensor) -> str:
    """The way for operands like this one. For fp32 it is "fused", because our own fp32 products are slow."""
    return WAY[architecture(like.device)] if like.dtype in HALF else "fused"


def multiprocessors(device: torch.device) -> int:
    """The device's number of multiprocessors; 1 in the interpreter, so that one persistent program takes all tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def lookup(kernel: str, like: Tensor) -> Tile:
    """The tile of `kernel` on the device and in the dtype of `like`."""
    return find(kernel, architecture(like.device), like.dtype)


def is_supported(device: torch.device) -> bool:
    """Whether the kernels support this CUDA GPU; they need sm_80, for bf16 matrix units and asynchronous copies."""
    return torch.cuda.get_device_capability(device) >= (8, 0)
