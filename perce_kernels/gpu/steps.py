"""From a chunk's operands to its statistics and to dz: the ways there are, each with the buffers that it needs.

    FusedRows     z = h Wᵀ in fp32 by cuBLAS, then row_loss.py: one launch for statistics, weights and dz over z
    StoredLogits  lse_gemm.py: statistics of both passes, and z of the factual rows in 16 bits, which stored_rows.py
                  turns into dz; nothing is written for the counterfactual rows
    ShardedRows   the first's product with a shard of W, then shard_rows.py: the ranks exchange statistics in between

A step returns dz (C, V) in the operands' dtype, lying in its buffer until the next chunk, or None where no gradient is
needed.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from perce_kernels.arguments import Needed
from perce_kernels.gpu import lse_gemm, row_loss, shard_rows, stored_rows, tiles
from perce_kernels.row_pass import Contrasting, Given, weigh
from perce_kernels.vocab_parallel import Shard

PITCH = 64
"""Logits rows start at multiples of this many fp32: 256 bytes, what vector loads and cuBLAS want of any V."""


def pitch(v: int) -> int:
    """Elements from one row of the logits to the next."""
    return -(-v // PITCH) * PITCH


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out (+)= a @ b with fp32 accumulation and output. CPU products have no out_dtype: operands are upcast there."""
    if a.device.type == "cpu":
        a, b = a.to(out.dtype), b.to(out.dtype)
    mixed: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if 0 in a.shape or 0 in b.shape:  # an empty shard
        if not add:
            out.zero_()
    elif add:
        torch.addmm(out, a, b, out=out, **mixed)
    else:
        torch.mm(a, b, out=out, **mixed)


class Job(NamedTuple):
    """What the chunks of a call have in common; n computed rows, passes = 2 with a counterfactual pass."""

    lm_head: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    target: Tensor  # (n,)
    valid: Tensor | None  # (n,) or None: all valid
    logp_cf: Tensor | None  # (n,)
    token_weight: Tensor | None  # (n,)
    dz_scale: Tensor | None  # () fp32 factor of dz alone
    contrasting: Contrasting
    ignore_index: int
    softcap: float | None
    logit_scale: float
    passes: int
    size: int  # rows of the largest chunk
    needed: Needed

    @property
    def need_dz(self) -> bool:
        return any(self.needed)

    @property
    def head(self) -> dict[str, Any]:
        return {"softcap": self.softcap, "logit_scale": self.logit_scale}

    def given(self, chunk: slice) -> Given:
        return Given(*(None if x is None else x[chunk] for x in (self.valid, self.logp_cf, self.token_weight)))


class Step(Protocol):
    """One chunk: statistics = [logp, logp_cf, weight], each (C,) fp32, are written."""

    def __call__(self, operands: Tensor, chunk: slice, statistics: list[Tensor]) -> Tensor | None: ...


def fp32_logits(job: Job) -> Tensor:
    """The buffer of one chunk's raw products. An empty shard has rows of some length too."""
    shape = job.passes * job.size, pitch(max(job.lm_head.shape[0], 1))
    return job.lm_head.new_empty(shape, dtype=torch.float32)


class FusedRows:
    def __init__(self, job: Job):
        self.job, self.logits = job, fp32_logits(job)
        self.given = job.logp_cf if job.token_weight is None else job.token_weight
        self.source = "hidden_cf"
        if self.given is not None:
            self.source = "logp_cf" if job.token_weight is None else "token_weight"

    def __call__(self, operands: Tensor, chunk: slice, statistics: list[Tensor]) -> Tensor | None:
        job, v, c = self.job, self.job.lm_head.shape[0], chunk.stop - chunk.start
        z = self.logits[: operands.shape[0]]
        product(operands, job.lm_head.T, z[:, :v])
        dz = row_loss.overlay(z[:c], v, operands.dtype) if job.need_dz else None
        row_loss.row_loss(
            z[:c], z[c:] if job.passes == 2 else None, job.target[chunk],
            None if self.given is None else self.given[chunk], job.bias, job.dz_scale, dz, *statistics,
            v=v, source=self.source, contrast=job.contrasting.contrast, clip_min=job.contrasting.clip_min,
            clip_max=job.contrasting.clip_max, ignore_index=job.ignore_index, **job.head,
        )  # fmt: skip
        return dz


