"""Backend "triton": the chunked algorithm of perce_kernels.chunked, with cuBLAS products and our kernels around them.

    per block of K tokens   counterfactual log-probabilities    logits of many rows, some columns at a time   2·K·D·V
      per chunk of C tokens z = h Wᵀ, fp32                                                                    2·C·D·V
                            row kernel: logp, w, dz             into the block's dz, in the operands' dtype
                            dh = dz W                           only if hidden trains                         2·K·D·V
                            dW += dzᵀ h                         only if the head trains; fp32                 2·K·D·V

There are several ways to compute log-probabilities and dz: see steps.py. The first block writes dW and later blocks add
to it, so it is never cleared, and for n ≤ K never read. The logits of a chunk take 4 bytes per entry and live for one
kernel. dz takes 2, and each block of it costs an update of all of dW. So there are few rows of logits and many of dz.

Memory besides inputs and outputs, for n computed rows in blocks of K and chunks of C, P = V rounded up to a multiple of
64, s = bytes of an operand's element, T = tiles of 128 columns (`extra_bytes`, checked by tests):

    logits       C · P · 4              not if our GEMM stores 16-bit logits, which take the place of dz
    dz           K · P · s              if there is a gradient
    statistics   K · (8 · B + 16)       of the counterfactual pass's B blocks of columns; of T tiles if our GEMM
                                        computes them, and without that pass for C rows if it stores logits
    operands     K · D · s              if rows are gathered or masked; else operands are slices of hidden
    dh of block  K · D · 4              if rows are gathered; else the product writes to the output
    ones         K · s                  if the bias trains
    per token    n · 12                 if rows are gathered: statistics, which are scattered at the end
                 and ≤ 48 bytes per token for indices, targets, masks and values passed between the kernels

Operands without a unit stride are copied as well. If the copy engine cannot read the operands, tiles are read by
pointers and may have 64 columns.

With a shard of the vocabulary, V is the shard's, but on every rank blocks and chunks are those of the whole vocabulary.

Host syncs: with compact=True there is one, for the number of rows. With compact=False there is none, and nothing
depends on values, so a CUDA graph can capture the call. fp16 has few exponents: there dz is scaled by the power of two
that brings the largest possible weight just below 2¹⁵, and the gradients are scaled back in fp32.

fp64 inputs go to the chunked PyTorch backend, on any device: they are for checking, and neither tensor cores nor the
fp32 statistics of the row kernel are precise enough for that.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from perce_kernels import chunked
from perce_kernels.contract import Call, Needed, PerCEOutput, Rows, Weighting
from perce_kernels.gpu import lse_gemm, tiles
from perce_kernels.gpu.cut import Cut, block_of, cut_of
from perce_kernels.gpu.scale import scale
from perce_kernels.gpu.steps import Job, Step, choose
from perce_kernels.product import full_fp32_matmul, pitch, product, unit_stride
from perce_kernels.vocab_parallel import RowParts, Shard, lowest_finite

LOGPROB_ROWS = 8192
"""Tokens per chunk of token_logprobs, whose buffers are small: so many that reading W again costs nothing."""
SHARDED_MULTIPROCESSORS = 132
"""The number assumed for each GPU of a group, so that GPUs of two kinds still cut the same chunks."""


def extra_bytes(
    n: int, d: int, v: int, itemsize: int, *, cut: Cut, way: str, passes: int, gathered: bool, masked: bool,
    needed: tuple[bool, bool, bool],
) -> int:  # fmt: skip
    """The formula of the module's docstring without its last line: bytes besides inputs and outputs for n rows.

    passes: 2 with hidden_cf. needed: dhidden, dlm_head, dbias.
    """
    if n == 0:
        return 0
    block, chunk = min(cut.block, n), min(cut.chunk, n)
    need_dhidden, _, need_dbias = needed
    logits = 0 if way == "stored" else chunk * pitch(v) * 4
    dz = block * pitch(v) * itemsize * any(needed)
    columns = block_of(block, v, chunk * pitch(v))[1] if way == "fused" else tiles.STATISTICS_COLUMNS
    tiled = block if passes == 2 else chunk if way == "stored" else 0  # rows
    statistics = tiled * (8 * -(-v // columns) + 16)
    operands = block * d * itemsize if gathered or masked else 0
    dh = block * d * 4 if gathered and need_dhidden else 0
    return logits + dz + statistics + operands + dh + block * itemsize * need_dbias + n * 12 * gathered


class _GpuRows(Rows):
    """Rows that are copied into an operand of a product."""

    @property
    def copied(self) -> bool:
        """Whether the computed rows must be copied, because they are not simply those of the caller."""
        return self.index is not None or self.ignored is not None

    def computed(self, x: Tensor | None) -> Tensor | None:
        """The computed rows of an (N,) tensor."""
        if x is None:
            return None
        return x.contiguous() if self.index is None else x[self.index]

    def copy(self, out: Tensor, x: Tensor, block: slice) -> Tensor:
        """out, filled with this block's computed rows of x (N, D); ignored rows are 0, or 0 · NaN would reach dW."""
        if self.index is not None:
            return torch.index_select(x, 0, self.index[block], out=out)
        out.copy_(x[block])
        return out if self.ignored is None else out.masked_fill_(self.ignored[block, None], 0)


