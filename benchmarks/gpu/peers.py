"""Libraries from which a user could build PerCE, each used as well as it allows. All compute:

    nll_cf = nll(hidden_cf)   under no_grad
    nll    = nll(hidden)
    loss   = mean(clip(nll_cf − nll, 0.8, 5) · nll)          the weight detached

A library is suitable if its per-token losses have correct gradients under unequal upstream gradients, because token
weights are such gradients. One that returns only a mean or a sum cannot weight tokens and is listed with that reason.
Whether a library's statistics are accurate to fp32 or made from bf16 logits is measured, not assumed. The signatures
are those of liger-kernel 0.8.5, cut-cross-entropy 25.1.1, quack-kernels 0.6.5 and trl 1.16.0.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import implementations
from benchmarks.gpu.child import Unable
from benchmarks.implementations import CLIP, Loss, weighted
from perce_kernels import fused_perce_loss

Nll = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Implementation:
    """What a peer's `load` returns: functions of hidden, lm_head, target, hidden_cf."""

    loss: Loss
    pir: Loss
    """(N,) contrasts that the loss is weighted by."""


@dataclass
class Peer:
    """A library's name, and how to load its implementation; `load` imports it and may fail."""

    name: str
    title: str
    load: Callable[[], Implementation]
    tf32: bool = False
    """Whether fp32 products may use TF32: much faster, and exact for factors with bf16 values (all except dz)."""


def composed(nll: Nll, nll_cf: Nll | None = None) -> Implementation:
    """PerCE from a function for per-token losses; nll_cf: one for the counterfactual pass, which needs no gradient."""

    def both(hidden: Tensor, lm_head: Tensor, target: Tensor, hidden_cf: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            per_token_cf = (nll_cf or nll)(hidden_cf, lm_head.detach(), target)
        return weighted(per_token_cf, nll(hidden, lm_head, target))

    return of_both(both)


def of_both(both: Callable[..., tuple[Tensor, Tensor]]) -> Implementation:
    """An implementation from a function that returns (loss, PIR)."""
    return Implementation(lambda *inputs: both(*inputs)[0], lambda *inputs: both(*inputs)[1])


def imported(module: str, package: str) -> Any:
    """The module. Unable with the reason if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unable(f"{package} is not installed, or lacks something: {error}") from error


def load_perce() -> Implementation:
    """Ours, by the Triton kernels on every device: without a GPU they are interpreted."""

    def pir(*inputs: Tensor) -> Tensor:
        return fused_perce_loss(*inputs, backend="triton", return_stats=True)[1].pir

    return Implementation(partial(fused_perce_loss, backend="triton"), pir)


def load_perce_by(way: str) -> Implementation:
    """Ours by one of tiles.WAYS, to measure which is fastest on a GPU."""
    tiles = imported("perce_kernels.gpu.tiles", "triton")
    ours = load_perce()

    def switched_on(call: Loss) -> Loss:
        def switched(*inputs: Tensor, **options: Any) -> Tensor:
            in_use = dict(tiles.WAY)
            tiles.WAY.update(dict.fromkeys(in_use, way))
            try:
                return call(*inputs, **options)
            finally:
                tiles.WAY.update(in_use)

        return switched

    return Implementation(switched_on(ours.loss), switched_on(ours.pir))


def load_naive_bf16() -> Implementation:
    """What training code usually does: logits in the model's dtype, cross-entropy in fp32."""

    def nll(hidden: Tensor, lm_head: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ lm_head.T).float(), target, reduction="none")

    return composed(nll)


