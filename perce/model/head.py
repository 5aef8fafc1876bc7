"""What the head computes for the response tokens without storing logits: their loss under an objective, or statistics.

signal that the op computes (PIR, exp(PIR))   hidden, hidden_cf → fused_perce_loss
any other signal of the model's predictions   token_logprobs of what it needs → signal → clip → fused_perce_loss
signal known without them, or none            clip → fused_perce_loss
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


# Names that configs give a scale of the logits, and whether models usually multiply by it (1) or divide (-1).
# HyperCLOVA X multiplies by the one that Granite divides by.
SCALES = {
    "logit_scale": 1,  # Cohere
    "logits_scaling": -1,  # Granite
    "lm_head_multiplier": 1,  # Falcon-H1
    "logits_mup_width_multiplier": -1,  # Inkling
    "output_multiplier": 1,  # Muse
}
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


def logit_transforms(config: Any) -> list[LogitTransform]:
    """The transforms that a config may mean, the likeliest first: scales and caps as their names say, then scales the
    other way, and each of them unused, as in models that inherit a field."""
    text = config.get_text_config()

    def value(name: str) -> float | None:
        found = getattr(text, name, None)
        return float(found) if isinstance(found, int | float) and found not in (0, 1) else None

    caps = dict.fromkeys([*map(value, CAPS), None])
    scales = [1.0]
    for name, direction in SCALES.items():
        if scale := value(name):
            scales = [product * scale**power for power in (direction, -direction, 0) for product in scales]
    return [LogitTransform(cap, scale) for cap in sorted(caps, key=lambda cap: cap is None) for scale in scales]


def answer(call: HeadCall, hidden: Tensor, **head: Any) -> Measured:
    """What `call` asks for, from the (N, D) hidden states of the response tokens.

    head: lm_head, bias, softcap, logit_scale, backend, as the op takes them.
    """
    found = _loss(call, hidden, head) if call.loss else _measured(call, hidden, head)
    if not call.top1:
        return found
    # All rows have a target, so there is nothing to leave out, or to wait for.
    asked: dict[str, Any] = {"return_entropy": True, "return_top1": True, "compact": False}
    with torch.no_grad():
        _, entropy, top1 = token_logprobs(hidden, target=call.target, **asked, **head)
    return found._replace(entropy=entropy, top1=top1)


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
        elif signal is None and weighting.of_model:
            _, logp_cf, signal, *_ = _measured(call, hidden, head)
        elif signal is None:
            signal = weighting.signal_of(personal=call.personal)
        weights = {"token_weight": weighting.weight(signal)}
    normalize = "none" if call.seq_id is None else "sequence"
    options = {**head, **weights, "target": call.target, "normalize": normalize, "seq_id": call.seq_id}
    if call.data_weight is None:
        loss, stats = fused_perce_loss(hidden, num_items=call.num_items, return_stats=True, **options)
    else:  # the loss per token, which costs the head's matrix products once more than their mean does
        losses, stats = fused_perce_loss(hidden, reduction="none", return_stats=True, **options)
        items = call.target.numel() if call.num_items is None else call.num_items
        loss = (losses * call.data_weight).sum() / torch.as_tensor(items).clamp(min=1)
    if signal is None:
        signal = weighting.signal_of(logp=stats.logp, logp_cf=stats.logp_cf)
    logp_cf = stats.logp_cf if logp_cf is None else logp_cf
    return Measured(stats.logp, logp_cf, signal, stats.token_weight, loss=loss)


@torch.no_grad()
def _measured(call: HeadCall, hidden: Tensor, head: dict[str, Any]) -> Measured:
    options = {"target": call.target, **head}
    wants_entropy = call.entropy or "entropy" in call.weighting.needs
    found: Any = token_logprobs(hidden, return_entropy=wants_entropy, **options)
    logp, entropy = found if wants_entropy else (found, None)
    logp_cf = torch.zeros_like(logp) if call.hidden_cf is None else token_logprobs(call.hidden_cf, **options)
    if call.weighting.signal is None:
        signal = torch.ones_like(logp)
    else:
        signal = call.weighting.signal_of(logp=logp, logp_cf=logp_cf, entropy=entropy, personal=call.personal)
    return Measured(logp, logp_cf, signal, call.weighting.weight(signal), entropy)
