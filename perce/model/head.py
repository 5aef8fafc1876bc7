"""What the head computes of the response tokens, without logits: their loss under an objective, or statistics alone.

the op contrasts (PIR, exp(PIR))       hidden, hidden_cf → fused_perce_loss
any other signal                       token_logprobs of what it needs → signal → clip → fused_perce_loss
known from an earlier pass, or none    clip → fused_perce_loss
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perce.objectives import HeadCall, Measured
from perce_kernels import fused_perce_loss, token_logprobs


@dataclass(frozen=True)
class LogitTransform:
    """logits = softcap·tanh(logit_scale·(h Wᵀ + b)/softcap), as fused_perce_loss takes it; b is the head's own bias."""

    softcap: float | None
    logit_scale: float


def logit_transform(config: Any) -> LogitTransform:
    """The head's transform from a model config: Gemma softcaps, Granite divides, Cohere multiplies."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    scale /= float(getattr(text, "logits_scaling", None) or 1.0)
    return LogitTransform(getattr(text, "final_logit_softcapping", None), scale)


def answer(call: HeadCall, hidden: Tensor, **head: Any) -> Measured:
    """What `call` asks of the (N, D) hidden states of the response tokens.

    head: lm_head, bias, softcap, logit_scale, backend, as the op takes them.
    """
    return _loss(call, hidden, head) if call.loss else _measured(call, hidden, head)


def _loss(call: HeadCall, hidden: Tensor, head: dict[str, Any]) -> Measured:
    weighting, signal, logp_cf = call.weighting, call.signal, None
    contrast = weighting.contrast if signal is None else None
    weights: dict[str, Any]
    if contrast:
        clip = {"clip_min": weighting.clip_min, "clip_max": weighting.clip_max}
        weights = {"hidden_cf": call.hidden_cf, "contrast": contrast, **clip}
    else:
        if weighting.signal is None:
            signal = torch.ones_like(call.target, dtype=torch.float32)
        elif signal is None:
            _, logp_cf, signal, *_ = _measured(call, hidden, head)
        weights = {"token_weight": weighting.weight(signal)}
    loss, stats = fused_perce_loss(
        hidden, target=call.target, **head, **weights, normalize=call.normalize, seq_id=call.seq_id,
        num_items=call.num_items, return_stats=True,
    )  # fmt: skip
    if signal is None:
        signal = weighting.signal_of(stats.logp, stats.logp_cf)
    logp_cf = stats.logp_cf if logp_cf is None else logp_cf
    return Measured(stats.logp, logp_cf, signal, stats.token_weight, loss=loss)


@torch.no_grad()
def _measured(call: HeadCall, hidden: Tensor, head: dict[str, Any]) -> Measured:
    options = {"target": call.target, **head}
    wants_entropy = call.entropy or "entropy" in call.weighting.needs
    found: Any = token_logprobs(hidden, return_entropy=wants_entropy, **options)
    logp, entropy = found if wants_entropy else (found, None)
    logp_cf: Any = torch.zeros_like(logp) if call.hidden_cf is None else token_logprobs(call.hidden_cf, **options)
    signal = call.weighting.signal_of(logp, logp_cf, entropy)
    return Measured(logp, logp_cf, signal, call.weighting.weight(signal), entropy)
