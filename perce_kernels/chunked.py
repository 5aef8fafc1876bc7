"""Backend "torch": PerCE over chunks of tokens in plain PyTorch, on any device, without an (N, V) tensor.

Once logp_cf is known, the weights are constants. So one sweep computes the loss *and* its gradients, and nothing is
recomputed:

    per chunk of C tokens   z = h Wᵀ, z_cf = h_cf Wᵀ                       4·C·D·V FLOP
                            logp, logp_cf → pir → w                        row statistics, fp32
                            dz = w·scale·(softmax(z) − onehot), over z     expm1(logp) at the target
                            dh = dz W          dW += dzᵀ h (fp32)          2·C·D·V each, only if needed

The gradients are those of the *sum* Σ w·(−logp). The caller applies 1/n and batch normalisation, which are scalars.
"""

import torch
from torch import Tensor

from perce_kernels.contract import Call, Needed, PerCEOutput, Rows, Weighting, statistics_dtype
from perce_kernels.product import can_widen, full_fp32_matmul, product
from perce_kernels.row_pass import Given, Head, row_loss, row_parts

LOGITS_BYTES = 64 * 2**20  # for all logits buffers of one chunk; from 32 MiB on, CPU GEMMs run at their full rate
GPU_LOGITS_BYTES = 2**30  # each chunk reads W, and reads and writes dW: with few rows, a GPU waits for its memory


def chunk_rows(vocab_size: int, dtype: torch.dtype, buffers: int, device: str) -> int:
    """Tokens per chunk, such that `buffers` blocks of logits fit the bytes that a device of this type has for them. It
    never depends on free memory."""
    available = LOGITS_BYTES if device == "cpu" else GPU_LOGITS_BYTES
    return max(16, available // (buffers * vocab_size * statistics_dtype(dtype).itemsize))


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
    weight = call.lm_head if can_widen(call.lm_head) else call.lm_head.to(dtype)  # once, not in every product
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
    scale = rows.dz_scale(head.weight.dtype, weighting, call.logit_scale) if need_dz else None

    def zeros(wanted: bool, *shape: int) -> Tensor:
        return hidden.new_zeros(shape if wanted else (0,), dtype=dtype)

    out = PerCEOutput(
        zeros(True), zeros(True, n), zeros(True, n), zeros(True, n),
        zeros(needed.dhidden, n, d), zeros(needed.dlm_head, v, d), zeros(needed.dbias, v),
    )  # fmt: skip
    buffers = 1 + (need_dz and head.softcap is not None)
    size = min(chunk_rows(call.vocab_size, hidden.dtype, buffers, hidden.device.type), max(rows.n, 1))
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
                product(rows.pick(hidden_cf, chunk, head.weight.dtype), head.weight.T, z)
                parts_cf = row_parts(z, column, head)
            h = rows.pick(hidden, chunk, head.weight.dtype)
            product(h, head.weight.T, z)
            dcap = dcap_buffer[0][: z.shape[0]] if dcap_buffer else None
            logp, chunk_logp_cf, weight = row_loss(z, column, given, parts_cf, dcap, head, contrasting, need_dz, shard)

            out.loss_sum.sub_(torch.dot(weight, logp))
            rows.put(out.logp, chunk, logp)
            rows.put(out.token_weight, chunk, weight)
            if chunk_logp_cf is not None:
                rows.put(out.logp_cf, chunk, chunk_logp_cf)
            if scale is not None:
                z.mul_(scale)
            dz = z.to(head.weight.dtype) if needed.dhidden or needed.dlm_head else z
            if needed.dhidden:
                rows.put(out.dhidden, chunk, product(dz, head.weight, z.new_empty((z.shape[0], d))))
            if needed.dlm_head:
                product(dz.T, h, out.dlm_head, add=True)
            if needed.dbias:
                out.dbias.add_(z.sum(0))
    if scale is not None:
        for gradient in (out.dhidden, out.dlm_head, out.dbias):
            gradient.div_(scale)
    if shard is not None:
        shard.sum_(out.dhidden)
    return out


@torch.no_grad()
def logprobs(call: Call, return_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) log-probabilities of `target`; on request (N,) predictive entropies in nats ((0,) otherwise); and (N,) bool,
    whether no token is likelier."""
    hidden, shard = call.hidden, call.shard
    dtype = statistics_dtype(hidden.dtype)
    n, v = hidden.shape[0], call.lm_head.shape[0]
    head, rows = _prepare_head(call), _ChunkedRows(call)
    logp = hidden.new_zeros(n, dtype=dtype)
    entropy = hidden.new_zeros(n if return_entropy else 0, dtype=dtype)
    top1 = hidden.new_zeros(n, dtype=torch.bool)
    buffers = 1 + (return_entropy and hidden.device.type != "cpu")  # see row_pass._row_blocks
    size = min(chunk_rows(call.vocab_size, hidden.dtype, buffers, hidden.device.type), max(rows.n, 1))
    z_buffer = hidden.new_empty((size, v), dtype=dtype)
    with full_fp32_matmul():
        for chunk in rows.chunks(size):
            y = rows.target[chunk]
            h = rows.pick(hidden, chunk, head.weight.dtype)
            z = product(h, head.weight.T, z_buffer[: chunk.stop - chunk.start])
            column = y if shard is None else shard.columns(y, v)
            parts = row_parts(z, column, head, with_moment=return_entropy)
            if shard is not None:
                parts = shard.combine(parts, column >= 0)
            rows.put(logp, chunk, parts.logp())
            rows.put(top1, chunk, parts.z_target >= 0)  # relative to the largest logit
            if return_entropy:
                rows.put(entropy, chunk, parts.entropy())
    return logp, entropy, top1


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · factor in one pass, without a second fp32 tensor of the head's size."""
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
