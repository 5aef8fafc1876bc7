"""Backend "torch": PerCE over chunks of tokens in plain PyTorch, on any device, without an (N, V) tensor.

Once logp_cf is known, the weights are constants. So one sweep computes the loss *and* its gradients, and nothing is
recomputed:

    per chunk of C tokens   z = h Wᵀ, z_cf = h_cf Wᵀ                       4·C·D·V FLOP
                            logp, logp_cf → pir → w                        row statistics, fp32
                            dz = w·scale·(softmax(z) − onehot), over z     expm1(logp) at the target
                            dh = dz W          dW += dzᵀ h (fp32)          2·C·D·V each, only if needed

The gradients are those of the *sum* Σ w·(−logp). The caller applies 1/n and batch normalisation, which are scalars.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from perce_kernels.contract import Call, Needed, PerCEOutput, Rows, Weighting, statistics_dtype
from perce_kernels.row_pass import Given, Head, row_loss, row_parts

LOGITS_BYTES = 64 * 2**20  # for all logits buffers of one chunk; from 32 MiB on, CPU GEMMs run at their full rate


def chunk_rows(vocab_size: int, dtype: torch.dtype, buffers: int) -> int:
    """Tokens per chunk, such that `buffers` blocks of logits fit LOGITS_BYTES. It never depends on free memory."""
    return max(16, LOGITS_BYTES // (buffers * vocab_size * statistics_dtype(dtype).itemsize))


@contextmanager
def full_fp32_matmul() -> Iterator[None]:
    """Compute fp32 products in fp32, whatever the user's TF32 / "medium" setting, which is restored afterwards.

    torch has an older setting besides the newer ones. If they disagree, torch raises an error when the older one is
    read, as TunableOp's products do: so both are set.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        older = torch.get_float32_matmul_precision()  # can be read now that the newer settings are "ieee"
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(older)
    finally:
        for backend, precision in zip(backends, before, strict=True):
            # An inherited setting reads as its value. Writing that value back would detach it from the global setting.
            inherited = precision == torch.backends.fp32_precision  # type: ignore[attr-defined]
            backend.fp32_precision = "none" if inherited else precision


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b with fp32 accumulation *and* output. CPU GEMMs have no out_dtype, so callers upcast the operands there."""
    if 0 in b.shape:  # an empty shard
        return out.zero_()
    if a.dtype == out.dtype == b.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a.to(b.dtype), b, out_dtype=out.dtype, out=out)


def _mm_accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in total's dtype, because bf16 sums over chunks hurt convergence."""
    if total.numel() == 0:
        return
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


class _ChunkedRows(Rows):
    """Rows that are read and written one chunk at a time; ignored rows are read and written as zeros."""

    def __init__(self, call: Call):
        super().__init__(call)
        # Targets of ignored rows, and invalid targets on devices where the check is asynchronous, become a valid id.
        self.target = torch.where((self.target >= 0) & (self.target < call.vocab_size), self.target, 0)

    def pick(self, x: Tensor, chunk: slice, dtype: torch.dtype) -> Tensor:
        """This chunk's rows of x, with ignored rows set to zero."""
        return self._zeroed((x[chunk] if self.index is None else x[self.index[chunk]]).to(dtype), chunk)

    def put(self, out: Tensor, chunk: slice, value: Tensor) -> None:
        """Write this chunk's rows into out; its other rows stay 0."""
        if self.index is None:
            out[chunk] = self._zeroed(value, chunk)
        else:
            out[self.index[chunk]] = value

    def _zeroed(self, rows: Tensor, chunk: slice) -> Tensor:
        if self.ignored is None:
            return rows
        ignored = self.ignored[chunk]
        return rows.masked_fill(ignored[:, None] if rows.dim() == 2 else ignored, 0)


def _prepare_head(call: Call) -> Head:
    dtype = statistics_dtype(call.lm_head.dtype)
    weight = call.lm_head.to(dtype) if call.lm_head.device.type == "cpu" else call.lm_head
    return Head(weight, None if call.bias is None else call.bias.to(dtype), call.softcap, call.logit_scale)