def _matrix(x: Tensor) -> Tensor:
    """x if it has a unit stride, else a copy: otherwise every product would copy it."""
    return x if 1 in x.stride() else x.contiguous()


def _outputs(call: Call, rows: _GpuRows, needed: Needed) -> PerCEOutput:
    """fp32 outputs: zeroed if some of their rows are not written later, else uninitialised."""
    (total, d), v = call.hidden.shape, call.lm_head.shape[0]

    def fp32(*shape: int, written: bool = True) -> Tensor:
        out = call.hidden.new_empty(shape, dtype=torch.float32)
        return out if written else out.zero_()

    every_row = rows.index is None
    return PerCEOutput(
        loss_sum=fp32(),
        logp=fp32(total, written=every_row),
        logp_cf=fp32(total, written=every_row),
        token_weight=fp32(total, written=every_row),
        dhidden=fp32(total, d, written=every_row) if needed.dhidden else fp32(0),
        dlm_head=fp32(v, d, written=rows.n > 0) if needed.dlm_head else fp32(0),
        dbias=fp32(v, written=rows.n > 0) if needed.dbias else fp32(0),
    )


@torch.no_grad()
def sweep(call: Call, weighting: Weighting, needed: Needed) -> PerCEOutput:
    """chunked.sweep on a GPU, with the same arguments and outputs."""
    hidden, lm_head, bias, shard = call.hidden, call.lm_head, call.bias, call.shard
    if hidden.dtype == torch.float64:
        return chunked.sweep(call, weighting, needed)
    with _on(hidden.device), full_fp32_matmul():
        rows = _GpuRows(call)
        out = _outputs(call, rows, needed)
        per_token = [out.logp, out.logp_cf, out.token_weight]
        if rows.index is not None:
            per_token = [x.new_empty(rows.n) for x in per_token]
        given_weight = rows.computed(weighting.token_weight)
        given = rows.computed(weighting.logp_cf) if given_weight is None else given_weight
        way = tiles.way(hidden) if shard is None and lm_head.stride(1) == 1 else "fused"
        multiprocessors = tiles.multiprocessors(hidden.device) if shard is None else SHARDED_MULTIPROCESSORS
        cut = cut_of(rows.n, lm_head.shape[1], call.vocab_size, hidden.itemsize, way, multiprocessors)
        job = Job(
            way=way, lm_head=_matrix(lm_head), bias=None if bias is None else bias.contiguous(), target=rows.target,
            valid=None if rows.ignored is None else ~rows.ignored,
            source="logp_cf" if given_weight is None else "token_weight",
            given=per_token[1] if given is None else given, contrasting=weighting.contrasting,
            dz_scale=rows.dz_scale(hidden.dtype, weighting, call.logit_scale),
            ignore_index=call.ignore_index, softcap=call.softcap, logit_scale=call.logit_scale,
            chunk=min(cut.chunk, rows.n), needed=needed,
        )  # fmt: skip
        if rows.n > 0:
            _sweep(hidden, weighting.hidden_cf, rows, job, choose(job, shard), min(cut.block, rows.n), per_token, out)
        _scatter(rows, per_token, out)
        if job.dz_scale is not None:
            for gradient in (out.dhidden, out.dlm_head, out.dbias):
                gradient.div_(job.dz_scale)
        if shard is not None:
            shard.sum_(out.dhidden)
    return out


