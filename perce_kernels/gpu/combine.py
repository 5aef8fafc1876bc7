"""Combines the statistics of tiles of columns into those of a row: log-probability, and entropy on request.

    of tile t, per row      m_t = max z,   s_t = Σ exp(z − m_t),   u_t = Σ exp(z − m_t)·(z − m_t)
    of the row              m = max m_t,   S = Σ s_t exp(m_t − m)
    logp    = (z_y − m) − log S            z_y from the one tile that holds column y
    entropy = log S − U/S                  U = Σ exp(m_t − m) · (u_t + (m_t − m)·s_t) = Σ exp(z − m)·(z − m)

Every exponent is relative to a maximum, so that a large offset common to the logits cancels before anything is rounded.

    programs   one per BLOCK rows. It takes BLOCK_T tiles at once and prefetches the next ones; each lane combines its
               own share of them, and the lanes exchange results at the end. Tile by tile, a program would wait for the
               memory a thousand times
    target     ignored: 0. Outside the vocabulary: z_y is the NaN that it was filled with
    no tiles   m = LOWEST, S = 0, as in a shard without columns; logits below LOWEST count as nothing
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from perce_kernels.gpu.row_loss import LOWEST
from perce_kernels.gpu.tiles import FP_FUSION

BLOCK, BLOCK_T = 16, 64
WARPS, STAGES = 4, 3


class Statistics(NamedTuple):
    """Statistics of n rows from all their logits, in fp32; entropy and moment on request."""

    logp: Tensor  # (n,) 0 where ignored
    entropy: Tensor | None  # (n,) in nats, 0 where ignored
    row_max: Tensor  # (n,)
    total: Tensor  # (n,) Σ exp(z − row_max)
    moment: Tensor | None  # (n,) Σ exp(z − row_max)·(z − row_max)
    z_target: Tensor  # (n,) the target's logit, NaN if no column is the target's
    tile_max: Tensor  # (T, n)
    columns: int  # of a tile; the last tile has the rest


class TileStatistics(NamedTuple):
    """Statistics of n rows from each tile of columns, in fp32."""

    row_max: Tensor  # (T, n)
    total: Tensor  # (T, n)
    moment: Tensor | None  # (T, n), if an entropy is wanted
    z_target: Tensor  # (n,)
    columns: int  # of a tile; the last tile has the rest

    @classmethod
    def empty(cls, v: int, columns: int, n: int, device: torch.device, with_moment: bool = False) -> "TileStatistics":
        """Uninitialised statistics for v columns in tiles of `columns`; z_target is NaN until it is written."""
        fp32: Any = {"dtype": torch.float32, "device": device}  # whatever torch's default dtype is
        parts = [torch.empty(-(-v // columns), n, **fp32) for _ in range(2 + with_moment)]
        z_target = torch.full((n,), float("nan"), **fp32)
        return cls(parts[0], parts[1], parts[2] if with_moment else None, z_target, columns)


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
    HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    running_max = tl.full([BLOCK_T, BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_T, BLOCK], tl.float32)
    moment = tl.zeros([BLOCK_T, BLOCK], tl.float32)
    for start in tl.range(0, T, BLOCK_T, num_stages=STAGES):
        offs_t = start + tl.arange(0, BLOCK_T)
        at = offs_t.to(tl.int64)[:, None] * n + offs[None, :]
        here = (offs_t < T)[:, None] & mask[None, :]
        tile_max = tl.load(max_ptr + at, mask=here, other=float("-inf"))
        tile_sum = tl.load(sum_ptr + at, mask=here, other=0.0)
        new_max = tl.maximum(running_max, tile_max)
        # Sums relative to an older maximum are rescaled by `down`; in a tile of −∞ there is nothing to rescale.
        down = running_max - new_max
        tile_down = tl.where(tile_max == float("-inf"), 0.0, tile_max - new_max)
        if HAS_ENTROPY:
            tile_moment = tl.load(moment_ptr + at, mask=here, other=0.0)
            moment = tl.exp(down) * (moment + down * total) + tl.exp(tile_down) * (tile_moment + tile_down * tile_sum)
        total = tl.exp(down) * total + tl.exp(tile_down) * tile_sum
        running_max = new_max
    row_max = tl.max(running_max, 0)
    down = running_max - row_max[None, :]
    row_total = tl.sum(tl.exp(down) * total, 0)

    ignored = tl.load(target_ptr + offs, mask=mask, other=0) == ignore_index
    z_y = tl.load(z_target_ptr + offs, mask=mask, other=0.0)
    logp = (z_y - row_max) - tl.log(row_total)
    tl.store(logp_ptr + offs, tl.where(ignored, 0.0, logp), mask=mask)
    tl.store(row_max_ptr + offs, row_max, mask=mask)
    tl.store(total_ptr + offs, row_total, mask=mask)
    if HAS_ENTROPY:
        row_moment = tl.sum(tl.exp(down) * (moment + down * total), 0)
        tl.store(row_moment_ptr + offs, row_moment, mask=mask)
        entropy = tl.log(row_total) - row_moment / row_total
        tl.store(entropy_ptr + offs, tl.where(ignored, 0.0, entropy), mask=mask)


def combine(tiles: TileStatistics, target: Tensor, ignore_index: int) -> Statistics:
    """Launch the kernel over n rows with targets (n,)."""
    count, n = tiles.row_max.shape
    row_max, total, logp = (torch.empty_like(tiles.z_target) for _ in range(3))
    entropy = moment = None
    if tiles.moment is not None:
        entropy, moment = torch.empty_like(logp), torch.empty_like(logp)
    if n > 0:
        combine_kernel[(triton.cdiv(n, BLOCK),)](
            tiles.row_max, tiles.total, tiles.moment, tiles.z_target, target, logp, row_max, total, entropy, moment,
            n, count, ignore_index,
            HAS_ENTROPY=moment is not None, BLOCK=BLOCK, BLOCK_T=BLOCK_T, STAGES=STAGES, num_warps=WARPS,
            enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return Statistics(logp, entropy, row_max, total, moment, tiles.z_target, tiles.row_max, tiles.columns)
