"""The fp64 oracle at sizes whose logits do not fit into memory: the reference in blocks of rows, on any device.

    first sweep    per block: logits in fp64 → logp, logp_cf        then, over all rows: weights, normalisation, loss
    second sweep   per block: logits again → dz → dhidden, dlm_head, dbias

It shares only `reference.logits` and the two functions of the weights with the backends.
"""

import torch
from torch import Tensor

from perce_kernels import PerCEStats, reference
from tests.helpers.numerics import IGNORE, Inputs, Result

BLOCK_BYTES = 2**30
"""Bytes of one block's fp64 logits."""


def _row_blocks(n: int, v: int) -> list[slice]:
    rows = max(1, BLOCK_BYTES // (8 * v))
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def blockwise(
    inputs: Inputs,
    *,
    upstream: Tensor | float = 1.0,
    vocabulary_rows: Tensor | None = None,  # (R,) rows of dlm_head to compute, None: all
    reduction: str = "mean",
    normalize: str = "none",
    seq_id: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Result:
    """numerics.oracle for inputs with hidden_cf; dlm_head has only `vocabulary_rows`, if these are given."""
    assert inputs.hidden_cf is not None
    target, valid = inputs.target, inputs.target != IGNORE
    lm_head = inputs.lm_head.double()
    bias = None if inputs.bias is None else inputs.bias.double()
    head = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale}
    blocks = _row_blocks(target.shape[0], lm_head.shape[0])

    logp, logp_cf = (torch.zeros(target.shape, dtype=torch.float64, device=target.device) for _ in range(2))
    for rows in blocks:
        for out, hidden in ((logp, inputs.hidden), (logp_cf, inputs.hidden_cf)):
            out[rows], *_ = reference.logprobs(hidden[rows].double(), lm_head, target[rows], **head)
    weight = torch.where(valid, reference.contrast_weight(logp, logp_cf, "log", 0.8, 5.0), 0)
    weight = reference.normalize_weight(weight, valid, normalize, seq_id)
    loss = -weight * logp
    per_row = torch.as_tensor(upstream, dtype=torch.float64, device=target.device).expand(target.shape) * weight
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        count = valid.sum().clamp(min=1)
        loss, per_row = loss / count, per_row / count

    grads = _gradients(inputs, lm_head, per_row * logit_scale, blocks, vocabulary_rows, head)
    return Result(loss, PerCEStats(logp, logp_cf, logp - logp_cf, weight), grads)


def _gradients(
    inputs: Inputs,
    lm_head: Tensor,  # (V, D) fp64
    factor: Tensor,  # (N,) what each row's softmax − onehot is multiplied by
    blocks: list[slice],
    vocabulary_rows: Tensor | None,
    head: dict,
) -> dict[str, Tensor | None]:
    """dhidden, dlm_head (or the asked rows of it) and dbias in fp64."""
    v, d = lm_head.shape
    dhidden = torch.zeros(inputs.hidden.shape, dtype=torch.float64, device=lm_head.device)
    dlm_head = lm_head.new_zeros(v if vocabulary_rows is None else vocabulary_rows.shape[0], d)
    dbias = lm_head.new_zeros(v)
    for rows in blocks:
        hidden, valid = inputs.hidden[rows].double(), inputs.target[rows] != IGNORE
        hidden = torch.where(valid[:, None], hidden, 0)
        z = reference.logits(hidden, lm_head, **head)
        dz = z.softmax(1)
        target = torch.where(valid, inputs.target[rows], 0)[:, None]
        dz.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float64))
        dz *= factor[rows, None]
        if head["softcap"] is not None:
            dz *= 1 - (z / head["softcap"]) ** 2
        del z
        dhidden[rows] = dz @ lm_head
        dlm_head.addmm_((dz if vocabulary_rows is None else dz[:, vocabulary_rows]).T, hidden)
        dbias += dz.sum(0)
    return {"hidden": dhidden, "lm_head": dlm_head} | ({} if inputs.bias is None else {"bias": dbias})
