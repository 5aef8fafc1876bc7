"""The row kernel: a chunk's raw products in, its statistics out, and its gradient written over them. One program a row.

    x_v    = (h Wᵀ)_v                                 what the GEMM left, fp32; x_cf likewise
    z_v    = cap · tanh(scale · (x_v + b_v) / cap)    the logits ("softcap"); z_v = scale · (x_v + b_v) without
    logp   = (z_y − max_v z_v) − log Σ_v exp(z_v − max_v z_v)
    pir    = logp − logp_cf
    w      = clip(pir, m, M), or clip(exp(pir), m, M), or given
    loss   = −w · logp

Gradient. w is a constant; ∂logp/∂z_v = 1[v = y] − p_v with p_v = exp(z_v − max)/Σ; ∂z_v/∂x_v = scale·(1 − (z_v/cap)²):

    dx_v   = w · scale · (p_v − 1[v = y]) · (1 − (z_v/cap)²)

Formed by subtraction, p_y − 1 would lose its digits as p_y → 1: at the target it is expm1(logp). dx is that of the sum
Σ loss; what divides it (1/n, Σw) is a scalar that the caller applies.

    sweep 1   online max and Σ exp of x_cf (if given), then of x; logp, w              read 4V (+ 4V) bytes
    sweep 2   dx over x, in the dtype of the GEMMs that follow (only when needed)      read 4V, write 2V or 4V

dx *overlays* x: as fp32 it takes x's place, as bf16 or fp16 it takes the first half of the same row. Step t writes
bytes [2tB, 2tB + 2B) after reading [4tB, 4tB + 4B): behind every later read, but for the first step, where other
warps may still be reading what this one writes; hence the barrier between load and store.

    row       z_ptr + row · stride_z; a row's pitch is stride_z ≥ V, and what lies between is read and thrown away:
              loads guarded by the pitch (a multiple of 16) are 16 bytes wide, by an odd V they would be 4
    target    a row whose target is ignore_index has loss, statistics and dx of 0 and is not read, so a NaN in it is
              harmless; one whose target lies outside [0, V) is poisoned with NaN
    padding   columns ≥ V become −inf *after* the cap (tanh would bring them back to −cap)
    offsets   64-bit: rows · V passes 2³¹
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from perce_kernels.gpu import tiles

SOURCES = {"hidden_cf": 0, "logp_cf": 1, "token_weight": 2}
FROM_HIDDEN_CF = tl.constexpr(0)
FROM_LOGP_CF = tl.constexpr(1)
GIVEN_WEIGHT = tl.constexpr(2)


@triton.jit
def transform(x, bias, softcap, logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Raw products → logits."""
    if HAS_BIAS:
        x += bias
    x *= logit_scale
    if HAS_SOFTCAP:
        # tanh(u) = 2σ(2u) − 1, off by 1e-7: libdevice.tanh is no more accurate and the interpreter lacks it.
        x = softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)
    return x


@triton.jit
def load_logits(
    row_ptr, offs_v, V, pitch, bias_ptr, softcap, logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """One step of a row as logits, −inf where the vocabulary has ended."""
    x = tl.load(row_ptr + offs_v, mask=offs_v < pitch, other=0.0)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)
    return tl.where(offs_v < V, transform(x, bias, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP), float("-inf"))