class StoredLogits:
    def __init__(self, job: Job):
        self.job, v = job, job.lm_head.shape[0]
        self.stored = job.lm_head.new_empty((job.size, pitch(v))) if job.need_dz else None

    def __call__(self, operands: Tensor, chunk: slice, statistics: list[Tensor]) -> Tensor | None:
        job, v, y = self.job, self.job.lm_head.shape[0], self.job.target[chunk]
        operands = operands if operands.stride(1) == 1 else operands.contiguous()
        stored = None if self.stored is None else self.stored[: y.shape[0]]
        rows = lse_gemm.statistics(
            operands,
            job.lm_head,
            y.repeat(job.passes),
            job.bias,
            ignore_index=job.ignore_index,
            stored=stored,
            **job.head,
        )
        logp, weight = finish(rows.logp, job, chunk, v, statistics)
        if stored is None:
            return None
        stored_rows.stored_gradient(stored, rows, y, logp, weight, job.dz_scale, v=v, **job.head)
        return stored[:, :v]


class ShardedRows:
    def __init__(self, job: Job, shard: Shard):
        self.job, self.shard, self.logits = job, shard, fp32_logits(job)

    def __call__(self, operands: Tensor, chunk: slice, statistics: list[Tensor]) -> Tensor | None:
        job, v, c = self.job, self.job.lm_head.shape[0], chunk.stop - chunk.start
        z = self.logits[: operands.shape[0]]
        product(operands, job.lm_head.T, z[:, :v])
        column = self.shard.columns(job.target[chunk], v)
        parts = shard_rows.row_parts(z, column.repeat(job.passes), job.bias, v=v, **job.head)
        whole = self.shard.combine(parts, column.repeat(job.passes) >= 0)
        logp, weight = finish(whole.logp(), job, chunk, self.shard.vocab_size, statistics)
        if not job.need_dz:
            return None
        dz = row_loss.overlay(z[:c], v, operands.dtype)
        shard_rows.row_gradient(
            z[:c], column, whole.row_max[:c], whole.total[:c], logp, weight, job.bias, job.dz_scale, dz, **job.head
        )
        return dz


def choose(job: Job, shard: Shard | None) -> Step:
    """The step of this call: by the table of tiles, where there is a choice."""
    if shard is not None:
        return ShardedRows(job, shard)
    d = job.lm_head.shape[1]
    stores = job.lm_head.stride(1) == 1 and tiles.in_use("store_gemm", job.lm_head, d)
    return StoredLogits(job) if stores else FusedRows(job)


def finish(logp: Tensor, job: Job, chunk: slice, vocab_size: int, statistics: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(C,) logp and weight from the log-probabilities (passes · C,) of a chunk, which also become its statistics.

    A target outside the vocabulary leaves NaN, as in the row kernel; nothing waits for the GPU to see it.
    """
    y, given = job.target[chunk], job.given(chunk)
    outside = (y < 0) | (y >= vocab_size)
    logp, *logp_cf = logp.masked_fill(outside.repeat(job.passes), torch.nan).split(y.shape[0])
    if given.token_weight is not None:
        given = given._replace(token_weight=given.token_weight.float().masked_fill(outside, torch.nan))
    elif logp_cf:
        given = given._replace(logp_cf=logp_cf[0])
    logp, weight = weigh(logp, given, job.contrasting)
    cf = torch.zeros_like(logp) if given.logp_cf is None else given.logp_cf
    if given.valid is not None:
        cf = torch.where(given.valid, cf, 0)
    for out, value in zip(statistics, (logp, cf, weight), strict=True):
        out.copy_(value)
    return logp, weight
