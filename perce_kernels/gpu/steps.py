"""The ways from operands to log-probabilities and dz (tiles.WAYS), each with the buffers that it needs.

    way      counterfactual rows                        factual rows
    fused    blocked.py: cuBLAS, in blocks of columns   FusedRows: z = h Wᵀ in fp32 by cuBLAS, then row_loss.py, one
                                                        launch for statistics, weights and dz
    stored   lse_gemm.py: no logits at all              StoredLogits: the same GEMM stores z in 16 bits in the place of
                                                        dz, and stored_rows.py overwrites it with dz
    sharded  blocked.py, then statistics are exchanged  ShardedRows: cuBLAS's product with a shard of W, then the halves
                                                        of row_halves.py, and between them the exchange

Counterfactual rows come first, a block of many at once, because only their log-probabilities are needed. Factual rows
follow in chunks; each gets dz (C, pitch) to fill in the operands' dtype, or None if no gradient is needed.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from perce_kernels.contract import Contrasting, Needed
from perce_kernels.gpu import blocked, lse_gemm, row_halves, row_loss, stored_rows
from perce_kernels.gpu.combine import Statistics
from perce_kernels.product import pitch, product, unit_stride
from perce_kernels.row_pass import Given, weigh
from perce_kernels.vocab_parallel import RowParts, Shard, lowest_finite


class Job(NamedTuple):
    """What all chunks of a call have in common. n is the number of computed rows."""

    way: str
    lm_head: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    target: Tensor  # (n,)
    valid: Tensor | None  # (n,); None: all are valid
    source: str  # "logp_cf" or "token_weight": the kind of `given`
    given: Tensor  # (n,); with a counterfactual pass its log-probabilities, filled block by block
    dz_scale: Tensor | None  # () fp32 factor of dz alone
    contrasting: Contrasting
    ignore_index: int
    softcap: float | None
    logit_scale: float
    chunk: int  # rows of the largest chunk
    needed: Needed

    @property
    def need_dz(self) -> bool:
        return any(self.needed)

    @property
    def head(self) -> dict[str, Any]:
        return {"softcap": self.softcap, "logit_scale": self.logit_scale}

    def fp32_logits(self) -> Tensor:
        """The buffer of one chunk's raw products."""
        return self.lm_head.new_empty((self.chunk, pitch(self.lm_head.shape[0])), dtype=torch.float32)


class Step(Protocol):
    """The computation of one way."""

    def counterfactual(self, hidden: Tensor, rows: slice) -> Tensor:
        """(R,) log-probabilities of these rows of the job, from their hidden states (R, D); 0 for ignored rows."""

    def __call__(self, hidden: Tensor, rows: slice, dz: Tensor | None, statistics: list[Tensor]) -> None:
        """Compute one chunk: write dz (C, pitch) up to V, and statistics = [logp, logp_cf, weight], each (C,) fp32."""


def _by_our_gemm(job: Job, hidden: Tensor, rows: slice, stored: Tensor | None = None) -> Statistics:
    options: dict[str, Any] = {"ignore_index": job.ignore_index, "stored": stored, **job.head}
    return lse_gemm.statistics(unit_stride(hidden), job.lm_head, job.target[rows], job.bias, **options)


class FusedRows:
    def __init__(self, job: Job):
        self.job, self.logits = job, job.fp32_logits()

    def counterfactual(self, hidden: Tensor, rows: slice) -> Tensor:
        job = self.job
        options: dict[str, Any] = {"ignore_index": job.ignore_index, **job.head}
        return blocked.statistics(hidden, job.lm_head, job.target[rows], job.bias, self.logits, **options).logp

    def __call__(self, hidden: Tensor, rows: slice, dz: Tensor | None, statistics: list[Tensor]) -> None:
        job, v = self.job, self.job.lm_head.shape[0]
        z = self.logits[: hidden.shape[0]]
        product(hidden, job.lm_head.T, z[:, :v])
        row_loss.row_loss(
            z, job.target[rows], job.given[rows], job.bias, job.dz_scale, dz, *statistics,
            v=v, source=job.source, contrast=job.contrasting.contrast, clip_min=job.contrasting.clip_min,
            clip_max=job.contrasting.clip_max, ignore_index=job.ignore_index, **job.head,
        )  # fmt: skip


