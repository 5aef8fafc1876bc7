"""The public op: checks the arguments, chooses a backend, and applies scalar factors after the sweep."""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from perce_kernels import ops, reference, vocab_parallel
from perce_kernels.backends import resolve_backend
from perce_kernels.checks import (
    WHOLE,
    check_head,
    check_options,
    check_tensors,
    check_transforms,
    check_weights,
    describe,
)
from perce_kernels.contract import check_target, no_autocast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


class HeadOptions(TypedDict, total=False):
    """Options of both ops, for type checkers: what an op returns depends on other options."""

    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    ignore_index: int
    compact: bool
    group: "ProcessGroup | None"
    vocab_start: int | None
    vocab_size: int | None
    backend: str


class LossOptions(HeadOptions, total=False):
    """Options of fused_perce_loss."""

    logp_cf: Tensor | None
    token_weight: Tensor | None
    clip_min: float
    clip_max: float
    contrast: str
    normalize: str
    seq_id: Tensor | None
    reduction: str
    num_items: int | Tensor | None


class PerCEStats(NamedTuple):
    """Per-token statistics, each (N,), fp32 (fp64 for fp64 inputs), detached, and 0 where the target is ignored."""

    logp: Tensor
    """log P(y_i | persona, query, y_<i)."""
    logp_cf: Tensor
    """log P(y_i | query, y_<i): without the persona. 0 if `token_weight` was given."""
    pir: Tensor
    """Personal Influence Ratio, logp − logp_cf. 0 if `token_weight` was given."""
    token_weight: Tensor
    """The weight that the cross-entropy of each token was multiplied by, after clip and normalisation."""


