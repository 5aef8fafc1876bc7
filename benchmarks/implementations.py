"""Our PerCE loss and implementations in plain PyTorch: same inputs, same loss, fp32 statistics.

Every implementation maps (hidden, lm_head, target, hidden_cf) to the scalar loss. bf16 inputs are upcast where PyTorch
would compute bf16 logits: those change a token's weight by up to 14 %, which would make the comparison unfair.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from perce_kernels import fused_perce_loss

CLIP = (0.8, 5.0)
Loss = Callable[..., Tensor]


def perce(hidden: Tensor, lm_head: Tensor, target: Tensor, hidden_cf: Tensor) -> Tensor:
    """The fused loss of perce_kernels."""
    return fused_perce_loss(hidden, lm_head, target, hidden_cf)


def weighted(nll_cf: Tensor, nll: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, PIR) from per-token losses."""
    pir = (nll_cf - nll).detach()
    return (pir.clamp(*CLIP) * nll).mean(), pir


def naive_with_pir(hidden: Tensor, lm_head: Tensor, target: Tensor, hidden_cf: Tensor) -> tuple[Tensor, Tensor]:
    """The loss on materialised logits; each set of logits is freed as soon as PyTorch can."""
    lm_head = lm_head.float()
    with torch.no_grad():
        nll_cf = F.cross_entropy(hidden_cf.float() @ lm_head.T, target, reduction="none")
    nll = F.cross_entropy(hidden.float() @ lm_head.T, target, reduction="none")
    return weighted(nll_cf, nll)


def naive(*inputs: Tensor) -> Tensor:
    return naive_with_pir(*inputs)[0]


def linear_cross_entropy_with_pir(
    hidden: Tensor, lm_head: Tensor, target: Tensor, hidden_cf: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss composed of torch 2.13's chunked F.linear_cross_entropy: no logits in memory, but computed once more."""
    options = {"reduction": "none", "options": torch.nn.LinearCrossEntropyOptions()}
    lm_head = lm_head.float()
    with torch.no_grad():
        nll_cf = F.linear_cross_entropy(hidden_cf.float(), lm_head, target, **options)
    nll = F.linear_cross_entropy(hidden.float(), lm_head, target, **options)
    return weighted(nll_cf, nll)


def linear_cross_entropy(*inputs: Tensor) -> Tensor:
    return linear_cross_entropy_with_pir(*inputs)[0]


@cache
def compiled_with_pir() -> Callable[..., tuple[Tensor, Tensor]]:
    """torch.compile of the naive loss."""
    return torch.compile(naive_with_pir)


def compiled(*inputs: Tensor) -> Tensor:
    return compiled_with_pir()(*inputs)[0]


IMPLEMENTATIONS: dict[str, Loss] = {
    "perce": perce,
    "naive": naive,
    "linear_cross_entropy": linear_cross_entropy,
    "compiled": compiled,
}


def make_inputs(
    n: int, d: int, v: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, lm_head, target, hidden_cf with logits of standard deviation 3; the first two require a gradient."""
    g = torch.Generator(device).manual_seed(0)
    hidden, hidden_cf = (torch.randn(n, d, generator=g, device=device).to(dtype) for _ in range(2))
    lm_head = torch.randn(v, d, generator=g, device=device).mul_(3 / d**0.5).to(dtype)
    target = torch.randint(0, v, (n,), generator=g, device=device)
    return hidden.requires_grad_(), lm_head.requires_grad_(), target, hidden_cf


def step(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Forward and backward; returns the loss and leaves fresh gradients on the inputs."""
    for x in inputs:
        x.grad = None
    value = loss(*inputs)
    value.backward()
    return value.detach()
