"""Fused PerCE loss: token-level personalisation without ever materialising full-vocabulary logits."""

from perce_kernels.loss import PerCEStats, fused_perce_loss, token_logprobs

__all__ = ["PerCEStats", "fused_perce_loss", "token_logprobs"]
