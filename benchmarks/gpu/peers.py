"""Libraries that a user could build PerCE from, each composed as well as it allows. What they share:

    nll_cf = nll(hidden_cf)   under no_grad
    nll    = nll(hidden)
    loss   = mean(clip(nll_cf − nll, 0.8, 5) · nll)          the weight detached

A library fits if its per-token losses have right gradients under unequal upstream gradients, for that is what the
weights are; one that returns a mean or a sum alone cannot weight tokens and is listed as unable. Whether statistics are
accurate to fp32 or made from bf16 logits is the library's own; it is measured, not assumed. The signatures are those of
liger-kernel 0.8.5, cut-cross-entropy 25.1.1, quack-kernels 0.6.5 and trl 1.16.0.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import implementations
from benchmarks.implementations import CLIP, Loss
from perce_kernels import fused_perce_loss

Nll = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unable(Exception):
    """This peer cannot be measured here; the message says why."""


@dataclass
class Implementation:
    """What a peer's `load` gives."""

    loss: Loss
    pir: Loss | None = None
    """(N,) contrasts behind the loss, of the same arguments, where the peer shows them."""


@dataclass
class Peer:
    """A name and how to get the implementation; importing it is part of `load`, and may fail."""

    name: str
    title: str
    load: Callable[[], Implementation]
    tf32: bool = False
    """Whether fp32 products may be TF32: much faster, and exact for factors that are bf16 numbers (all but dz are)."""


def composed(nll: Nll) -> Implementation:
    """PerCE from per-token losses."""

    def contrast(hidden: Tensor, lm_head: Tensor, target: Tensor, hidden_cf: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            nll_cf = nll(hidden_cf, lm_head.detach(), target)
        per_token = nll(hidden, lm_head, target)
        return per_token, (nll_cf - per_token).detach()

    def loss(*inputs: Tensor) -> Tensor:
        per_token, pir = contrast(*inputs)
        return (pir.clamp(*CLIP) * per_token).mean()

    return Implementation(loss, lambda *inputs: contrast(*inputs)[1])


def imported(module: str, package: str) -> Any:
    """The module, or Unable with the reason."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unable(f"{package} is not installed, or lacks something: {error}") from error


def load_perce() -> Implementation:
    def pir(hidden, lm_head, target, hidden_cf):
        return fused_perce_loss(hidden, lm_head, target, hidden_cf, return_stats=True)[1].pir

    return Implementation(implementations.perce, pir)


def load_perce_stored() -> Implementation:
    """Ours by the other way to fp32 statistics, which the tile table leaves off: the GPU is to say whether it pays."""
    tiles = imported("perce_kernels.gpu.tiles", "triton")
    ours = load_perce()

    def switched_on(call: Loss) -> Loss:
        def switched(*inputs: Tensor) -> Tensor:
            table = tiles.TABLE
            tiles.TABLE = tuple(row._replace(in_use=True) for row in table)
            try:
                return call(*inputs)
            finally:
                tiles.TABLE = table

        return switched

    assert ours.pir is not None
    return Implementation(switched_on(ours.loss), switched_on(ours.pir))


def load_naive_bf16() -> Implementation:
    """What training code does: logits in the model's dtype, cross-entropy in fp32."""

    def nll(hidden: Tensor, lm_head: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ lm_head.T).float(), target, reduction="none")

    return composed(nll)


