"""The gradient, written over logits that the GEMM stored in 16 bits relative to the maximum of their tile. There is one
program per row.

    s_v   = z_v − m_t ≤ 0, rounded to bf16 or fp16            as lse_gemm.py stored it, with m_t exact in fp32
    p_v   = exp(s_v + (m_t − max)) / Σ                        max, Σ and logp from fp32 logits
    dx_v  = w · scale · (p_v − 1[v = y]) · (1 − (z_v/cap)²)   written over s_v, in its dtype; z_v = s_v + m_t

At the target, p_v − 1 is expm1(logp) and z_y is the fp32 logit, so that neither has been rounded: see row_loss.py.

Error. Rounding changes s_v by at most u·|s_v| (u = 2⁻⁸ in bf16, 2⁻¹¹ in fp16), and p_v by the same relative amount.
Logits far below the maximum of their tile change most, but have small probabilities: with p_t the probability at that
maximum,

    |Δp_v| ≤ u · |s_v| · exp(−|s_v|) · p_t ≤ u/e · p_t        0.14 % of p_t in bf16, and nothing at the maximum itself

to first order in u; the softcap's derivative adds at most 2/cap of that. A logit that is itself rounded to bf16, as in
a PyTorch model, changes by u·|z_v|, and p_v with it, even if p_v is large. Statistics and weights are those of fp32.

    padding   columns from V to the pitch were stored as −∞ and become 0
    in place  an element is written by the thread that read it, or after the barrier of an exchange of layouts
    loop      as in row_loss.py: whole steps have no mask, and no column is compared with the target's
"""

import triton
import triton.language as tl
from torch import Tensor

from perce_kernels.gpu import tiles
from perce_kernels.gpu.combine import Statistics
from perce_kernels.gpu.row_loss import DONE_WITH, LOG2E, expm1


@triton.jit
def gradient_step(
    stored_row, tile_max_ptr, start, row_max, elsewhere, V, pitch, stride_tile, softcap,
    HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write dz of BLOCK_T tiles over s, as if none of the columns were the target's."""
    offs_t = start + tl.arange(0, BLOCK_T)
    offs_v = offs_t[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tile_max_ptr += offs_t.to(tl.int64) * stride_tile
    if MASKED:
        tile_max = tl.load(tile_max_ptr, mask=offs_t * TILE < V, other=0.0)[:, None]
        s = tl.load(stored_row + offs_v, mask=offs_v < pitch, other=0.0, eviction_policy=DONE_WITH).to(tl.float32)
    else:
        tile_max = tl.load(tile_max_ptr)[:, None]
        s = tl.load(stored_row + offs_v, eviction_policy=DONE_WITH).to(tl.float32)
    dz = elsewhere * tl.exp2(tl.fma(s, LOG2E, (tile_max - row_max) * LOG2E))
    if HAS_SOFTCAP:
        bent = (s + tile_max) * (1 / softcap)
        if MASKED:
            bent = tl.where(offs_v < V, bent, 1.0)
        dz *= 1 - bent * bent
    if MASKED:
        tl.store(stored_row + offs_v, dz.to(stored_row.dtype.element_ty), mask=offs_v < pitch)
    else:
        tl.store(stored_row + offs_v, dz.to(stored_row.dtype.element_ty))


@triton.jit(do_not_specialize=["softcap", "logit_scale"])
def stored_gradient_kernel(
    # inputs
    stored_ptr,  # (C, V) z − m_t; also the output
    tile_max_ptr,  # (T, n) fp32, n ≥ C
    target_ptr,  # (C,) int64
    z_target_ptr, max_ptr, sum_ptr, logp_ptr, weight_ptr,  # (C,) fp32
    dz_scale_ptr,  # () fp32
    # sizes
    V,
    # strides
    stride_stored, stride_tile,
    # scalars
    softcap, logit_scale,
    # constants
    HAS_SOFTCAP: tl.constexpr, HAS_DZ_SCALE: tl.constexpr, TILE: tl.constexpr, BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    stored_row = stored_ptr + row * stride_stored
    y = tl.load(target_ptr + row)
    row_max = tl.load(max_ptr + row)
    factor = tl.load(weight_ptr + row) * logit_scale
    if HAS_DZ_SCALE:
        factor *= tl.load(dz_scale_ptr)
    elsewhere = factor / tl.load(sum_ptr + row)
    whole = V // (BLOCK_T * TILE) * BLOCK_T
    for start in tl.range(0, whole, BLOCK_T, num_stages=STAGES):
        gradient_step(
            stored_row, tile_max_ptr + row, start, row_max, elsewhere, V, stride_stored, stride_tile, softcap,
            HAS_SOFTCAP, False, TILE, BLOCK_T,
        )  # fmt: skip
    if whole * TILE < V:
        gradient_step(
            stored_row, tile_max_ptr + row, whole, row_max, elsewhere, V, stride_stored, stride_tile, softcap,
            HAS_SOFTCAP, True, TILE, BLOCK_T,
        )  # fmt: skip
    at_target = factor * expm1(tl.load(logp_ptr + row))
    if HAS_SOFTCAP:
        bent = tl.load(z_target_ptr + row) / softcap
        at_target *= 1 - bent * bent
    tl.debug_barrier()  # another thread may have written this entry
    tl.store(stored_row + y, at_target.to(stored_ptr.dtype.element_ty), mask=(y >= 0) & (y < V))


def stored_gradient(
    stored: Tensor,  # (C, pitch) z − m_t, overwritten with dz
    statistics: Statistics,  # of n ≥ C rows, the first of which are these
    target: Tensor,  # (C,) int64
    logp: Tensor,  # (C,) fp32
    weight: Tensor,  # (C,) fp32
    dz_scale: Tensor | None,  # () fp32
    *,
    v: int,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Launch the kernel over the rows of one chunk."""
    assert stored.stride(1) == 1 and stored.stride(0) >= v and stored.dtype in tiles.HALF
    tile = tiles.lookup("stored_rows", stored)
    tile_max = statistics.tile_max
    columns = statistics.columns
    stored_gradient_kernel[(stored.shape[0],)](
        stored, tile_max, target, statistics.z_target, statistics.row_max, statistics.total, logp, weight, dz_scale,
        v,
        stored.stride(0), tile_max.stride(0),
        1.0 if softcap is None else softcap, logit_scale,
        HAS_SOFTCAP=softcap is not None, HAS_DZ_SCALE=dz_scale is not None, TILE=columns,
        BLOCK_T=max(tile.block_n // columns, 1), STAGES=tile.num_stages, num_warps=tile.num_warps,
        enable_fp_fusion=tiles.FP_FUSION,
    )  # fmt: skip