@triton.jit
def max_and_sum(
    row_ptr, V, pitch, bias_ptr, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(max, Σ exp(z − max)) of a row. The sum is kept per lane, so a step costs one reduction, not two."""
    row_max = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = load_logits(row_ptr, offs_v, V, pitch, bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
        new_max = tl.maximum(row_max, tl.max(z, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # −inf − (−inf) is NaN
        total = total * tl.exp(row_max - shift) + tl.exp(z - shift)
        row_max = new_max
    return row_max, tl.sum(total, 0)


@triton.jit
def target_logit(row_ptr, y, bias_ptr, softcap, logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """The logit of column y, which may be −1: then it is that of a product of 0."""
    x_y = tl.load(row_ptr + y, mask=y >= 0, other=0.0)
    bias_y = 0.0
    if HAS_BIAS:
        bias_y = tl.load(bias_ptr + y, mask=y >= 0, other=0.0).to(tl.float32)
    return transform(x_y, bias_y, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)


@triton.jit
def row_statistics(
    row_ptr, y, V, pitch, bias_ptr, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(max, Σ exp(z − max), logp) of a row."""
    z_y = target_logit(row_ptr, y, bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
    row_max, total = max_and_sum(
        row_ptr, V, pitch, bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP, BLOCK_V, STAGES
    )
    return row_max, total, (z_y - row_max) - tl.log(total)


@triton.jit
def expm1(x):
    """exp(x) − 1 for x ≤ 0: a Taylor polynomial near 0 (remainder 2e-8 of the value), where exp(x) − 1 would cancel."""
    near = tl.where(x > -0.35, x, 0.0)
    p = 1 + near / 6 * (1 + near / 7)
    p = 1 + near / 3 * (1 + near / 4 * (1 + near / 5 * p))
    return tl.where(x > -0.35, near * (1 + near / 2 * p), tl.exp(x) - 1)


@triton.jit
def write_gradient(
    z_row, dz_row, y, row_max, total, logp, factor, V, pitch, bias_ptr, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx over x, with factor = w · scale; no column is the target's if y is −1."""
    dtype = dz_row.dtype.element_ty
    at_target = factor * expm1(logp)
    elsewhere = factor / total
    for start in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = load_logits(z_row, offs_v, V, pitch, bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
        dz = tl.where(offs_v == y, at_target, elsewhere * tl.exp(z - row_max))
        if HAS_SOFTCAP:
            bent = z / softcap
            dz *= 1 - tl.where(offs_v < V, bent * bent, 1.0)
        tl.debug_barrier()  # dz overlays z: see the docstring
        tl.store(dz_row + offs_v, dz.to(dtype), mask=offs_v < pitch)


@triton.jit(do_not_specialize=["ignore_index", "clip_min", "clip_max", "softcap", "logit_scale"])
def row_loss_kernel(
    # inputs
    z_ptr, z_cf_ptr,  # (C, V) fp32 raw products
    target_ptr,  # (C,) int64
    given_ptr,  # (C,) logp_cf or token_weight, by SOURCE
    bias_ptr,  # (V,)
    dz_scale_ptr,  # () fp32 factor of dz alone
    # outputs
    dz_ptr,  # (C, V) over z
    logp_ptr, logp_cf_ptr, weight_ptr,  # (C,) fp32
    # sizes
    V, ignore_index,
    # strides
    stride_z, stride_dz,
    # scalars
    clip_min, clip_max, softcap, logit_scale,
    # constants
    SOURCE: tl.constexpr, RATIO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_DZ_SCALE: tl.constexpr, NEED_DZ: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride_z
    y = tl.load(target_ptr + row)
    if y == ignore_index:
        tl.store(logp_ptr + row, 0.0)
        tl.store(logp_cf_ptr + row, 0.0)
        tl.store(weight_ptr + row, 0.0)
        if NEED_DZ:
            dz_row = dz_ptr + row * stride_dz
            for start in tl.range(0, V, BLOCK_V):
                offs_v = start + tl.arange(0, BLOCK_V)
                zero = tl.zeros([BLOCK_V], dz_ptr.dtype.element_ty)
                tl.store(dz_row + offs_v, zero, mask=offs_v < stride_z)
    else:
        in_range = (y >= 0) & (y < V)
        y = tl.where(in_range, y, 0)
        row_max, total, logp = row_statistics(
            z_row, y, V, stride_z, bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP, BLOCK_V, STAGES
        )
        logp = tl.where(in_range, logp, float("nan"))
        logp_cf = 0.0
        if SOURCE == FROM_HIDDEN_CF:
            _, _, logp_cf = row_statistics(
                z_cf_ptr + row * stride_z, y, V, stride_z, bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP,
                BLOCK_V, STAGES,
            )  # fmt: skip
            logp_cf = tl.where(in_range, logp_cf, float("nan"))
        elif SOURCE == FROM_LOGP_CF:
            logp_cf = tl.load(given_ptr + row).to(tl.float32)
        if SOURCE != GIVEN_WEIGHT:
            ratio = logp - logp_cf
            if RATIO:
                ratio = tl.exp(ratio)
            weight = tl.minimum(tl.maximum(ratio, clip_min), clip_max)
            weight = tl.where(ratio == ratio, weight, float("nan"))  # min and max would hide a NaN behind a bound
        else:
            weight = tl.where(in_range, tl.load(given_ptr + row).to(tl.float32), float("nan"))
        tl.store(logp_ptr + row, logp)
        tl.store(logp_cf_ptr + row, logp_cf)
        tl.store(weight_ptr + row, weight)

        if NEED_DZ:
            factor = weight * logit_scale
            if HAS_DZ_SCALE:
                factor *= tl.load(dz_scale_ptr)
            write_gradient(
                z_row, dz_ptr + row * stride_dz, y, row_max, total, logp, factor, V, stride_z, bias_ptr, softcap,
                logit_scale, HAS_BIAS, HAS_SOFTCAP, BLOCK_V, STAGES,
            )  # fmt: skip


def overlay(z: Tensor, v: int, dtype: torch.dtype) -> Tensor:
    """The (C, V) view of dtype `dtype` in which the kernel leaves dz, over the rows of z (C, pitch)."""
    return z.view(dtype)[:, :v]


def row_loss(
    z: Tensor,  # (C, pitch) fp32 raw products, pitch ≥ V and a row's memory to its end ours to overwrite
    z_cf: Tensor | None,  # (C, pitch)
    target: Tensor,  # (C,) int64
    given: Tensor | None,  # (C,) logp_cf or token_weight
    bias: Tensor | None,  # (V,)
    dz_scale: Tensor | None,  # () fp32
    dz: Tensor | None,  # overlay(z, V, dtype), or None: statistics only
    logp: Tensor,  # (C,) fp32 out
    logp_cf: Tensor,  # (C,) fp32 out
    weight: Tensor,  # (C,) fp32 out
    *,
    v: int,
    source: str,
    contrast: str = "log",
    clip_min: float = 0.0,
    clip_max: float = 0.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Launch the kernel over the rows of one chunk. fp32 inside; z is dz, or as it was, afterwards."""
    rows = z.shape[0]
    if rows == 0:
        return
    assert z.dtype == torch.float32 and z.stride(1) == 1 and z.stride(0) >= v
    assert z_cf is None or z_cf.stride() == z.stride()
    assert dz is None or dz.data_ptr() == z.data_ptr()
    tile = tiles.lookup("row_loss", z)
    row_loss_kernel[(rows,)](
        z, z_cf, target, given, bias, dz_scale,
        dz, logp, logp_cf, weight,
        v, ignore_index,
        z.stride(0), 0 if dz is None else dz.stride(0),
        clip_min, clip_max, 1.0 if softcap is None else softcap, logit_scale,
        SOURCE=SOURCES[source], RATIO=contrast == "ratio", HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
        HAS_DZ_SCALE=dz_scale is not None, NEED_DZ=dz is not None, BLOCK_V=tile.block_n, STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )  # fmt: skip
