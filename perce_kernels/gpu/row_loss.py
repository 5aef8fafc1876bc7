"""The row kernel: from a chunk's raw products, its statistics and its gradient. There is one program per row.

    x_v    = (h Wᵀ)_v                                 the raw products of the GEMM, fp32
    z_v    = cap · tanh(scale · (x_v + b_v) / cap)    the logits; without a softcap z_v = scale · (x_v + b_v)
    logp   = (z_y − max_v z_v) − log Σ_v exp(z_v − max_v z_v)
    pir    = logp − logp_cf
    w      = clip(pir, m, M), or clip(exp(pir), m, M), or given
    loss   = −w · logp

Gradient. w is a constant; ∂logp/∂z_v = 1[v = y] − p_v with p_v = exp(z_v − max)/Σ; ∂z_v/∂x_v = scale·(1 − (z_v/cap)²):

    dx_v   = w · scale · (p_v − 1[v = y]) · (1 − (z_v/cap)²)

Computed by subtraction, p_y − 1 would lose its digits as p_y → 1, so at the target it is expm1(logp). dx is the
gradient of the sum Σ loss; the caller applies the scalar that divides it (1/n, Σw).

    sweep 1   forwards: max and Σ exp of x; then logp, w                                read 4V bytes
    sweep 2   backwards: dx, in the dtype of the products that follow (if needed)       read 4V, write 2V or 4V

Sweep 2 first reads what sweep 1 read last, which the L2 cache may still hold, as far as the other rows in flight leave
it there. Sweep 2 marks its reads and writes to be evicted first, which leaves the cache to the ends of rows that still
wait for their sweep 2.

The kernel may be bound by instructions, so its loops have few. Four neighbouring entries share a running maximum, which
belongs to one thread: no exchange, no barrier, and one rescaling of the sum per four entries. An exponential is one
fused multiply-add and one exp2: with r = fl(max · log₂e) as the reference, z · log₂e − r is rounded once, after the
subtraction, so that a large offset common to the logits cancels. The rounding error of r, `residual`, is corrected once
per row. Whole steps need no mask; the rest of a row is one masked step. No column is compared with the target's: its
entry is written again at the end, after a barrier. Sweep 1 prefetches its steps through shared memory. Sweep 2 loads
twice as much at once instead, without prefetching and without a barrier.

    row       z_ptr + row · stride_z, and dz_ptr + row · stride_dz; columns from V to the pitch are not touched
    target    a row whose target is ignore_index has loss, statistics and dx of 0 and is not read, so a NaN in it is
              harmless; a row whose target is outside [0, V) is poisoned with NaN
    padding   columns ≥ V become −inf *after* the cap (tanh would bring them back to −cap)
    masks     logits below −2³⁰, −∞ included, count as nothing; a row of only such logits, or with one above 2³¹, is NaN
    offsets   64-bit, because rows · V exceeds 2³¹
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from perce_kernels.gpu import tiles

SOURCES = {"logp_cf": 0, "token_weight": 1}
GIVEN_WEIGHT = tl.constexpr(1)
LOG2E = tl.constexpr(1.4426950408889634)
WIDTH = tl.constexpr(4)
"""Neighbouring entries that share a maximum: those that one thread loads at once."""
LOWEST = tl.constexpr(-(2.0**30))
"""The maximum of no entries, and of entries below it. It is finite, because −∞ − (−∞) is NaN. It is a power of two,
whose product with log₂e is exact, and so small in size that the error of a reference, at most 64, cannot overflow an
exponent."""
DONE_WITH = tl.constexpr("evict_first")


@triton.jit
def transform(x, bias, softcap, logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Raw products → logits."""
    if HAS_BIAS:
        x += bias
    x *= logit_scale
    if HAS_SOFTCAP:
        # tanh(u) = 1 − 2/(1 + exp 2u), with an error of 1e-7: libdevice.tanh is no better, the interpreter lacks it.
        x = softcap - 2 * softcap / (1 + tl.exp2(x * (2 * LOG2E / softcap)))
    return x


@triton.jit
def reference_of(largest):
    """fl(largest · log₂e), by fma: compilers would fuse a product with the following difference, unrounded."""
    return tl.fma(largest, LOG2E, 0.0)


@triton.jit
def exp_above(z, reference):
    """exp(z)/2^reference, with the reference of the largest logit; see residual."""
    return tl.exp2(tl.fma(z, LOG2E, -reference))


