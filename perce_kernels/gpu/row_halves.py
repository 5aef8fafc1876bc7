"""The row kernel in two halves, for rows whose statistics are combined from several parts.

    row_parts    m = max_v z_v,   S = Σ_v exp(z_v − m),   z_y            over some of the columns       read 4V bytes
                 … the parts of a row are combined: those of blocks of columns (blocked.py), or those of the ranks that
                   share a vocabulary (perce_kernels.vocab_parallel) …
    row_gradient dx_v = w · scale · (p_v − 1[v = y]) · (1 − (z_v/cap)²)  p_v from the m and S of the whole row

x, z and dx, the target's expm1(logp) and the padding are as in row_loss.py, whose functions do the work.

    column   the target's column among these, counted from `start`; if it is not among them, z_y is not written
    V = 0    an empty shard: m = LOWEST, S = 0, and no gradient
    ignored  rows are computed like any other, from operands of 0; their weight of 0 makes dx 0
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from perce_kernels.gpu import tiles
from perce_kernels.gpu.row_loss import max_and_sum, target_logit, write_gradient


@triton.jit(
    do_not_specialize=["start", "softcap", "logit_scale"],
    do_not_specialize_on_alignment=["target_ptr", "max_ptr", "sum_ptr", "z_target_ptr"],  # slices of larger tensors
)
def row_parts_kernel(
    # inputs
    z_ptr,  # (R, V) fp32 raw products
    target_ptr,  # (R,) int64
    bias_ptr,  # (V,)
    # outputs
    max_ptr, sum_ptr, z_target_ptr,  # (R,) fp32
    # sizes
    V, start,
    # strides
    stride_z,
    # scalars
    softcap, logit_scale,
    # constants
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride_z
    column = tl.load(target_ptr + row) - start
    here = (column >= 0) & (column < V)
    z_y = target_logit(z_row, tl.where(here, column, -1), bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
    row_max, total = max_and_sum(z_row, V, bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP, BLOCK_V, STAGES)
    tl.store(max_ptr + row, row_max)
    tl.store(sum_ptr + row, total)
    tl.store(z_target_ptr + row, z_y, mask=here)


@triton.jit(do_not_specialize=["softcap", "logit_scale"])
def row_gradient_kernel(
    # inputs
    z_ptr,  # (R, V) fp32 raw products
    column_ptr,  # (R,) int64
    max_ptr, sum_ptr, logp_ptr, weight_ptr,  # (R,) fp32, for whole rows
    bias_ptr,  # (V,)
    dz_scale_ptr,  # () fp32
    # outputs
    dz_ptr,  # (R, V)
    # sizes
    V,
    # strides
    stride_z, stride_dz,
    # scalars
    softcap, logit_scale,
    # constants
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DZ_SCALE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(weight_ptr + row) * logit_scale
    if HAS_DZ_SCALE:
        factor *= tl.load(dz_scale_ptr)
    write_gradient(
        z_ptr + row * stride_z, dz_ptr + row * stride_dz, tl.load(column_ptr + row), tl.load(max_ptr + row),
        tl.load(sum_ptr + row), tl.load(logp_ptr + row), factor, V, bias_ptr, softcap, logit_scale,
        HAS_BIAS, HAS_SOFTCAP, BLOCK_V,
    )  # fmt: skip


def row_parts(
    z: Tensor,  # (R, pitch) fp32 raw products
    target: Tensor,  # (R,) int64
    bias: Tensor | None,  # (V,)
    row_max: Tensor,  # (R,) fp32 out
    total: Tensor,  # (R,) fp32 out
    z_target: Tensor,  # (R,) fp32 out, written if the target's column is among these
    *,
    v: int,
    start: int = 0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """The statistics of columns [start, start + v) of each row."""
    assert z.dtype is torch.float32 and z.stride(1) == 1 and z.stride(0) >= v
    tile = tiles.lookup("rows", z)
    row_parts_kernel[(z.shape[0],)](
        z, target, bias,
        row_max, total, z_target,
        v, start,
        z.stride(0),
        1.0 if softcap is None else softcap, logit_scale,
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, BLOCK_V=tile.block_n, STAGES=tile.num_stages,
        num_warps=tile.num_warps, enable_fp_fusion=tiles.FP_FUSION,
    )  # fmt: skip


def row_gradient(
    z: Tensor,  # (R, pitch) fp32 raw products
    column: Tensor,  # (R,) int64, −1 if the target is not among the columns
    row_max: Tensor,  # (R,) fp32
    total: Tensor,  # (R,) fp32
    logp: Tensor,  # (R,) fp32
    weight: Tensor,  # (R,) fp32
    bias: Tensor | None,  # (V,)
    dz_scale: Tensor | None,  # () fp32
    dz: Tensor,  # (R, V) out
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """dz from the statistics of whole rows."""
    if dz.shape[1] == 0:
        return
    assert z.stride(1) == dz.stride(1) == 1
    tile = tiles.lookup("rows", z)
    row_gradient_kernel[(z.shape[0],)](
        z, column, row_max, total, logp, weight, bias, dz_scale,
        dz,
        dz.shape[1],
        z.stride(0), dz.stride(0),
        1.0 if softcap is None else softcap, logit_scale,
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, HAS_DZ_SCALE=dz_scale is not None,
        BLOCK_V=tile.block_n, num_warps=tile.num_warps, enable_fp_fusion=tiles.FP_FUSION,
    )  # fmt: skip