class StoredLogits:
    def __init__(self, job: Job):
        self.job = job

    def counterfactual(self, hidden: Tensor, rows: slice) -> Tensor:
        return _by_our_gemm(self.job, hidden, rows).logp

    def __call__(self, hidden: Tensor, rows: slice, dz: Tensor | None, statistics: list[Tensor]) -> None:
        job, v, y = self.job, self.job.lm_head.shape[0], self.job.target[rows]
        found = _by_our_gemm(job, hidden, rows, dz)
        logp, weight = finish(found.logp, job, rows, v, statistics)
        if dz is not None:
            stored_rows.stored_gradient(dz, found, y, logp, weight, job.dz_scale, v=v, **job.head)


class ShardedRows:
    def __init__(self, job: Job, shard: Shard):
        self.job, self.shard, self.logits = job, shard, job.fp32_logits()

    def _whole(self, row_max: Tensor, total: Tensor, z_target: Tensor, column: Tensor) -> RowParts:
        """The statistics of whole rows, from those of each rank's columns."""
        return self.shard.combine(RowParts(row_max, total, z_target - lowest_finite(row_max)), column >= 0)

    def counterfactual(self, hidden: Tensor, rows: slice) -> Tensor:
        job = self.job
        column = self.shard.columns(job.target[rows], job.lm_head.shape[0])
        own = blocked.statistics(hidden, job.lm_head, column, job.bias, self.logits, **job.head)
        return self._whole(own.row_max, own.total, own.z_target, column).logp()

    def __call__(self, hidden: Tensor, rows: slice, dz: Tensor | None, statistics: list[Tensor]) -> None:
        job, v = self.job, self.job.lm_head.shape[0]
        z = self.logits[: hidden.shape[0]]
        product(hidden, job.lm_head.T, z[:, :v])
        column = self.shard.columns(job.target[rows], v)
        row_max, total, z_target = (z.new_full(column.shape, torch.nan) for _ in range(3))
        row_halves.row_parts(z, column, job.bias, row_max, total, z_target, v=v, **job.head)
        whole = self._whole(row_max, total, z_target, column)
        logp, weight = finish(whole.logp(), job, rows, self.shard.vocab_size, statistics)
        if dz is not None:
            row_halves.row_gradient(
                z, column, whole.row_max, whole.total, logp, weight, job.bias, job.dz_scale, dz[:, :v], **job.head
            )


def choose(job: Job, shard: Shard | None) -> Step:
    """The step for this call."""
    if shard is not None:
        return ShardedRows(job, shard)
    return StoredLogits(job) if job.way == "stored" else FusedRows(job)


def finish(logp: Tensor, job: Job, rows: slice, vocab_size: int, statistics: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(C,) logp and weight from the log-probabilities (C,) of a chunk; they are also written to its statistics.

    A target outside the vocabulary gives NaN, as in the row kernel, because the host does not wait for the GPU.
    """
    y, given = job.target[rows], job.given[rows].float()
    outside = (y < 0) | (y >= vocab_size)
    valid = None if job.valid is None else job.valid[rows]
    logp, given = (x.masked_fill(outside, torch.nan) for x in (logp, given))
    cf, token_weight = (given, None) if job.source == "logp_cf" else (None, given)
    logp, weight = weigh(logp, Given(valid, cf, token_weight), job.contrasting)
    if cf is None:
        cf = torch.zeros_like(logp)
    elif valid is not None:
        cf = torch.where(valid, cf, 0)
    for out, value in zip(statistics, (logp, cf, weight), strict=True):
        out.copy_(value)
    return logp, weight
