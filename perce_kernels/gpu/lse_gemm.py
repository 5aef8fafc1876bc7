"""The GEMM that keeps log-probabilities and writes no logits (token_logprobs, the E-step, scoring), or 16-bit ones.

    x  = h Wᵀ                                  (n, V), one (BLOCK_M, BLOCK_N) tile a program, fp32 accumulators
    z  = cap · tanh(scale · (x + b) / cap)     as in row_loss.py
    of tile t, per row:                        m_t = max z,   s_t = Σ exp(z − m_t),   u_t = Σ exp(z − m_t)·(z − m_t)

    combined over the tiles of a row:          m = max m_t        S = Σ s_t exp(m_t − m)
    logp    = (z_y − m) − log S                z_y by the one tile that holds column y
    entropy = log S − U/S                      U = Σ exp(m_t − m) · (u_t + (m_t − m)·s_t) = Σ exp(z − m)·(z − m)

Every exponent is relative to a maximum, so that a large offset common to the logits cancels before anything is rounded.
The gradient is not here: it needs p_v of every column. Either the row kernel's computes the products again, or, asked
to, the epilogue stores s_v = z_v − m_t of the first rows in the operands' dtype, for stored_rows.py to turn into it.

    traffic    partials (T, n) with T = ⌈V/BLOCK_N⌉: 8 bytes (12 with entropy) for BLOCK_N logits of 4
    order      programs run down GROUP_M row tiles before the next column tile: these share W's tile in the L2 cache
    operands   tensor descriptors (TMA) if the tile says so and base and pitch are multiples of 16 bytes, else pointers
    padding    columns ≥ V become −inf after the cap; D is padded with zeros by either kind of load
    target     ignored: 0. Outside [0, V): no tile stores z_y, which stays the NaN that it was filled with.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from perce_kernels.gpu import tiles
from perce_kernels.gpu.row_loss import transform

BLOCK_COMBINE = 128


@triton.jit(do_not_specialize=["softcap", "logit_scale"])
def lse_gemm_kernel(
    # inputs
    h_src, w_src,  # (n, D), (V, D): pointers, or descriptors with blocks (BLOCK_M, BLOCK_K), (BLOCK_N, BLOCK_K)
    target_ptr,  # (n,) int64
    bias_ptr,  # (V,)
    # outputs
    max_ptr, sum_ptr,  # (T, n) fp32
    moment_ptr,  # (T, n) fp32, with HAS_ENTROPY
    z_target_ptr,  # (n,) fp32
    stored_ptr,  # (n_stored, V) 16 bits, with STORE
    # sizes
    n, V, D, n_stored,
    # strides
    stride_hn, stride_wv, stride_stored,
    # scalars
    softcap, logit_scale,
    # constants
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, STORE: tl.constexpr,
    USE_TMA: tl.constexpr, UPCAST: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(n, BLOCK_M)
    tiles_n = tl.cdiv(V, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP_M * tiles_n)
    rows_in_group = min(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (pid % (GROUP_M * tiles_n)) % rows_in_group
    tile_n = (pid % (GROUP_M * tiles_n)) // rows_in_group

    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if not USE_TMA:
        # Rows past the end read the last one: their results are not stored, and loads stay unmasked in this axis.
        h_rows = h_src + tl.minimum(offs_m, n - 1).to(tl.int64)[:, None] * stride_hn
        w_rows = w_src + tl.minimum(offs_v, V - 1).to(tl.int64)[:, None] * stride_wv
    for start in tl.range(0, D, BLOCK_K):
        if USE_TMA:
            h = h_src.load([tile_m * BLOCK_M, start])
            w = w_src.load([tile_n * BLOCK_N, start])
        else:
            offs_k = start + tl.arange(0, BLOCK_K)
            h = tl.load(h_rows + offs_k[None, :], mask=offs_k[None, :] < D, other=0.0)
            w = tl.load(w_rows + offs_k[None, :], mask=offs_k[None, :] < D, other=0.0)
        if UPCAST:  # the interpreter multiplies bf16 as if it were integers
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(h, w.T, acc, input_precision="ieee")

    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
    z = transform(acc, bias, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
    mask_n = offs_m < n
    y = tl.load(target_ptr + offs_m, mask=mask_n, other=-1)
    is_target = (offs_v[None, :] == y[:, None]) & (offs_v < V)[None, :]
    z_y = tl.sum(tl.where(is_target, z, 0.0), 1)
    tl.store(z_target_ptr + offs_m, z_y, mask=mask_n & (y // BLOCK_N == tile_n) & (y >= 0) & (y < V))

    z = tl.where((offs_v < V)[None, :], z, float("-inf"))
    tile_max = tl.max(z, 1)
    shift = tl.where(tile_max == float("-inf"), 0.0, tile_max)  # −inf − (−inf) is NaN
    z -= shift[:, None]
    if STORE:  # to the pitch: a multiple of 16, so that stores stay wide whatever V is
        at = stored_ptr + offs_m.to(tl.int64)[:, None] * stride_stored + offs_v[None, :]
        mask = (offs_m < n_stored)[:, None] & (offs_v < stride_stored)[None, :]
        tl.store(at, z.to(stored_ptr.dtype.element_ty), mask=mask)
    p = tl.exp(z)
    partial = tile_n.to(tl.int64) * n + offs_m
    tl.store(max_ptr + partial, tile_max, mask=mask_n)
    tl.store(sum_ptr + partial, tl.sum(p, 1), mask=mask_n)
    if HAS_ENTROPY:
        tl.store(moment_ptr + partial, tl.sum(tl.where(p > 0, p * z, 0.0), 1), mask=mask_n)  # 0 · −inf is NaN


@triton.jit(do_not_specialize=["ignore_index"])
def combine_kernel(
    # inputs
    max_ptr, sum_ptr, moment_ptr,  # (T, n)
    z_target_ptr, target_ptr,  # (n,)
    # outputs
    logp_ptr, row_max_ptr, total_ptr,  # (n,)
    entropy_ptr, row_moment_ptr,  # (n,), with HAS_ENTROPY
    # sizes
    n, T, ignore_index,
    # constants
    HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    row_max = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    at = offs.to(tl.int64)
    for _ in tl.range(0, T):
        tile_max = tl.load(max_ptr + at, mask=mask, other=float("-inf"))
        tile_sum = tl.load(sum_ptr + at, mask=mask, other=0.0)
        new_max = tl.maximum(row_max, tile_max)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        # What was gathered relative to an older maximum moves by `down`; −inf (nothing gathered) must stay 0.
        down = tl.where(row_max == float("-inf"), 0.0, row_max - shift)
        tile_down = tl.where(tile_max == float("-inf"), 0.0, tile_max - shift)
        if HAS_ENTROPY:
            tile_moment = tl.load(moment_ptr + at, mask=mask, other=0.0)
            moment = tl.exp(down) * (moment + down * total) + tl.exp(tile_down) * (tile_moment + tile_down * tile_sum)
        total = tl.exp(down) * total + tl.exp(tile_down) * tile_sum
        row_max = new_max
        at += n
    ignored = tl.load(target_ptr + offs, mask=mask, other=0) == ignore_index
    z_y = tl.load(z_target_ptr + offs, mask=mask, other=0.0)
    logp = (z_y - row_max) - tl.log(total)
    tl.store(logp_ptr + offs, tl.where(ignored, 0.0, logp), mask=mask)
    tl.store(row_max_ptr + offs, row_max, mask=mask)
    tl.store(total_ptr + offs, total, mask=mask)
    if HAS_ENTROPY:
        tl.store(row_moment_ptr + offs, moment, mask=mask)
        entropy = tl.log(total) - moment / total
        tl.store(entropy_ptr + offs, tl.where(ignored, 0.0, entropy), mask=mask)


def _describable(*operands: Tensor) -> bool:
    """Whether the copy engine can read these: base and rows at multiples of 16 bytes."""
    return all(x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 for x in operands)


class Statistics(NamedTuple):
    """What the GEMM tells of n rows, all fp32; entropy and moment on request."""

    logp: Tensor  # (n,) 0 where ignored
    entropy: Tensor | None  # (n,) in nats, 0 where ignored
    row_max: Tensor  # (n,)
    total: Tensor  # (n,) Σ exp(z − row_max)
    moment: Tensor | None  # (n,) Σ exp(z − row_max)·(z − row_max)
    z_target: Tensor  # (n,) the target's logit, NaN where no column is the target's
    tile_max: Tensor  # (T, n)
    tile_columns: int  # V = (T − 1) · tile_columns + the last tile's


def statistics(
    hidden: Tensor,  # (n, D), unit stride in D
    lm_head: Tensor,  # (V, D), unit stride in D
    target: Tensor,  # (n,) int64
    bias: Tensor | None,  # (V,)
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    stored: Tensor | None = None,  # (≤ n, pitch), out
) -> Statistics:
    """Both launches; V may be 0. `stored` takes z − tile_max of as many first rows, and −∞ from V to its pitch."""
    (n, d), v = hidden.shape, lm_head.shape[0]
    tile = tiles.lookup("lse_gemm" if stored is None else "store_gemm", hidden, d)
    tiles_m, tiles_n = triton.cdiv(n, tile.block_m), triton.cdiv(v, tile.block_n)

    logp, row_max, total = (hidden.new_empty(n, dtype=torch.float32) for _ in range(3))
    z_target = torch.full_like(logp, float("nan"))
    maxima, sums = (logp.new_empty(tiles_n, n) for _ in range(2))
    moments = entropy = moment = None
    if return_entropy:
        moments, entropy, moment = torch.empty_like(maxima), torch.empty_like(logp), torch.empty_like(logp)
    result = Statistics(logp, entropy, row_max, total, moment, z_target, maxima, tile.block_n)
    if n == 0:
        return result
    assert hidden.stride(1) == lm_head.stride(1) == 1
    if tiles_n > 0:
        use_tma = tile.use_tma and _describable(hidden, lm_head)
        h_src, w_src = hidden, lm_head
        if use_tma:
            from triton.tools.tensor_descriptor import TensorDescriptor

            h_src = TensorDescriptor.from_tensor(hidden, [tile.block_m, tile.block_k])
            w_src = TensorDescriptor.from_tensor(lm_head, [tile.block_n, tile.block_k])
        lse_gemm_kernel[(tiles_m * tiles_n,)](
            h_src, w_src, target, bias,
            maxima, sums, moments, z_target, stored,
            n, v, d, 0 if stored is None else stored.shape[0],
            hidden.stride(0), lm_head.stride(0), 0 if stored is None else stored.stride(0),
            1.0 if softcap is None else softcap, logit_scale,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, HAS_ENTROPY=return_entropy,
            STORE=stored is not None, USE_TMA=use_tma, UPCAST=tiles.architecture(hidden.device) == tiles.INTERPRETER,
            GROUP_M=tile.group_m, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    combine(result, sums, moments, target, ignore_index)
    return result


def combine(
    result: Statistics,  # z_target and tile_max given, the others out
    sums: Tensor,  # (T, n)
    moments: Tensor | None,  # (T, n), where there is an entropy
    target: Tensor,  # (n,) int64
    ignore_index: int,
) -> None:
    """Launch the kernel that makes rows' statistics of tiles'."""
    tiles_n, n = result.tile_max.shape
    combine_kernel[(triton.cdiv(n, BLOCK_COMBINE),)](
        result.tile_max, sums, moments, result.z_target, target, result.logp, result.row_max, result.total,
        result.entropy, result.moment, n, tiles_n, ignore_index,
        HAS_ENTROPY=moments is not None, BLOCK=BLOCK_COMBINE, num_warps=4,
    )  # fmt: skip


def logprobs(
    hidden: Tensor, lm_head: Tensor, target: Tensor, bias: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """(n,) fp32 log-probabilities and, on request, predictive entropies in nats; 0 where ignored."""
    return statistics(hidden, lm_head, target, bias, **options)[:2]