def _sweep(
    hidden: Tensor,  # (N, D)
    hidden_cf: Tensor | None,  # (N, D)
    rows: _GpuRows,
    job: Job,
    step: Step,
    size: int,  # rows of a block
    per_token: list[Tensor],  # logp, logp_cf and weight, each (n,) fp32: filled
    out: PerCEOutput,  # its gradients are filled
) -> None:
    """Compute all blocks: log-probabilities, dz by chunks, products with dz. Each buffer is allocated once."""
    (_, d), v = hidden.shape, job.lm_head.shape[0]
    operands = hidden.new_empty((size, d)) if rows.copied else None
    dz_buffer = hidden.new_empty((size, pitch(v))) if job.need_dz else None
    # The bias's gradient is a product, because PyTorch's sum over rows takes 333 MiB of memory for 128k columns.
    ones = hidden.new_ones((1, size)) if job.needed.dbias else None
    dh_buffer = out.logp.new_empty((size, d)) if rows.index is not None and job.needed.dhidden else None

    def computed(x: Tensor, block: slice) -> Tensor:
        return x[block] if operands is None else rows.copy(operands[: block.stop - block.start], x, block)

    for block in rows.chunks(size):
        if hidden_cf is not None:
            per_token[1][block] = step.counterfactual(computed(hidden_cf, block), block)
        h = computed(hidden, block)
        dz = None if dz_buffer is None else dz_buffer[: h.shape[0]]
        for start in range(0, h.shape[0], job.chunk):
            part = slice(start, min(start + job.chunk, h.shape[0]))
            chunk = slice(block.start + part.start, block.start + part.stop)
            step(h[part], chunk, None if dz is None else dz[part], [x[chunk] for x in per_token])
        if dz is None:
            continue
        dz = dz[:, :v]
        if job.needed.dhidden:
            dh = out.dhidden[block] if dh_buffer is None else dh_buffer[: h.shape[0]]
            product(dz, job.lm_head, dh)
            if rows.index is not None:
                out.dhidden.index_copy_(0, rows.index[block], dh)
        if job.needed.dlm_head:
            product(dz.T, h, out.dlm_head, add=block.start > 0)
        if ones is not None:
            product(ones[:, : h.shape[0]], dz, out.dbias[None], add=block.start > 0)


def _scatter(rows: _GpuRows, per_token: list[Tensor], out: PerCEOutput) -> None:
    """Compute the loss from the statistics of the computed rows, and scatter these to their tokens."""
    logp, _, weight = per_token
    torch.sum(logp * weight, 0, out=out.loss_sum).neg_()
    if rows.index is not None:
        for whole, part in zip((out.logp, out.logp_cf, out.token_weight), per_token, strict=True):
            whole.index_copy_(0, rows.index, part)


@torch.no_grad()
def logprobs(call: Call, return_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """chunked.logprobs on a GPU, with the same arguments and outputs; no logits are written."""
    hidden, lm_head, shard = call.hidden, call.lm_head, call.shard
    if hidden.dtype == torch.float64:
        return chunked.logprobs(call, return_entropy)
    total = hidden.shape[0]
    with _on(hidden.device):
        rows = _GpuRows(call)
        logp = hidden.new_zeros(total, dtype=torch.float32)
        entropy = hidden.new_zeros(total if return_entropy else 0, dtype=torch.float32)
        top1 = hidden.new_zeros(total, dtype=torch.bool)
        lm_head = unit_stride(lm_head)
        bias = None if call.bias is None else call.bias.contiguous()
        head: dict[str, Any] = {
            "softcap": call.softcap, "logit_scale": call.logit_scale, "return_entropy": return_entropy
        }  # fmt: skip
        for chunk in rows.chunks(LOGPROB_ROWS):
            h = unit_stride(hidden[chunk] if rows.index is None else hidden[rows.index[chunk]])
            y = rows.target[chunk]
            if shard is None:
                part = lse_gemm.logprobs(h, lm_head, y, bias, ignore_index=call.ignore_index, **head)
            else:
                part = _sharded_logprobs(h, lm_head, y, bias, shard, call.ignore_index, head)
            for whole, value in zip((logp, entropy, top1), part, strict=True):
                if value is None:
                    continue
                if rows.index is None:
                    whole[chunk] = value
                else:
                    whole.index_copy_(0, rows.index[chunk], value)
        if rows.ignored is not None:
            top1 &= ~rows.ignored
    return logp, entropy, top1


def _sharded_logprobs(
    h, lm_head, y, bias, shard: Shard, ignore_index: int, head: dict[str, Any]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """lse_gemm.logprobs from the statistics of all ranks."""
    column = shard.columns(y, lm_head.shape[0])
    own = lse_gemm.statistics(h, lm_head, column, bias, **head)
    parts = RowParts(own.row_max, own.total, own.z_target - lowest_finite(own.row_max), own.moment)
    whole, ignored = shard.combine(parts, column >= 0), y == ignore_index
    outside = (y < 0) | (y >= shard.vocab_size)
    logp = whole.logp().masked_fill(outside, torch.nan).masked_fill(ignored, 0)
    entropy = None if whole.moment is None else whole.entropy().masked_fill(ignored, 0)
    return logp, entropy, (whole.z_target >= 0) & ~outside


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """chunked.scaled on a GPU."""
    if gradient.dtype == torch.float64:
        return chunked.scaled(gradient, factor, dtype)
    with _on(gradient.device):
        return scale(gradient, factor, dtype)


def _on(device: torch.device) -> Any:
    """Makes the tensors' device the current one: Triton launches on the current device, which may be another."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
