"""The row kernel in two halves, for a shard of the vocabulary: between them the ranks exchange what they know of a row.

    row_parts    m = max_v z_v,   S = Σ_v exp(z_v − m),   z_y − m        over this shard's columns      read 4V bytes
                 … all ranks' parts become those of the row, with logp and w: perce_kernels.vocab_parallel …
    row_gradient dx_v = w · scale · (p_v − 1[v = y]) · (1 − (z_v/cap)²)  over x, p_v by the row's m and S

x, z and dx, the overlay of dx on x, the target's expm1(logp) and the padding are those of row_loss.py, whose functions
do the work.

    column   the target's column in this shard, −1 if it lies in another: then z_y − m is nothing to rely on
    V = 0    an empty shard: m = −∞, S = 0, and no gradient
    ignored  rows are computed as any other, from operands of 0; their weight of 0 makes dx 0
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from perce_kernels.gpu import tiles
from perce_kernels.gpu.row_loss import max_and_sum, target_logit, write_gradient
from perce_kernels.vocab_parallel import RowParts


@triton.jit(do_not_specialize=["softcap", "logit_scale"])
def row_parts_kernel(
    # inputs
    z_ptr,  # (R, V) fp32 raw products
    column_ptr,  # (R,) int64
    bias_ptr,  # (V,)
    # outputs
    max_ptr, sum_ptr, z_target_ptr,  # (R,) fp32
    # sizes
    V,
    # strides
    stride_z,
    # scalars
    softcap, logit_scale,
    # constants
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride_z
    y = tl.load(column_ptr + row)
    z_y = target_logit(z_row, y, bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
    row_max, total = max_and_sum(
        z_row, V, stride_z, bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP, BLOCK_V, STAGES
    )
    tl.store(max_ptr + row, row_max)
    tl.store(sum_ptr + row, total)
    tl.store(z_target_ptr + row, z_y - tl.where(row_max == float("-inf"), 0.0, row_max))


@triton.jit(do_not_specialize=["softcap", "logit_scale"])
def row_gradient_kernel(
    # inputs
    z_ptr,  # (R, V) fp32 raw products
    column_ptr,  # (R,) int64
    max_ptr, sum_ptr, logp_ptr, weight_ptr,  # (R,) fp32, of whole rows
    bias_ptr,  # (V,)
    dz_scale_ptr,  # () fp32
    # outputs
    dz_ptr,  # (R, V) over z
    # sizes
    V,
    # strides
    stride_z, stride_dz,
    # scalars
    softcap, logit_scale,
    # constants
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DZ_SCALE: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(weight_ptr + row) * logit_scale
    if HAS_DZ_SCALE:
        factor *= tl.load(dz_scale_ptr)
    write_gradient(
        z_ptr + row * stride_z, dz_ptr + row * stride_dz, tl.load(column_ptr + row), tl.load(max_ptr + row),
        tl.load(sum_ptr + row), tl.load(logp_ptr + row), factor, V, stride_z, bias_ptr, softcap, logit_scale,
        HAS_BIAS, HAS_SOFTCAP, BLOCK_V, STAGES,
    )  # fmt: skip


def row_parts(
    z: Tensor,  # (R, pitch) fp32 raw products
    column: Tensor,  # (R,) int64
    bias: Tensor | None,  # (V,)
    *,
    v: int,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> RowParts:
    """What this shard's columns tell of each row."""
    assert z.dtype is torch.float32 and z.stride(1) == 1 and z.stride(0) >= v
    parts = RowParts(*(z.new_empty(z.shape[0]) for _ in range(3)))
    tile = tiles.lookup("shard_rows", z)
    row_parts_kernel[(z.shape[0],)](
        z, column, bias,
        *parts[:3],
        v,
        z.stride(0),
        1.0 if softcap is None else softcap, logit_scale,
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, BLOCK_V=tile.block_n, STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return parts


def row_gradient(
    z: Tensor,  # (R, pitch) fp32 raw products, ours to overwrite
    column: Tensor,  # (R,) int64
    row_max: Tensor,  # (R,) fp32
    total: Tensor,  # (R,) fp32
    logp: Tensor,  # (R,) fp32
    weight: Tensor,  # (R,) fp32
    bias: Tensor | None,  # (V,)
    dz_scale: Tensor | None,  # () fp32
    dz: Tensor,  # row_loss.overlay(z, V, dtype), out
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """dz over z, from the statistics of whole rows."""
    if dz.shape[1] == 0:
        return
    assert dz.data_ptr() == z.data_ptr()
    tile = tiles.lookup("shard_rows", z)
    row_gradient_kernel[(z.shape[0],)](
        z, column, row_max, total, logp, weight, bias, dz_scale,
        dz,
        dz.shape[1],
        z.stride(0), dz.stride(0),
        1.0 if softcap is None else softcap, logit_scale,
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, HAS_DZ_SCALE=dz_scale is not None,
        BLOCK_V=tile.block_n, STAGES=tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip
