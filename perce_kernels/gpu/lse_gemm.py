"""The GEMM that keeps log-probabilities and writes no logits (token_logprobs, the E-step, scoring), or 16-bit logits.

    x  = h Wᵀ                                  one (BLOCK_M, BLOCK_N) tile at a time, fp32 accumulators
    z  = cap · tanh(scale · (x + b) / cap)     as in row_loss.py
    of tile t, per row:                        m_t = max z,   s_t = Σ exp(z − m_t),   u_t = Σ exp(z − m_t)·(z − m_t)

combine.py combines them into the statistics of rows. The gradient is computed elsewhere, because it needs p_v of every
column: either the row kernel computes the products again, or the epilogue, if asked to, stores s_v = z_v − m_t in the
operands' dtype, which stored_rows.py overwrites with the gradient.

    traffic    partials (T, n) with T = ⌈V/128⌉: 8 bytes (12 with entropy) per 128 logits of 4 bytes
    order      tiles go through GROUP_M row tiles before the next column tile: these share W's tile in the L2 cache
    operands   tensor descriptors (TMA) if the tile says so and base and pitch are multiples of 16 bytes, else pointers;
               stored logits are written in the same way
    epilogue   of at most 128 columns: to save registers, a wider tile is reduced in halves, each a tile of statistics;
               only tiles that hold a target search for it
    persistent one program per multiprocessor takes tile after tile: the operands of the next tile are loaded while the
               epilogue runs
    padding    columns ≥ V become −inf after the cap; D is padded with zeros by either kind of load
    target     outside [0, V): no tile stores z_y, which stays the NaN that it was filled with
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from perce_kernels.gpu import tiles
from perce_kernels.gpu.combine import Statistics, TileStatistics, combine
from perce_kernels.gpu.row_loss import LOWEST, exp_above, reference_of, residual, transform


@triton.jit
def tile_statistics(
    acc, tile_m, tile_n, inputs, outputs, n, V, softcap, logit_scale, stride_stored, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, STORE: tl.constexpr, USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The epilogue: the statistics of rows from one tile of raw products."""
    target_ptr, bias_ptr = inputs
    max_ptr, sum_ptr, moment_ptr, z_target_ptr, stored = outputs
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tile_n * COLUMNS + tl.arange(0, COLUMNS)
    mask_n = offs_m < tl.where(tile_n * COLUMNS < V, n, 0)  # the second half of a tile may begin after the end
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
    z = transform(acc, bias, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
    y = tl.load(target_ptr + offs_m, mask=mask_n, other=-1)
    here = (y >= tile_n * COLUMNS) & (y < min((tile_n + 1) * COLUMNS, V))
    if tl.max(here.to(tl.int32), 0) > 0:  # a tile without a target does not search for one
        column = tl.where(here, y - tile_n * COLUMNS, -1).to(tl.int32)
        z_y = tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == column[:, None], z, 0.0), 1)
        tl.store(z_target_ptr + offs_m, z_y, mask=mask_n & here)

    z = tl.where((offs_v < V)[None, :], z, float("-inf"))
    tile_max = tl.max(z, 1)
    largest = tl.maximum(tile_max, LOWEST)
    reference = reference_of(largest)
    if STORE:  # up to the pitch, a multiple of 16, so that stores stay wide whatever V is
        s = z - largest[:, None]
        if USE_TMA:
            stored.store([tile_m * BLOCK_M, tile_n * COLUMNS], s.to(stored.dtype))
        else:
            at = stored + offs_m.to(tl.int64)[:, None] * stride_stored + offs_v[None, :]
            tl.store(at, s.to(stored.dtype.element_ty), mask=mask_n[:, None] & (offs_v < stride_stored)[None, :])
    p = exp_above(z, reference[:, None])
    exact = 1 / residual(largest, reference)
    partial = tile_n.to(tl.int64) * n + offs_m
    tl.store(max_ptr + partial, tile_max, mask=mask_n)
    tl.store(sum_ptr + partial, tl.sum(p, 1) * exact, mask=mask_n)
    if HAS_ENTROPY:
        moment = tl.sum(tl.where(p > 0, p * (z - tile_max[:, None]), 0.0), 1)  # 0 · −inf is NaN
        tl.store(moment_ptr + partial, moment * exact, mask=mask_n)


@triton.jit
def one_tile(
    tile, operands, inputs, outputs, n, V, D, strides, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, STORE: tl.constexpr,
    USE_TMA: tl.constexpr, UPCAST: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The product of one tile, and its epilogue."""
    h_src, w_src = operands
    stride_hn, stride_wv, stride_stored = strides
    tiles_m = tl.cdiv(n, BLOCK_M)
    tiles_n = tl.cdiv(V, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    rows_in_group = min(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (tile % (GROUP_M * tiles_n)) % rows_in_group
    tile_n = (tile % (GROUP_M * tiles_n)) // rows_in_group

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if not USE_TMA:
        # Rows after the end read the last row. Their results are not stored, and loads need no mask in this axis.
        offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_v = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
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

    if COLUMNS < BLOCK_N:
        parts = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, COLUMNS)), (0, 2, 1)))
    else:
        parts = (acc,)
    for part in tl.static_range(BLOCK_N // COLUMNS):
        tile_statistics(
            parts[part], tile_m, tile_n * (BLOCK_N // COLUMNS) + part, inputs, outputs, n, V, softcap, logit_scale,
            stride_stored, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY, STORE, USE_TMA, BLOCK_M, COLUMNS,
        )  # fmt: skip


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
    stored,  # (n, V) 16 bits, with STORE: a pointer, or a descriptor with blocks (BLOCK_M, COLUMNS)
    # sizes
    n, V, D,
    # strides
    stride_hn, stride_wv, stride_stored,
    # scalars
    softcap, logit_scale,
    # constants
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, STORE: tl.constexpr,
    USE_TMA: tl.constexpr, PERSISTENT: tl.constexpr, UPCAST: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    operands = (h_src, w_src)
    inputs = (target_ptr, bias_ptr)
    outputs = (max_ptr, sum_ptr, moment_ptr, z_target_ptr, stored)
    strides = (stride_hn, stride_wv, stride_stored)
    first = tl.program_id(0)
    if PERSISTENT:
        tiles = tl.cdiv(n, BLOCK_M) * tl.cdiv(V, BLOCK_N)
        for tile in tl.range(first, tiles, tl.num_programs(0), flatten=True):
            one_tile(
                tile, operands, inputs, outputs, n, V, D, strides, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP,
                HAS_ENTROPY, STORE, USE_TMA, UPCAST, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K, COLUMNS,
            )  # fmt: skip
    else:
        one_tile(
            first, operands, inputs, outputs, n, V, D, strides, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP,
            HAS_ENTROPY, STORE, USE_TMA, UPCAST, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K, COLUMNS,
        )  # fmt: skip


def by_pointers(tile: tiles.Tile) -> tiles.Tile:
    """The tile to use if the copy engine cannot read the operands: half as wide, as addresses take registers."""
    return tile._replace(block_n=tile.block_n // 2, use_tma=False, persistent=False) if tile.use_tma else tile


def _describable(*operands: Tensor) -> bool:
    """Whether the copy engine can read them: base and rows begin at multiples of 16 bytes, and rows do not overlap."""
    return all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 and x.stride(0) >= x.shape[1] for x in operands
    )


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
    stored: Tensor | None = None,  # (n, pitch), out
) -> Statistics:
    """Launch both kernels; V may be 0. `stored` is filled with z − tile_max, and with −∞ from V to its pitch."""
    (n, d), v = hidden.shape, lm_head.shape[0]
    tile = tiles.lookup("lse_gemm" if stored is None else "store_gemm", hidden)
    use_tma = tile.use_tma and _describable(hidden, lm_head, *(() if stored is None else (stored,)))
    tile = tile if use_tma else by_pointers(tile)
    columns = tile.statistics_columns
    parts = TileStatistics.empty(v, columns, n, hidden.device, with_moment=return_entropy)
    assert hidden.stride(1) == lm_head.stride(1) == 1
    count = triton.cdiv(n, tile.block_m) * triton.cdiv(v, tile.block_n)
    if count > 0:
        h_src, w_src, stored_dst = hidden, lm_head, stored
        if tile.use_tma:
            from triton.tools.tensor_descriptor import TensorDescriptor

            h_src = TensorDescriptor.from_tensor(hidden, [tile.block_m, tile.block_k])
            w_src = TensorDescriptor.from_tensor(lm_head, [tile.block_n, tile.block_k])
            if stored is not None:
                stored_dst = TensorDescriptor.from_tensor(stored, [tile.block_m, columns])
        programs = min(count, tiles.multiprocessors(hidden.device)) if tile.persistent else count
        lse_gemm_kernel[(programs,)](
            h_src, w_src, target, bias,
            parts.row_max, parts.total, parts.moment, parts.z_target, stored_dst,
            n, v, d,
            hidden.stride(0), lm_head.stride(0), 0 if stored is None else stored.stride(0),
            1.0 if softcap is None else softcap, logit_scale,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, HAS_ENTROPY=return_entropy,
            STORE=stored is not None, USE_TMA=tile.use_tma, PERSISTENT=tile.persistent,
            UPCAST=tiles.architecture(hidden.device) == tiles.INTERPRETER, GROUP_M=tile.group_m,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, COLUMNS=columns,
            num_warps=tile.num_warps, enable_fp_fusion=tiles.FP_FUSION, num_stages=tile.num_stages,
        )  # fmt: skip
    return combine(parts, target, ignore_index)


def logprobs(
    hidden: Tensor, lm_head: Tensor, target: Tensor, bias: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(n,) fp32 log-probabilities; on request entropies in nats, both 0 where ignored; and whether z_y is largest."""
    found = statistics(hidden, lm_head, target, bias, **options)
    return found.logp, found.entropy, found.z_target >= found.row_max
