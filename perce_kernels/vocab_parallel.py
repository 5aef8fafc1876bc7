"""Rows of the head sharded over a process group: the place of a shard, and what the ranks exchange.

Rank r holds the vocabulary [start_r, start_r + V_r): its rows of lm_head and its entries of bias. Hidden states,
targets, weights, options and upstream gradients are the same on every rank. Shards may differ in size or be empty.

    per chunk   m_r, S_r = max z, Σ exp(z − m_r)       over its own columns; −∞ and 0 if it has none
                m = max_r m_r                          one all-reduce (MAX)                      C numbers
                S = Σ_r exp(m_r − m) · S_r             one all-reduce (SUM), together with       2 · C
                z_y − m = Σ_r …                        the term of the one rank that holds y
                                                       (for both passes at once; with backend "triton", for a block
                                                       of chunks of the counterfactual pass)
                logp = (z_y − m) − log S               → weights: the same bits on every rank
                dz over its own columns                → dW_r, db_r: local
    per call    dhidden = Σ_r dz_r W_r                 one all-reduce (SUM) of (N, D) fp32

dhidden is summed once per call and not once per chunk: all of it is held anyway, so summing it in pieces would save no
memory and would cost the latency of one collective per piece.

Ranks stay in step because their loops are the same: the chunk size depends on the whole vocabulary only, and
compact=True drops the same rows everywhere. Each call checks that the shards tile the vocabulary, with 24 bytes per
rank and without waiting for a GPU.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TILING = "vocab_start, vocab_size: expected the shards of the group to tile the vocabulary"


class RowParts(NamedTuple):
    """Partial statistics of R rows, from some of their columns; from all columns, the statistics."""

    row_max: Tensor  # (R,) largest logit; without columns −∞, or a number below any logit
    total: Tensor  # (R,) Σ exp(z − row_max)
    z_target: Tensor  # (R,) the target's logit − row_max, if the target is among the columns
    moment: Tensor | None = None  # (R,) Σ exp(z − row_max)·(z − row_max), for the entropy

    def logp(self) -> Tensor:
        """(R,) log-probabilities, as (z_y − max) − log Σ: a log-sum-exp with a large offset would lose digits."""
        return self.z_target - self.total.log()

    def entropy(self) -> Tensor:
        """(R,) entropies in nats."""
        assert self.moment is not None
        return self.total.log() - self.moment / self.total


class Shard(NamedTuple):
    """This rank's place in the vocabulary."""

    group: "ProcessGroup"
    start: int
    vocab_size: int

    def columns(self, target: Tensor, rows: int) -> Tensor:
        """(R,) columns of the targets in this shard of `rows` rows; −1 for targets in another shard."""
        column = target - self.start
        return torch.where((column >= 0) & (column < rows), column, -1)

    def combine(self, parts: RowParts, here: Tensor) -> RowParts:
        """The statistics of whole rows, from the parts of all ranks. `here` (R,): which targets are in this shard."""
        row_max = parts.row_max.clone()
        dist.all_reduce(row_max, dist.ReduceOp.MAX, self.group)
        down = parts.row_max - lowest_finite(row_max)
        factor = down.exp()
        terms = [factor * parts.total, torch.where(here, parts.z_target + down, 0)]
        if parts.moment is not None:  # exp(down)·down must be 0 at −∞, not NaN
            terms.append(factor * parts.moment + torch.where(factor == 0, 0, factor * down) * parts.total)
        sums = torch.stack(terms)
        self.sum_(sums)
        return RowParts(row_max, *sums)

    def sum_(self, x: Tensor) -> None:
        """Sum x over the ranks, in place."""
        if x.numel() > 0:
            dist.all_reduce(x, dist.ReduceOp.SUM, self.group)


def lowest_finite(row_max: Tensor) -> Tensor:
    """A maximum that can be subtracted: −∞ − (−∞) is NaN, but −∞ minus the lowest finite number is −∞."""
    return row_max.clamp(min=torch.finfo(row_max.dtype).min)


def place(group: Any, vocab_start: Any, vocab_size: Any, lm_head: Tensor) -> tuple[str | None, int | None, int | None]:
    """The arguments in the form for the registered ops; ValueError unless they place lm_head inside the vocabulary."""
    given = {"group": group, "vocab_start": vocab_start, "vocab_size": vocab_size}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None, None, None
    if missing:
        raise ValueError(f"{', '.join(missing)}: expected group, vocab_start and vocab_size together, got None")
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        remedy = ". Pass mesh.get_group()" if hasattr(group, "get_group") else ""
        raise ValueError(
            f"group: expected a torch.distributed.ProcessGroup that this rank belongs to, got {group!r}{remedy}"
        )
    for name in ("vocab_start", "vocab_size"):
        if isinstance(given[name], bool) or not isinstance(given[name], int | torch.SymInt):
            raise ValueError(f"{name}: expected an int, got {given[name]!r}")
    if vocab_size < 1:
        raise ValueError(f"vocab_size: expected the number of rows of the whole lm_head, >= 1, got {vocab_size}")
    if not 0 <= vocab_start <= vocab_size - lm_head.shape[0]:
        raise ValueError(
            f"vocab_start: expected {lm_head.shape[0]} rows of lm_head inside [0, {vocab_size}), "
            f"got [{vocab_start}, {vocab_start + lm_head.shape[0]})"
        )
    return group.group_name, vocab_start, vocab_size


def resolve(group: str | None, vocab_start: int | None, vocab_size: int | None, lm_head: Tensor) -> Shard | None:
    """The shard that a registered op was called with; its group is found by name, and the tiling is checked."""
    if group is None:
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group

    assert vocab_start is not None and vocab_size is not None
    shard = Shard(_resolve_process_group(group), vocab_start, vocab_size)  # type: ignore[arg-type]
    _check_tiling(shard, lm_head)
    return shard


def _check_tiling(shard: Shard, lm_head: Tensor) -> None:
    """ValueError on every rank unless each id belongs to exactly one shard; on a GPU an asynchronous assertion."""
    rows = lm_head.shape[0]
    start = shard.start if rows else shard.vocab_size  # an empty shard may be anywhere; at the end it has no effect
    mine = torch.full((1, 3), shard.vocab_size, dtype=torch.int64, device=lm_head.device)
    mine[:, 0].fill_(start)  # filled in place, because making a tensor from Python numbers would wait for the GPU
    mine[:, 1].fill_(start + rows)
    table = mine.new_empty((shard.group.size(), 3))
    dist.all_gather_into_tensor(table, mine, shard.group)
    # c(v) = #{starts ≤ v} − #{ends ≤ v} shards hold id v. It is 1 everywhere exactly if each end is the next start.
    edges = torch.cat([table[:, 0].sort().values, mine[0, 2:]])
    ends = torch.cat([torch.zeros_like(mine[0, 2:]), table[:, 1].sort().values])
    fine = (edges == ends).all() & (table[:, 2] == shard.vocab_size).all()
    if lm_head.device.type != "cpu":
        torch._assert_async(fine, TILING)
    elif not fine:
        held = ", ".join(f"[{start}, {end}) of {size}" for start, end, size in table.tolist())
        raise ValueError(f"{TILING}, got {held} on ranks 0 to {shard.group.size() - 1}")