def load_linear_cross_entropy() -> Implementation:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unable(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy (2.13 has)")
    return Implementation(implementations.linear_cross_entropy)


def load_liger(chunk_mem_const: int) -> Implementation:
    """Triton; dW in fp32. reduction="none" recomputes in its backward (before 0.8 its gradients were wrong)."""
    functional = imported("liger_kernel.transformers.functional", "liger-kernel")
    return composed(
        lambda hidden, lm_head, target: functional.liger_fused_linear_cross_entropy(
            hidden, lm_head, target, reduction="none", accum_dtype=torch.float32, chunk_mem_const=chunk_mem_const
        )
    )


def load_liger_cutedsl() -> Implementation:
    """CuTe DSL kernels for Hopper: per-token losses, no logits. Elsewhere the same call is plain PyTorch, no peer."""
    imported("cutlass", "nvidia-cutlass-dsl")
    module = imported("liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger-kernel")
    if torch.cuda.get_device_capability() != (9, 0):
        raise Unable("its kernels are for compute capability 9.0")
    os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"  # a host sync a call
    return composed(module.LigerFusedLinearScaledCrossEntropyFunction.apply)


def load_cce(filter_eps: str | None) -> Implementation:
    """Apple's; logits recomputed in the backward, gradients accumulated in the inputs' dtype."""
    cce = imported("cut_cross_entropy", "cut-cross-entropy")
    return composed(
        lambda hidden, lm_head, target: cce.linear_cross_entropy(
            hidden, lm_head, target, reduction="none", filter_eps=filter_eps, impl="cce"
        )
    )


def load_quack() -> Implementation:
    """bf16 logits of all tokens from cuBLAS, then its cross-entropy kernel; its chunked function gives a scalar."""
    quack = imported("quack.linear_cross_entropy", "quack-kernels")
    return composed(
        lambda hidden, lm_head, target: quack.linear_cross_entropy_func(
            hidden, lm_head, None, target, reduction="none", inplace_backward=True
        )
    )


class _HiddenStatesAsModel:
    """What `add_fused_lm_head` needs of a causal language model, around hidden states that are there already."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)
        self.lm_head: Tensor | None = None

    def forward(self, hidden: Tensor, **_: object) -> Any: ...

    def base_model(self, hidden: Tensor, **_: object) -> Any:
        return SimpleNamespace(last_hidden_state=hidden[None])

    def get_output_embeddings(self) -> Any:
        return SimpleNamespace(weight=self.lm_head, bias=None)


def load_trl() -> Implementation:
    """The fused head of its trainers: tiles from cuBLAS in the model's dtype, gradients accumulated in fp32."""
    trainer = imported("trl.trainer.utils", "trl")
    if not hasattr(trainer, "add_fused_lm_head"):
        raise Unable("this trl has no add_fused_lm_head (1.16 has)")
    model: Any = _HiddenStatesAsModel()
    trainer.add_fused_lm_head(model)

    def nll(hidden: Tensor, lm_head: Tensor, target: Tensor) -> Tensor:
        model.lm_head = lm_head
        return -model.forward(hidden, shift_labels=target[None], fused_lm_head=True).log_probs[0]

    return composed(nll)


def load_quack_chunked() -> Implementation:
    raise Unable("chunked_linear_cross_entropy returns a mean or a sum: no token weights")


def load_liger_cutedsl_flce() -> Implementation:
    raise Unable("the CuTe DSL fused linear cross-entropy returns a mean or a sum: no token weights")


PEERS = {  # by importance and quickness to compile: where time runs out, the last are not measured
    peer.name: peer
    for peer in (
        Peer("perce", "**perce**", load_perce),
        Peer("perce_stored", "**perce**, 16-bit logits kept", load_perce_stored),
        Peer("trl", "TRL fused head", load_trl),
        Peer("cce_exact", "cut-cross-entropy, exact", lambda: load_cce(None)),
        Peer("liger_large", "Liger, Triton, 8 × chunks", lambda: load_liger(8)),
        Peer("naive_bf16", "PyTorch, bf16 logits", load_naive_bf16),
        Peer("liger_cutedsl", "Liger, CuTe DSL, per token", load_liger_cutedsl),
        Peer("quack", "quack, all logits", load_quack),
        Peer("cce_filtered", "cut-cross-entropy, filtered", lambda: load_cce("auto")),
        Peer("linear_cross_entropy", "F.linear_cross_entropy", load_linear_cross_entropy, tf32=True),
        Peer("naive", "PyTorch, fp32 logits", lambda: Implementation(implementations.naive), tf32=True),
        Peer("compiled", "torch.compile, fp32 logits", lambda: Implementation(implementations.compiled), tf32=True),
        Peer("liger", "Liger, Triton, as it comes", lambda: load_liger(1)),
        Peer("quack_chunked", "quack, chunked", load_quack_chunked),
        Peer("liger_cutedsl_flce", "Liger, CuTe DSL, fused", load_liger_cutedsl_flce),
    )
}