@torch.no_grad()
def sweep(call: Call, weighting: Weighting, needed: Needed) -> PerCEOutput:
    """One sweep over the tokens: the summed loss, statistics, and fp32 gradients of the sum."""
    hidden, shard = call.hidden, call.shard
    hidden_cf, logp_cf, token_weight, contrasting = weighting
    dtype = statistics_dtype(hidden.dtype)
    (n, d), v = hidden.shape, call.lm_head.shape[0]
    need_dz = any(needed)
    head, rows = _prepare_head(call), _ChunkedRows(call)

    def zeros(wanted: bool, *shape: int) -> Tensor:
        return hidden.new_zeros(shape if wanted else (0,), dtype=dtype)

    out = PerCEOutput(
        zeros(True), zeros(True, n), zeros(True, n), zeros(True, n),
        zeros(needed.dhidden, n, d), zeros(needed.dlm_head, v, d), zeros(needed.dbias, v),
    )  # fmt: skip
    buffers = 1 + (need_dz and head.softcap is not None)
    size = min(chunk_rows(call.vocab_size, hidden.dtype, buffers), max(rows.n, 1))
    z_buffer, *dcap_buffer = (hidden.new_empty((size, v), dtype=dtype) for _ in range(buffers))

    with full_fp32_matmul():
        for chunk in rows.chunks(size):
            z = z_buffer[: chunk.stop - chunk.start]
            y = rows.target[chunk]
            column = y if shard is None else shard.columns(y, v)
            given = Given(
                None if rows.ignored is None else ~rows.ignored[chunk],
                None if logp_cf is None else rows.pick(logp_cf, chunk, dtype),
                None if token_weight is None else rows.pick(token_weight, chunk, dtype),
            )
            parts_cf = None
            if hidden_cf is not None:
                _mm(rows.pick(hidden_cf, chunk, head.weight.dtype), head.weight.T, z)
                parts_cf = row_parts(z, column, head)
            h = rows.pick(hidden, chunk, head.weight.dtype)
            _mm(h, head.weight.T, z)
            dcap = dcap_buffer[0][: z.shape[0]] if dcap_buffer else None
            logp, chunk_logp_cf, weight = row_loss(z, column, given, parts_cf, dcap, head, contrasting, need_dz, shard)

            out.loss_sum.sub_(torch.dot(weight, logp))
            rows.put(out.logp, chunk, logp)
            rows.put(out.token_weight, chunk, weight)
            if chunk_logp_cf is not None:
                rows.put(out.logp_cf, chunk, chunk_logp_cf)
            dz = z.to(head.weight.dtype)
            if needed.dhidden:
                rows.put(out.dhidden, chunk, _mm(dz, head.weight, z.new_empty((z.shape[0], d))))
            if needed.dlm_head:
                _mm_accumulate(out.dlm_head, dz.T, h)
            if needed.dbias:
                out.dbias.add_(z.sum(0))
    if shard is not None:
        shard.sum_(out.dhidden)
    return out


@torch.no_grad()
def logprobs(call: Call, return_entropy: bool) -> tuple[Tensor, Tensor]:
    """(N,) log-probabilities of `target` and, on request, (N,) predictive entropies in nats ((0,) otherwise)."""
    hidden, shard = call.hidden, call.shard
    dtype = statistics_dtype(hidden.dtype)
    n, v = hidden.shape[0], call.lm_head.shape[0]
    head, rows = _prepare_head(call), _ChunkedRows(call)
    logp = hidden.new_zeros(n, dtype=dtype)
    entropy = hidden.new_zeros(n if return_entropy else 0, dtype=dtype)
    size = min(chunk_rows(call.vocab_size, hidden.dtype, 1), max(rows.n, 1))
    z_buffer = hidden.new_empty((size, v), dtype=dtype)
    with full_fp32_matmul():
        for chunk in rows.chunks(size):
            y = rows.target[chunk]
            h = rows.pick(hidden, chunk, head.weight.dtype)
            z = _mm(h, head.weight.T, z_buffer[: chunk.stop - chunk.start])
            column = y if shard is None else shard.columns(y, v)
            parts = row_parts(z, column, head, with_moment=return_entropy)
            if shard is not None:
                parts = shard.combine(parts, column >= 0)
            rows.put(logp, chunk, parts.logp())
            if return_entropy:
                rows.put(entropy, chunk, parts.entropy())
    return logp, entropy


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · factor in one pass, without a second fp32 tensor of the head's size."""
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
