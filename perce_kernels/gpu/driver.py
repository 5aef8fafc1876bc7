"""Backend "triton": the chunked algorithm of perce_kernels.chunked with cuBLAS products and one row kernel between.

    per chunk of C tokens   [z; z_cf] = [h; h_cf] Wᵀ       one product, fp32 out, W read once     4·C·D·V FLOP
                            row kernel: logp, w, dz        in place over z, in the operands' dtype
                                                           (or a product that stores 16 bits of z alone: steps.py)
                            dh = dz W                      only if hidden trains                  2·C·D·V
                            dW += dzᵀ h                    only if the head trains; fp32          2·C·D·V

The first chunk writes dW and later ones add to it: it is never cleared.

Memory beside inputs and outputs, for n computed rows in chunks of C = min(chunk_rows, n), passes = 2 with hidden_cf and
1 without, P = V rounded up to a multiple of 64, s = bytes of an operand's element (`extra_bytes`, held by a test):

    logits       passes · C · P · 4     where tiles.py has the GEMM that stores 16-bit logits in use, instead
                 C · P · s + passes · C · ⌈V/columns of its tile⌉ · 8, the first only where there is a gradient
    operands     passes · C · D · s     where rows are gathered, masked or paired; else they are a slice of hidden
    dh of chunk  C · D · 4              where rows are gathered; else the product writes to its place
    column sums  V · 4                  where the bias trains
    per token    n · 12                 where rows are gathered: statistics, scattered at the end
                 and ≤ 40 bytes a token of indices, targets and masks

With a shard of the vocabulary V is the shard's, but the chunk size is that of the whole vocabulary, on every rank.

Host syncs: with compact=True one, which learns how many rows there are; with compact=False none, and nothing depends on
values, so that a CUDA graph can capture the call. fp16 has few exponents: there dz is scaled by the power of two that
brings the largest possible weight just below 2¹⁵, and the gradients are scaled back in fp32.

fp64 inputs go to the chunked PyTorch backend on whatever device they are: they serve for checking, for which neither
tensor cores nor the row kernel's fp32 statistics are any good.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from perce_kernels import chunked
from perce_kernels.arguments import Call, Needed, Rows, Weighting
from perce_kernels.chunked import PerCEOutput
from perce_kernels.gpu import lse_gemm
from perce_kernels.gpu.steps import Job, Step, choose, pitch, product
from perce_kernels.vocab_parallel import RowParts, Shard, lowest_finite

LOGITS_BYTES = 2 * 2**30
"""Budget of a chunk's logits. 2 GiB are 2048 tokens of a 128k vocabulary with both passes: reading and writing dW (8
bytes an entry) takes as long as its product at about 750 tokens of an H200, so that far above it costs little."""
GEMM_TILE = (128, 256)
"""Rows and columns of the output tile that cuBLAS prefers for large 16-bit products; what "wave" means below."""
LOGPROB_ROWS = 8192
"""Tokens per chunk of token_logprobs, whose buffers are small: enough that reading W again costs nothing."""
SHARDED_MULTIPROCESSORS = 132
"""What a group of GPUs is taken to have each, so that two kinds of them still cut the same chunks."""


def chunk_rows(d: int, v: int, passes: int, multiprocessors: int, budget: int | None = None) -> int:
    """Tokens per chunk: the number that fills whole waves of multiprocessors best in dh = dz W, within the budget.

    That product has few tiles (C/128 · D/256), so that a C chosen by habit can leave most of the last wave idle. Only
    sizes from half of what the budget allows are considered, for a larger C spreads the cost of adding to dW. A
    function of the arguments alone: never of free memory, so that the same call gives the same bits anywhere.
    """
    budget = LOGITS_BYTES if budget is None else budget
    rows, columns = GEMM_TILE
    most = budget // (passes * pitch(v) * 4)
    if most < rows:
        return max(16, most)

    def wave_fill(c: int) -> float:
        tiles = (c // rows) * -(-d // columns)
        return tiles / (-(-tiles // multiprocessors) * multiprocessors)

    candidates = range(most // rows * rows, max(rows, most // 2) - 1, -rows)
    return max(candidates, key=wave_fill)  # the first of equals, which is the largest


def extra_bytes(
    n: int, d: int, v: int, itemsize: int, *, chunk: int, passes: int, gathered: bool, masked: bool,
    needed: tuple[bool, bool, bool], tile_columns: int | None = None,
) -> int:  # fmt: skip
    """The docstring's formula without its last line: bytes beside inputs and outputs while n rows are computed.

    needed: dhidden, dlm_head, dbias. tile_columns: of the GEMM that stores 16-bit logits, where that way is in use.
    """
    c = min(chunk, n)
    need_dhidden, _, need_dbias = needed
    if tile_columns is None:
        logits = passes * c * pitch(v) * 4
    else:
        logits = c * pitch(v) * itemsize * any(needed) + passes * c * -(-v // tile_columns) * 8
    operands = passes * c * d * itemsize if gathered or masked or passes == 2 else 0
    dh = c * d * 4 if gathered and need_dhidden else 0
    return logits + operands + dh + v * 4 * need_dbias + n * 12 * gathered


class _GpuRows(Rows):
    """Rows that are copied into an operand of a product."""

    @property
    def copied(self) -> bool:
        """Whether the computed rows are not simply those of the caller."""
        return self.index is not None or self.ignored is not None

    def computed(self, x: Tensor | None) -> Tensor | None:
        """The computed rows of a (N,) tensor."""
        if x is None:
            return None
        return x.contiguous() if self.index is None else x[self.index]

    def copy(self, out: Tensor, x: Tensor, chunk: slice) -> None:
        """The computed rows of x (N, D) in this chunk into out, an ignored row as 0: 0 · NaN would reach dW."""
        if self.index is not None:
            torch.index_select(x, 0, self.index[chunk], out=out)
            return
        out.copy_(x[chunk])
        if self.ignored is not None:
            out.masked_fill_(self.ignored[chunk, None], 0)


def _matrix(x: Tensor) -> Tensor:
    """x with a unit stride, or a copy: else every product would make its own."""
    return x if 1 in x.stride() else x.contiguous()


def _dz_scale(
    rows: _GpuRows, dtype: torch.dtype, given_weight: Tensor | None, clip_max: float, logit_scale: float
) -> Tensor | None:
    """() power of two that brings |w · scale| just below 2¹⁵ in fp16, whose numbers end at 65504; None elsewhere.

    Given weights may be anything: −(upstream gradient) in the backward of token_logprobs, loss scale included.
    """
    if dtype != torch.float16 or rows.n == 0:
        return None
    if given_weight is None:
        exponent = math.frexp(clip_max * abs(logit_scale))[1]
        return torch.full((), 2.0 ** min(15 - exponent, 100), device=rows.target.device)
    weight = given_weight if rows.ignored is None else given_weight.masked_fill(rows.ignored, 0)
    return (15 - (weight.float().abs().amax() * logit_scale).frexp().exponent).clamp(-100, 100).float().exp2()


def _outputs(call: Call, rows: _GpuRows, needed: Needed) -> PerCEOutput:
    """fp32 outputs: zero where rows of them are not written, else left as the allocator gives them."""
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
        dbias=fp32(v, written=False) if needed.dbias else fp32(0),
    )


@torch.no_grad()
def fused_perce_loss(call: Call, weighting: Weighting, needed: Needed) -> PerCEOutput:
    """chunked.fused_perce_loss on a GPU: same arguments, same outputs."""
    hidden, lm_head, bias, shard = call.hidden, call.lm_head, call.bias, call.shard
    if hidden.dtype == torch.float64:
        return chunked.fused_perce_loss(call, weighting, needed)
    with _on(hidden.device), chunked.full_fp32_matmul():
        rows = _GpuRows(call)
        out = _outputs(call, rows, needed)
        passes = 1 if weighting.hidden_cf is None else 2
        multiprocessors = _multiprocessors(hidden.device) if shard is None else SHARDED_MULTIPROCESSORS
        given_weight = rows.computed(weighting.token_weight)
        job = Job(
            lm_head=_matrix(lm_head), bias=None if bias is None else bias.contiguous(), target=rows.target,
            valid=None if rows.ignored is None else ~rows.ignored, logp_cf=rows.computed(weighting.logp_cf),
            token_weight=given_weight, contrasting=weighting.contrasting, ignore_index=call.ignore_index,
            dz_scale=_dz_scale(rows, hidden.dtype, given_weight, weighting.contrasting.clip_max, call.logit_scale),
            softcap=call.softcap, logit_scale=call.logit_scale, passes=passes,
            size=min(chunk_rows(lm_head.shape[1], call.vocab_size, passes, multiprocessors), rows.n), needed=needed,
        )  # fmt: skip
        _sweep(hidden, weighting.hidden_cf, rows, job, choose(job, shard), out)
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
    out: PerCEOutput,  # filled
) -> None:
    """All chunks: operands, the step, products with dz. Buffers are allocated once, for the first and largest chunk."""
    d = hidden.shape[1]
    per_token = [out.logp, out.logp_cf, out.token_weight]
    if rows.index is not None:
        per_token = [x.new_empty(rows.n) for x in per_token]
    operands = hidden.new_empty((job.passes * job.size, d)) if rows.copied or job.passes == 2 else None
    dh_buffer = out.logp.new_empty((job.size, d)) if rows.index is not None and job.needed.dhidden else None

    for chunk in rows.chunks(job.size):
        c = chunk.stop - chunk.start
        both = hidden[chunk] if operands is None else operands[: job.passes * c]
        if operands is not None:
            rows.copy(both[:c], hidden, chunk)
            if hidden_cf is not None:
                rows.copy(both[c:], hidden_cf, chunk)
        dz = step(both, chunk, [x[chunk] for x in per_token])
        if dz is None:
            continue
        if job.needed.dhidden:
            dh = out.dhidden[chunk] if dh_buffer is None else dh_buffer[:c]
            product(dz, job.lm_head, dh)
            if rows.index is not None:
                out.dhidden.index_copy_(0, rows.index[chunk], dh)
        if job.needed.dlm_head:
            product(dz.T, both[:c], out.dlm_head, add=chunk.start > 0)
        if job.needed.dbias:
            out.dbias.add_(dz.sum(0, dtype=torch.float32))

    logp, _, weight = per_token
    torch.sum(logp * weight, 0, out=out.loss_sum).neg_()
    if rows.index is not None:
        for whole, part in zip((out.logp, out.logp_cf, out.token_weight), per_token, strict=True):
            whole.index_copy_(0, rows.index, part)


@torch.no_grad()
def token_logprobs(call: Call, return_entropy: bool) -> tuple[Tensor, Tensor]:
    """chunked.token_logprobs on a GPU: same arguments, same outputs; no logits are written at all."""
    hidden, lm_head, shard = call.hidden, call.lm_head, call.shard
    if hidden.dtype == torch.float64:
        return chunked.token_logprobs(call, return_entropy)
    total = hidden.shape[0]
    with _on(hidden.device):
        rows = _GpuRows(call)
        logp = hidden.new_zeros(total, dtype=torch.float32)
        entropy = hidden.new_zeros(total if return_entropy else 0, dtype=torch.float32)
        lm_head = lm_head if lm_head.stride(1) == 1 else lm_head.contiguous()
        bias = None if call.bias is None else call.bias.contiguous()
        head: dict[str, Any] = {
            "softcap": call.softcap, "logit_scale": call.logit_scale, "return_entropy": return_entropy
        }  # fmt: skip
        for chunk in rows.chunks(LOGPROB_ROWS):
            h, y = hidden[chunk] if rows.index is None else hidden[rows.index[chunk]], rows.target[chunk]
            h = h if h.stride(1) == 1 else h.contiguous()
            if shard is None:
                part = lse_gemm.logprobs(h, lm_head, y, bias, ignore_index=call.ignore_index, **head)
            else:
                part = _sharded_logprobs(h, lm_head, y, bias, shard, call.ignore_index, head)
            for whole, value in zip((logp, entropy), part, strict=True):
                if value is None:
                    continue
                if rows.index is None:
                    whole[chunk] = value
                else:
                    whole.index_copy_(0, rows.index[chunk], value)
    return logp, entropy


def _sharded_logprobs(
    h, lm_head, y, bias, shard: Shard, ignore_index: int, head: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """logp, and entropy if asked for, of rows whose statistics are those of all ranks; 0 where ignored."""
    column = shard.columns(y, lm_head.shape[0])
    own = lse_gemm.statistics(h, lm_head, column, bias, **head)
    parts = RowParts(own.row_max, own.total, own.z_target - lowest_finite(own.row_max), own.moment)
    whole, ignored = shard.combine(parts, column >= 0), y == ignore_index
    outside = (y < 0) | (y >= shard.vocab_size)
    logp = whole.logp().masked_fill(outside, torch.nan).masked_fill(ignored, 0)
    return logp, None if whole.moment is None else whole.entropy().masked_fill(ignored, 0)


def _on(device: torch.device) -> Any:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