def load_linear_cross_entropy() -> Implementation:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unable(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy (2.13 has)")
    return of_both(implementations.linear_cross_entropy_with_pir)


def load_compiled() -> Implementation:
    return of_both(lambda *inputs: implementations.compiled_with_pir()(*inputs))


def load_liger(chunk_mem_const: int) -> Implementation:
    """Triton; dW in fp32. reduction="none" recomputes in its backward (before 0.8 its gradients were wrong)."""
    functional = imported("liger_kernel.transformers.functional", "liger-kernel")
    return composed(
        lambda hidden, lm_head, target: functional.liger_fused_linear_cross_entropy(
            hidden, lm_head, target, reduction="none", accum_dtype=torch.float32, chunk_mem_const=chunk_mem_const
        )
    )


def load_liger_cutedsl() -> Implementation:
    """CuTe DSL kernels for Hopper: per-token losses without logits. On other GPUs the same call is plain PyTorch."""
    imported("cutlass", "nvidia-cutlass-dsl")
    module = imported("liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger-kernel")
    if torch.cuda.get_device_capability() != (9, 0):
        raise Unable("its kernels are for compute capability 9.0")
    os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"  # it would cost a host sync per call
    return composed(module.LigerFusedLinearScaledCrossEntropyFunction.apply)


def load_cce(filter_eps: str | None) -> Implementation:
    """Apple's; it recomputes logits in the backward and accumulates gradients in the inputs' dtype."""
    cce = imported("cut_cross_entropy", "cut-cross-entropy")
    return composed(
        lambda hidden, lm_head, target: cce.linear_cross_entropy(
            hidden, lm_head, target, reduction="none", filter_eps=filter_eps, impl="cce"
        )
    )


def quack_parts() -> tuple[Nll, Nll]:
    """(with a gradient, without one): its cross-entropy on bf16 logits of all tokens; and its GEMM that stores no
    logits and takes log-sum-exp and target logit from the fp32 accumulators.
    """
    quack = imported("quack.linear_cross_entropy", "quack-kernels")
    epilogue = imported("quack.epilogue.library", "quack-kernels")

    def with_gradient(hidden: Tensor, lm_head: Tensor, target: Tensor) -> Tensor:
        return quack.linear_cross_entropy_func(hidden, lm_head, None, target, reduction="none", inplace_backward=True)

    def without(hidden: Tensor, lm_head: Tensor, target: Tensor) -> Tensor:
        # tuned=True would compile and time dozens of configurations.
        found = epilogue.lse_target_epi(hidden, lm_head.mT, store_d=False, target=target, tuned=False)
        return found["lse"] - found["target_logit"]

    return with_gradient, without


def load_quack() -> Implementation:
    """Without its chunked function, its fastest, which returns a scalar and so allows no token weights."""
    return composed(*quack_parts())


def load_quack_exact() -> Implementation:
    """Weights of both passes from the GEMM without logits, because bf16 logits are too coarse: one more product."""
    with_gradient, without = quack_parts()

    def both(hidden: Tensor, lm_head: Tensor, target: Tensor, hidden_cf: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            pir = without(hidden_cf, lm_head, target) - without(hidden.detach(), lm_head.detach(), target)
        return (pir.clamp(*CLIP) * with_gradient(hidden, lm_head, target)).mean(), pir

    return of_both(both)


class _HiddenStatesAsModel:
    """The parts of a causal language model that `add_fused_lm_head` needs, with given hidden states."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)
        self.lm_head: Tensor | None = None

    def forward(self, hidden: Tensor, **_: object) -> Any: ...

    def base_model(self, hidden: Tensor, **_: object) -> Any:
        return SimpleNamespace(last_hidden_state=hidden[None])

    def get_output_embeddings(self) -> Any:
        return SimpleNamespace(weight=self.lm_head, bias=None)


def load_trl() -> Implementation:
    """The fused head of TRL's trainers: tiles from cuBLAS in the model's dtype, gradients accumulated in fp32."""
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


PEERS = {  # by importance and compile time: if time runs out, the last are not measured
    peer.name: peer
    for peer in (
        Peer("perce", "**perce**", load_perce),
        Peer("trl", "TRL fused head", load_trl),
        Peer("cce_exact", "cut-cross-entropy, exact", lambda: load_cce(None)),
        Peer("liger_large", "Liger, Triton, 8 × chunks", lambda: load_liger(8)),
        Peer("naive_bf16", "PyTorch, bf16 logits", load_naive_bf16),
        Peer("liger_cutedsl", "Liger, CuTe DSL, per token", load_liger_cutedsl),
        Peer("quack", "quack, all logits", load_quack),
        Peer("quack_exact", "quack, all logits, exact weights", load_quack_exact),
        Peer("cce_filtered", "cut-cross-entropy, filtered", lambda: load_cce("auto")),
        Peer("linear_cross_entropy", "F.linear_cross_entropy", load_linear_cross_entropy, tf32=True),
        Peer("naive", "PyTorch, fp32 logits", lambda: of_both(implementations.naive_with_pir), tf32=True),
        Peer("compiled", "torch.compile, fp32 logits", load_compiled, tf32=True),
        Peer("liger", "Liger, Triton, as it comes", lambda: load_liger(1)),
        Peer("quack_chunked", "quack, chunked", load_quack_chunked),
        Peer("liger_cutedsl_flce", "Liger, CuTe DSL, fused", load_liger_cutedsl_flce),
    )
}

WAY_PEERS = {
    "fused": Peer("perce_fused", "**perce**, fp32 logits", lambda: load_perce_by("fused")),
    "stored": Peer("perce_stored", "**perce**, 16-bit logits kept", lambda: load_perce_by("stored")),
}
"""Ours by each of tiles.WAYS; "perce" in PEERS takes the way in use."""


def find_peer(name: str) -> Peer:
    """One of PEERS or WAY_PEERS, or one of the fakes that test the harness."""
    for peer in (*PEERS.values(), *WAY_PEERS.values()):
        if peer.name == name:
            return peer
    from tests.helpers.fake_peers import FAKES

    return FAKES[name]
