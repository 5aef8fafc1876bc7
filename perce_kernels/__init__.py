"""Fused PerCE loss: token-level personalisation that never holds the logits of all tokens in memory."""

from perce_kernels.loss import PerCEStats, fused_perce_loss, token_logprobs

__all__ = ["PerCEStats", "fused_perce_loss", "token_logprobs"]