@overload
def fused_perce_loss(
    hidden: Tensor, lm_head: Tensor, target: Tensor, hidden_cf: Tensor | None = None, *,
    return_stats: Literal[False] = False, **options: "Unpack[LossOptions]",
) -> Tensor: ...  # fmt: skip
@overload
def fused_perce_loss(
    hidden: Tensor, lm_head: Tensor, target: Tensor, hidden_cf: Tensor | None = None, *,
    return_stats: Literal[True], **options: "Unpack[LossOptions]",
) -> tuple[Tensor, PerCEStats]: ...  # fmt: skip
@overload
def fused_perce_loss(
    hidden: Tensor, lm_head: Tensor, target: Tensor, hidden_cf: Tensor | None = None, *, return_stats: bool,
    **options: "Unpack[LossOptions]",
) -> Tensor | tuple[Tensor, PerCEStats]: ...  # fmt: skip
def fused_perce_loss(
    hidden: Tensor,  # (N, D)
    lm_head: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    hidden_cf: Tensor | None = None,  # (N, D)
    *,
    logp_cf: Tensor | None = None,  # (N,)
    token_weight: Tensor | None = None,  # (N,)
    bias: Tensor | None = None,  # (V,)
    clip_min: float = 0.8,
    clip_max: float = 5.0,
    contrast: str = "log",
    normalize: str = "none",
    seq_id: Tensor | None = None,  # (N,)
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    compact: bool = True,
    group: "ProcessGroup | None" = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, PerCEStats]:
    """The PerCE loss of arXiv 2603.06595, −(1/n) Σ_i clip(pir_i, m, M) · logp_i, with no (N, V) tensor in memory.

    pir_i = logp_i − logp_cf_i is how much the persona raised the log-probability of token i. Exactly one of
    `hidden_cf`, `logp_cf` and `token_weight` is given, as the source of the weights; no gradient flows through them.

    Args:
        hidden: (N, D) factual hidden states; row i predicts target[i]. Any float dtype from 16 bits on; statistics and
            loss are fp32 (fp64 for fp64). Under autocast, hidden, hidden_cf, lm_head and bias are cast to the autocast
            dtype first.
        lm_head: (V, D) output embedding, same dtype as hidden.
        target: (N,) int64 token ids. Rows equal to `ignore_index` contribute nothing.
        hidden_cf: (N, D) hidden states of the same tokens with the persona removed from the prompt.
        logp_cf: (N,) counterfactual log-probabilities from an earlier pass.
        token_weight: (N,) weights that are used as given, without contrast or clip; ones give plain cross-entropy.
        bias: (V,) output bias.
        clip_min, clip_max: bounds m and M of the weight, 0 ≤ m ≤ M.
        contrast: "log" clips pir (PerCE); "ratio" clips exp(pir) (LongCE, arXiv 2410.23771).
        normalize: "none" (the paper), or rescale weights to mean 1 over the valid tokens of this call ("batch") or of
            each sequence ("sequence", which needs `seq_id`).
        seq_id: (N,) integers that say which sequence each token belongs to.
        reduction: "mean" divides the sum by `num_items`, or by the number of valid tokens; "sum"; "none" gives (N,).
        num_items: denominator of "mean", such as the token count of an accumulation window over all processes; int > 0,
            or a 0-d tensor, clamped to ≥ 1. One on the CPU is a constant in a CUDA graph.
        softcap, logit_scale: logits = softcap·tanh(logit_scale·(h Wᵀ + b)/softcap).
        compact: drop ignored rows before the head, which takes one host sync on CUDA; False never syncs.
        group, vocab_start, vocab_size: the rows of lm_head (and bias) are sharded over this process group. This rank
            has rows [vocab_start, vocab_start + V) of vocab_size, and the shards of all ranks tile these. All other
            arguments must be the same on every rank, and so must upstream gradients and what requires a gradient; the
            results are then the same too. hidden's gradient is complete on every rank; lm_head's and bias's are those
            of the rank's own rows.
        backend: "triton" (CUDA, ROCm), "torch" (chunked, any device), "reference" (holds all logits; plain autograd, to
            any order and under any transform), or "auto": the one that the environment variable PERCE_BACKEND names
            (torch.compile reads it when it traces), else Triton on NVIDIA GPUs that it supports, else torch. There is
            no fallback from a backend that is named: it runs or raises.
        return_stats: also return PerCEStats.

    Returns:
        The loss, 0-d or (N,), in fp32 (fp64 for fp64 inputs), or (loss, PerCEStats).

    Raises:
        ValueError: a wrong shape, dtype, device, option or out-of-range target, naming the argument.
        RuntimeError: with the fused backends, second-order gradients; forward-mode AD; transforms of torch.func (grad,
            vjp, jvp, vmap, …) that reach hidden, lm_head or bias. torch.vmap over the other inputs is exact.
    """
    check_options(contrast=contrast, normalize=normalize, reduction=reduction)
    check_tensors(
        hidden=hidden, lm_head=lm_head, target=target, hidden_cf=hidden_cf, logp_cf=logp_cf, token_weight=token_weight,
        bias=bias, seq_id=seq_id,
    )  # fmt: skip
    backend = resolve_backend(backend, hidden.device, group)
    check_transforms(backend, hidden=hidden, lm_head=lm_head, bias=bias)
    hidden, lm_head, hidden_cf, bias = _autocast(hidden, lm_head, hidden_cf, bias)
    check_head(hidden, lm_head, target, bias, softcap, logit_scale, ignore_index, group)
    check_weights(hidden, target, hidden_cf, logp_cf, token_weight, clip_min, clip_max, normalize, seq_id)
    shard = vocab_parallel.place(group, vocab_start, vocab_size, lm_head)
    denominator = _denominator(num_items, reduction, target, ignore_index)

    hidden_cf, logp_cf, token_weight = (None if x is None else x.detach() for x in (hidden_cf, logp_cf, token_weight))
    head = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index}
    clip = {"clip_min": clip_min, "clip_max": clip_max, "contrast": contrast}
    execution = {
        "compact": compact, "backend": backend, "group": shard[0], "vocab_start": vocab_start, "vocab_size": vocab_size,
    }  # fmt: skip
    if backend == "reference" or reduction == "none" or normalize == "sequence":
        # What is known per token, or only after a whole sweep. Its gradient takes another sweep.
        logprobs: Any = partial(ops.logprobs_op, return_entropy=False, **execution)
        if backend == "reference":
            check_target(target, lm_head.shape[0], ignore_index)
            logprobs = reference.logprobs
        with no_autocast(hidden.device):  # autocast would round products to its dtype
            loss, logp, logp_cf, weight = reference.perce_loss(
                hidden, lm_head, target, hidden_cf, logp_cf=logp_cf, token_weight=token_weight, normalize=normalize,
                seq_id=seq_id, reduction="none", logprobs=logprobs, **head, **clip,
            )  # fmt: skip
        loss = loss if reduction == "none" else loss.sum()
    else:
        needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, lm_head, bias)]
        loss, logp, logp_cf, weight, *_ = ops.loss_op(
            hidden, lm_head, target, hidden_cf, logp_cf, token_weight, bias, clip_min, clip_max, contrast,
            ignore_index, softcap, logit_scale, compact, *needed, backend, *shard,
        )  # fmt: skip
        if normalize == "batch":  # one factor for all tokens, so it can be applied after the sum
            weight = weight.detach()
            total, count = weight.sum(), (target != ignore_index).sum()
            scale = torch.where(total == 0, 0.0, count / total)
            loss, weight = loss * scale, weight * scale
    if reduction == "mean":
        loss = (loss / denominator).to(loss.dtype)  # not that of a num_items in fp64
    if not return_stats:
        return loss
    logp, logp_cf, weight = logp.detach(), logp_cf.detach(), weight.detach()
    pir = torch.zeros_like(logp) if token_weight is not None else logp - logp_cf
    return loss, PerCEStats(logp, logp_cf, pir, weight)


