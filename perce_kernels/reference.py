"""The definition of PerCE, computed from all logits. It is the specification, and every test compares with it.

    z      = softcap · tanh(scale · (h Wᵀ + b) / softcap)          logits (N, V)
    logp_i = log softmax(z_i)[y_i]                                 with the persona in the prompt
    pir_i  = logp_i − logp_cf_i                                    PerContrast, arXiv 2603.06595
    w_i    = clip(pir_i, m, M)         stop-gradient               "ratio": clip(exp(pir_i)), arXiv 2410.23771
    loss   = −(1/n) Σ_i w_i · logp_i                               n = valid tokens, not Σ w

Everything is fp32 (fp64 for fp64 inputs) and differentiable by plain autograd, to any order.
"""

import torch
from torch import Tensor


def logits(hidden: Tensor, lm_head: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> Tensor:
    """(N, V) logits of (N, D) hidden states in fp32, or fp64 for fp64 inputs."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(dtype) @ lm_head.to(dtype).T
    z = logit_scale * (z if bias is None else z + bias.to(dtype))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def logprobs(hidden, lm_head, target, *, bias=None, softcap=None, logit_scale=1.0, ignore_index=-100):
    """(N,) log-probabilities of `target`, (N,) predictive entropies, and (N,) whether no token is likelier; 0 where
    ignored."""
    valid = target != ignore_index
    hidden = torch.where(valid[:, None], hidden, 0)
    logp_all = logits(hidden, lm_head, bias, softcap, logit_scale).log_softmax(-1)
    logp = logp_all.gather(1, torch.where(valid, target, 0)[:, None]).squeeze(1)
    entropy = -(logp_all.exp() * logp_all).nan_to_num(0.0, 0.0, 0.0).sum(-1).detach()
    return torch.where(valid, logp, 0), torch.where(valid, entropy, 0), valid & (logp >= logp_all.amax(-1))


def contrast_weight(logp: Tensor, logp_cf: Tensor, contrast: str, clip_min: float, clip_max: float) -> Tensor:
    """(N,) detached PerCE weights from the factual and counterfactual log-probabilities."""
    pir = (logp - logp_cf).detach()
    return (pir.exp() if contrast == "ratio" else pir).clamp(clip_min, clip_max)


def normalize_weight(token_weight: Tensor, valid: Tensor, normalize: str, seq_id: Tensor | None) -> Tensor:
    """Rescale (N,) weights (0 where not `valid`) to mean 1 over the valid tokens of the "batch" or of each
    "sequence".
    """
    if normalize == "none" or token_weight.numel() == 0:
        return token_weight
    total, count = token_weight.double(), valid.double()
    if normalize == "batch":
        total, count = total.sum(), count.sum()
    else:
        # A sequence's slot is its first index in sorted order. So the number of sequences is not needed, which would
        # take a sync or a graph break. index_put in fp64 accumulates in a fixed order on CPU and CUDA; index_add_ does
        # not.
        assert seq_id is not None
        slot = torch.searchsorted(seq_id.sort().values, seq_id)
        total, count = (
            torch.zeros_like(value).index_put((slot,), value, accumulate=True)[slot] for value in (total, count)
        )
    scale = count / total
    return token_weight * torch.where(total == 0, 0.0, scale).to(token_weight.dtype)


def perce_loss(
    hidden, lm_head, target, hidden_cf=None, *, logp_cf=None, token_weight=None, bias=None, clip_min=0.8, clip_max=5.0,
    contrast="log", normalize="none", seq_id=None, reduction="mean", num_items=None, ignore_index=-100, softcap=None,
    logit_scale=1.0, logprobs=logprobs,
):  # fmt: skip
    """(loss, logp, logp_cf, token_weight): the loss of `perce_kernels.fused_perce_loss`; the rest is (N,), detached.
    logprobs: what computes the log-probabilities of either pass."""
    valid = target != ignore_index
    head = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index}
    logp, *_ = logprobs(hidden, lm_head, target, **head)
    if token_weight is not None:
        logp_cf = torch.zeros_like(logp)
    else:
        if hidden_cf is not None:
            with torch.no_grad():
                logp_cf, *_ = logprobs(hidden_cf, lm_head, target, **head)
        logp_cf = torch.where(valid, logp_cf.detach().to(logp.dtype), 0)
        token_weight = contrast_weight(logp, logp_cf, contrast, clip_min, clip_max)
    token_weight = torch.where(valid, token_weight.detach().to(logp.dtype), 0)
    token_weight = normalize_weight(token_weight, valid, normalize, seq_id)
    loss = -token_weight * logp
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / torch.as_tensor(valid.sum() if num_items is None else num_items, device=loss.device).clamp(min=1)
    return loss, logp.detach(), logp_cf, token_weight