@triton.jit
def residual(row_max, reference):
    """exp(row_max)/2^reference, which is 1 up to the rounding of the reference."""
    return tl.exp2(tl.fma(row_max, LOG2E, -reference))


@triton.jit
def load_logits(
    row_ptr, offs_v, V, bias_ptr, softcap, logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """The logits of one step of a row; with MASKED, −inf after the end of the vocabulary."""
    bias = 0.0
    if MASKED:
        x = tl.load(row_ptr + offs_v, mask=offs_v < V, other=0.0, eviction_policy=EVICT)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)
    else:
        x = tl.load(row_ptr + offs_v, eviction_policy=EVICT)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs_v).to(tl.float32)
    z = transform(x, bias, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
    if MASKED:
        z = tl.where(offs_v < V, z, float("-inf"))
    return z


@triton.jit
def accumulate(z, running_max, total):
    """(max, Σ exp relative to it) of groups (G,), after adding one step of logits (G, WIDTH)."""
    new_max = tl.maximum(running_max, tl.max(z, 1))
    reference = reference_of(new_max)
    total *= tl.exp2(reference_of(running_max) - reference)
    return new_max, total + tl.sum(exp_above(z, reference[:, None]), 1)


@triton.jit
def columns(BLOCK_V: tl.constexpr):
    """(G, WIDTH) offsets of one step."""
    return tl.arange(0, BLOCK_V // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def max_and_sum(
    row_ptr, V, bias_ptr, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(max, Σ exp(z − max)) of a row."""
    running_max = tl.full([BLOCK_V // WIDTH], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_V // WIDTH], tl.float32)
    whole = V // BLOCK_V * BLOCK_V
    for start in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        z = load_logits(
            row_ptr, start + columns(BLOCK_V), V, bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP, False, ""
        )
        running_max, total = accumulate(z, running_max, total)
    if whole < V:
        z = load_logits(
            row_ptr, whole + columns(BLOCK_V), V, bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP, True, ""
        )
        running_max, total = accumulate(z, running_max, total)
    row_max = tl.max(running_max, 0)
    reference = reference_of(row_max)
    total = tl.sum(total * tl.exp2(reference_of(running_max) - reference), 0)
    return row_max, total / residual(row_max, reference)


@triton.jit
def target_logit(row_ptr, y, bias_ptr, softcap, logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """The logit of column y; for y = −1 it is that of a raw product of 0."""
    x_y = tl.load(row_ptr + y, mask=y >= 0, other=0.0)
    bias_y = 0.0
    if HAS_BIAS:
        bias_y = tl.load(bias_ptr + y, mask=y >= 0, other=0.0).to(tl.float32)
    return transform(x_y, bias_y, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)


@triton.jit
def expm1(x):
    """exp(x) − 1 for x ≤ 0: a Taylor polynomial near 0 (remainder 2e-8 of the value), where exp(x) − 1 would cancel."""
    near = tl.where(x > -0.35, x, 0.0)
    p = 1 + near / 6 * (1 + near / 7)
    p = 1 + near / 3 * (1 + near / 4 * (1 + near / 5 * p))
    return tl.where(x > -0.35, near * (1 + near / 2 * p), tl.exp(x) - 1)


@triton.jit
def gradient_step(
    z_row, dz_row, offs_v, reference, elsewhere, V, bias_ptr, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write dx of one step, as if none of its columns were the target's."""
    z = load_logits(z_row, offs_v, V, bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP, MASKED, DONE_WITH)
    dz = elsewhere * exp_above(z, reference)
    if HAS_SOFTCAP:
        bent = z * (1 / softcap)
        dz *= 1 - bent * bent
    if MASKED:
        tl.store(dz_row + offs_v, dz.to(dz_row.dtype.element_ty), mask=offs_v < V, eviction_policy=DONE_WITH)
    else:
        tl.store(dz_row + offs_v, dz.to(dz_row.dtype.element_ty), eviction_policy=DONE_WITH)


@triton.jit
def write_gradient(
    z_row, dz_row, y, row_max, total, logp, factor, V, bias_ptr, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write dx of a row from its end to its beginning, with factor = w · scale; y = −1 if no column is the target's."""
    STEP: tl.constexpr = 2 * BLOCK_V
    reference = reference_of(row_max)
    elsewhere = factor / (total * residual(row_max, reference))
    whole = V // STEP * STEP
    if whole < V:
        gradient_step(
            z_row, dz_row, whole + tl.arange(0, STEP), reference, elsewhere, V, bias_ptr, softcap, logit_scale,
            HAS_BIAS, HAS_SOFTCAP, True,
        )  # fmt: skip
    for done in tl.range(STEP, whole + 1, STEP, num_stages=1):  # asynchronous copies would lose the eviction marks
        gradient_step(
            z_row, dz_row, whole - done + tl.arange(0, STEP), reference, elsewhere, V, bias_ptr, softcap, logit_scale,
            HAS_BIAS, HAS_SOFTCAP, False,
        )  # fmt: skip
    at_target = factor * expm1(logp)
    if HAS_SOFTCAP:
        bent = target_logit(z_row, y, bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP) * (1 / softcap)
        at_target *= 1 - bent * bent
    tl.debug_barrier()  # another thread may have written this entry
    tl.store(dz_row + y, at_target.to(dz_row.dtype.element_ty), mask=y >= 0)


@triton.jit(do_not_specialize=["ignore_index", "clip_min", "clip_max", "softcap", "logit_scale"])
def row_loss_kernel(
    # inputs
    z_ptr,  # (C, V) fp32 raw products
    target_ptr,  # (C,) int64
    given_ptr,  # (C,) logp_cf or token_weight, as SOURCE says
    bias_ptr,  # (V,)
    dz_scale_ptr,  # () fp32 factor of dz alone
    # outputs
    dz_ptr,  # (C, V)
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
                tl.store(dz_row + offs_v, zero, mask=offs_v < V)
    else:
        in_range = (y >= 0) & (y < V)
        y = tl.where(in_range, y, 0)
        z_y = target_logit(z_row, y, bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
        row_max, total = max_and_sum(z_row, V, bias_ptr, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP, BLOCK_V, STAGES)
        logp = tl.where(in_range, (z_y - row_max) - tl.log(total), float("nan"))
        given = tl.load(given_ptr + row).to(tl.float32)
        logp_cf = 0.0
        if SOURCE == GIVEN_WEIGHT:
            weight = tl.where(in_range, given, float("nan"))
        else:
            logp_cf = given
            ratio = logp - logp_cf
            if RATIO:
                ratio = tl.exp(ratio)
            weight = tl.minimum(tl.maximum(ratio, clip_min), clip_max)
            weight = tl.where(ratio == ratio, weight, float("nan"))  # min and max would hide a NaN behind a bound
        tl.store(logp_ptr + row, logp)
        tl.store(logp_cf_ptr + row, logp_cf)
        tl.store(weight_ptr + row, weight)

        if NEED_DZ:
            factor = weight * logit_scale
            if HAS_DZ_SCALE:
                factor *= tl.load(dz_scale_ptr)
            write_gradient(
                z_row, dz_ptr + row * stride_dz, y, row_max, total, logp, factor, V, bias_ptr, softcap, logit_scale,
                HAS_BIAS, HAS_SOFTCAP, BLOCK_V,
            )  # fmt: skip


def row_loss(
    z: Tensor,  # (C, pitch) fp32 raw products, pitch ≥ V
    target: Tensor,  # (C,) int64
    given: Tensor,  # (C,) logp_cf or token_weight
    bias: Tensor | None,  # (V,)
    dz_scale: Tensor | None,  # () fp32
    dz: Tensor | None,  # (C, ≥ V) out; None: statistics only
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
    """Launch the kernel over the rows of one chunk. fp32 inside."""
    rows = z.shape[0]
    if rows == 0:
        return
    assert z.dtype == torch.float32 and z.stride(1) == 1 and z.stride(0) >= v
    assert dz is None or (dz.stride(1) == 1 and dz.shape[1] >= v)
    tile = tiles.lookup("rows", z)
    row_loss_kernel[(rows,)](
        z, target, given, bias, dz_scale,
        dz, logp, logp_cf, weight,
        v, ignore_index,
        z.stride(0), 0 if dz is None else dz.stride(0),
        clip_min, clip_max, 1.0 if softcap is None else softcap, logit_scale,
        SOURCE=SOURCES[source], RATIO=contrast == "ratio", HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
        HAS_DZ_SCALE=dz_scale is not None, NEED_DZ=dz is not None, BLOCK_V=tile.block_n, STAGES=tile.num_stages,
        num_warps=tile.num_warps, enable_fp_fusion=tiles.FP_FUSION,
    )  # fmt: skip