@overload
def token_logprobs(
    hidden: Tensor, lm_head: Tensor, target: Tensor, *, return_entropy: Literal[False] = False,
    return_top1: Literal[False] = False, **options: "Unpack[HeadOptions]",
) -> Tensor: ...  # fmt: skip
@overload
def token_logprobs(
    hidden: Tensor, lm_head: Tensor, target: Tensor, *, return_entropy: Literal[True],
    return_top1: bool = False, **options: "Unpack[HeadOptions]",
) -> tuple[Tensor, ...]: ...  # fmt: skip
@overload
def token_logprobs(
    hidden: Tensor, lm_head: Tensor, target: Tensor, *, return_entropy: bool = False,
    return_top1: Literal[True], **options: "Unpack[HeadOptions]",
) -> tuple[Tensor, ...]: ...  # fmt: skip
@overload
def token_logprobs(
    hidden: Tensor, lm_head: Tensor, target: Tensor, *, return_entropy: bool = False, return_top1: bool = False,
    **options: "Unpack[HeadOptions]",
) -> Tensor | tuple[Tensor, ...]: ...  # fmt: skip
def token_logprobs(
    hidden: Tensor,  # (N, D)
    lm_head: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    compact: bool = True,
    group: "ProcessGroup | None" = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
    return_entropy: bool = False,
    return_top1: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """(N,) log-probabilities of `target` under softmax(logits), without holding all logits.

    Differentiable in hidden, lm_head and bias by recomputation (6·N·D·V FLOP backward). Arguments as in
    `fused_perce_loss`. With `return_entropy`, also the (N,) predictive entropies in nats, detached. Both are fp32 (fp64
    for fp64 inputs) and 0 where ignored. With `return_top1`, also (N,) bool: whether no token is likelier; False where
    ignored. The results are in this order.

    Raises:
        ValueError, RuntimeError: as in `fused_perce_loss`.
    """
    check_tensors(hidden=hidden, lm_head=lm_head, target=target, bias=bias)
    backend = resolve_backend(backend, hidden.device, group)
    check_transforms(backend, hidden=hidden, lm_head=lm_head, bias=bias)
    hidden, lm_head, _, bias = _autocast(hidden, lm_head, None, bias)
    check_head(hidden, lm_head, target, bias, softcap, logit_scale, ignore_index, group)
    shard = vocab_parallel.place(group, vocab_start, vocab_size, lm_head)
    if backend == "reference":
        check_target(target, lm_head.shape[0], ignore_index)
        with no_autocast(hidden.device):
            logp, entropy, top1 = reference.logprobs(
                hidden, lm_head, target, bias=bias, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index
            )
    else:
        logp, entropy, top1 = ops.logprobs_op(
            hidden, lm_head, target, bias, ignore_index, softcap, logit_scale, compact, return_entropy, backend, *shard
        )
    asked = [entropy.detach()] * return_entropy + [top1] * return_top1
    return (logp, *asked) if asked else logp


def _autocast(hidden: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Cast to the autocast dtype if autocast is on, as for F.linear; fp64 is not cast, as there."""
    device = hidden.device.type
    tensors = (hidden, *others)
    if device == "meta" or not torch.is_autocast_enabled(device):  # "meta" has no autocast
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )


def _denominator(num_items: int | Tensor | None, reduction: str, target: Tensor, ignore_index: int) -> Tensor | int:
    if num_items is not None and reduction != "mean":
        raise ValueError(f'num_items: expected with reduction="mean" only, got reduction="{reduction}"')
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            raise ValueError(f"num_items: expected an int or a 0-d tensor, got {describe(num_items)}")
        # A number on the CPU can divide a loss on a GPU as it is; copying it there would wait for the GPU.
        return (num_items if num_items.device.type == "cpu" else num_items.to(target.device)).clamp(min=1)
    if num_items is not None:
        if isinstance(num_items, bool) or not isinstance(num_items, WHOLE) or num_items <= 0:
            raise ValueError(f"num_items: expected an int > 0 or a 0-d tensor, got {num_items!r}")
        return num_items
    return (target != ignore_index).sum().clamp(min=1)
