"""The interface of every backend. A backend is a module with

    sweep(call, weighting, needed) → PerCEOutput            loss, statistics and gradients, in one pass over the tokens
    logprobs(call, return_entropy) → (logp, entropy, top1)  (N,) each, the second (0,) unless asked for, the third bool:
                                                            whether no token is likelier than the target
    scaled(gradient, factor, dtype) → Tensor                gradient · factor (), rounded once, to this dtype

The caller has checked the arguments. `Rows` says which rows of a call are computed.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from perce_kernels.vocab_parallel import Shard


class Call(NamedTuple):
    """The tokens and the output layer, for either op. With a shard, lm_head and bias are this rank's rows; everything
    else refers to the whole vocabulary.
    """

    hidden: Tensor  # (N, D)
    lm_head: Tensor  # (V, D)
    target: Tensor  # (N,)
    bias: Tensor | None  # (V,)
    ignore_index: int
    softcap: float | None
    logit_scale: float
    compact: bool
    shard: Shard | None = None

    @property
    def vocab_size(self) -> int:
        """The size of the whole vocabulary."""
        return self.lm_head.shape[0] if self.shard is None else self.shard.vocab_size


class Contrasting(NamedTuple):
    """How log-probabilities become weights: the last arguments of reference.contrast_weight."""

    contrast: str
    clip_min: float
    clip_max: float


class Weighting(NamedTuple):
    """The source of the token weights: exactly one of the tensors is given."""

    hidden_cf: Tensor | None  # (N, D)
    logp_cf: Tensor | None  # (N,)
    token_weight: Tensor | None  # (N,)
    contrasting: Contrasting


class Needed(NamedTuple):
    """Which gradients are to be computed."""

    dhidden: bool
    dlm_head: bool
    dbias: bool


class PerCEOutput(NamedTuple):
    """The result of one sweep. Gradients are fp32, of the summed loss, and have no elements if they are not needed."""

    loss_sum: Tensor  # ()
    logp: Tensor  # (N,)
    logp_cf: Tensor  # (N,)
    token_weight: Tensor  # (N,)
    dhidden: Tensor  # (N, D) or (0,)
    dlm_head: Tensor  # (V, D) or (0,)
    dbias: Tensor  # (V,) or (0,)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs: the dtype of logits, statistics, loss and accumulated gradients."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switches autocast off, which stays on inside the body of a custom op; the device "meta" has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class Rows:
    """The rows of a call that are computed: those with a target (one host sync), or all, if compact=False (no sync)."""

    def __init__(self, call: Call):
        target, ignore_index = call.target, call.ignore_index
        check_target(target, call.vocab_size, ignore_index)
        self.n = target.shape[0]
        self.target = target.contiguous()  # (n,) of the computed rows
        self.index: Tensor | None = None  # (n,) the rows that are computed, if some are left out
        self.ignored: Tensor | None = None  # (N,) bool: rows without a target, if all are computed
        if call.compact:
            index = (target != ignore_index).nonzero().squeeze(1)  # the one host sync
            if index.shape[0] != self.n:
                self.index, self.n, self.target = index, index.shape[0], target[index]
        else:
            self.ignored = target == ignore_index

    def chunks(self, size: int) -> Iterator[slice]:
        for start in range(0, self.n, max(size, 1)):
            yield slice(start, min(start + size, self.n))

    def dz_scale(self, dtype: torch.dtype, weighting: Weighting, logit_scale: float) -> Tensor | None:
        """() power of two that brings |w · logit_scale| just below 2¹⁵ in fp16, whose largest number is 65504; else
        None.

        Given weights may have any size: in the backward pass of token_logprobs they are −(upstream gradient), loss
        scale included.
        """
        weight = weighting.token_weight
        if dtype != torch.float16 or self.n == 0:
            return None
        if weight is None:
            exponent = math.frexp(weighting.contrasting.clip_max * abs(logit_scale))[1]
            return torch.full((), 2.0 ** min(15 - exponent, 100), dtype=torch.float32, device=self.target.device)
        if self.ignored is not None:
            weight = weight.masked_fill(self.ignored, 0)
        elif self.index is not None:
            weight = weight[self.index]
        return (15 - (weight.float().abs().amax() * logit_scale).frexp().exponent).clamp(-100, 100).float().exp2()


def check_target(target: Tensor, vocab_size: int, ignore_index: int) -> None:
    """ValueError for the first id outside the vocabulary that is not ignore_index. On a GPU and in a traced graph, the
    host does not wait for the ids: there it is an assertion on the device."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling():
        if functorch.is_batchedtensor(target):  # torch has no rule for a batch of assertions
            raise RuntimeError("target: torch.vmap over it works outside torch.compile, or without fullgraph=True")
    else:
        while functorch.is_functorch_wrapped_tensor(target):
            target = functorch.get_unwrapped(target)  # under torch.vmap: the targets of all calls at once
    outside = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    # torch 2.11 has no such assertion for MPS, and 2.13 none for XPU.
    on_device = target.device.type not in ("cpu", "mps", "xpu")
    if on_device or torch.compiler.is_compiling() or get_proxy_mode() is not None:
        torch._assert_async(~outside.any(), f"target: an id lies outside [0, {vocab_size}) and is not ignore_index")
    elif outside.any():
        row = outside.nonzero()[0].tolist()  # [row], or under torch.vmap the indices among all rows
        raise ValueError(
            f"target: expected ids in [0, {vocab_size}) or ignore_index={ignore_index}, got {int(target[tuple(row)])} "
            f"at row {', '.join(map(str, row))}"
        )
