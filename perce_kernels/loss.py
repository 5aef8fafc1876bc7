"""The public op: checks the arguments, chooses a backend, and applies scalar factors after the sweep."""

import math
import numbers
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from perce_kernels import ops, reference, vocab_parallel
from perce_kernels.backends import resolve_backend
from perce_kernels.contract import check_target, no_autocast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

WHOLE = (int, torch.SymInt, numbers.Integral)  # the last for NumPy's
REAL = (*WHOLE, float, torch.SymFloat, numbers.Real)


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
        hidden: (N, D) factual hidden states; row i predicts target[i]. Any float dtype; statistics and loss are fp32
            (fp64 for fp64). Under autocast, hidden, hidden_cf, lm_head and bias are cast to the autocast dtype first.
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
            (torch.compile reads it when it traces), else Triton on a GPU that it supports, else torch. There is no
            fallback from a backend that is named: it runs or raises.
        return_stats: also return PerCEStats.

    Returns:
        The loss, 0-d or (N,), in fp32 (fp64 for fp64 inputs), or (loss, PerCEStats).

    Raises:
        ValueError: a wrong shape, dtype, device, option or out-of-range target, naming the argument.
        RuntimeError: with the fused backends, second-order gradients; forward-mode AD; transforms of torch.func (grad,
            vjp, jvp, vmap, …) that reach hidden, lm_head or bias. torch.vmap over the other inputs is exact.
    """
    _check_options(contrast=contrast, normalize=normalize, reduction=reduction)
    _check_tensors(
        hidden=hidden, lm_head=lm_head, target=target, hidden_cf=hidden_cf, logp_cf=logp_cf, token_weight=token_weight,
        bias=bias, seq_id=seq_id,
    )  # fmt: skip
    backend = resolve_backend(backend, hidden.device, group)
    _check_transforms(backend, hidden=hidden, lm_head=lm_head, bias=bias)
    hidden, lm_head, hidden_cf, bias = _autocast(hidden, lm_head, hidden_cf, bias)
    _check_head(hidden, lm_head, target, bias, softcap, logit_scale, ignore_index, group)
    _check_weights(hidden, target, hidden_cf, logp_cf, token_weight, clip_min, clip_max, normalize, seq_id)
    shard = vocab_parallel.place(group, vocab_start, vocab_size, lm_head)
    denominator = _denominator(num_items, reduction, target, ignore_index)

    hidden_cf, logp_cf, token_weight = (None if x is None else x.detach() for x in (hidden_cf, logp_cf, token_weight))
    head = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index}
    clip = {"clip_min": clip_min, "clip_max": clip_max, "contrast": contrast}
    execution = {
        "compact": compact, "backend": backend, "group": shard[0], "vocab_start": vocab_start, "vocab_size": vocab_size,
    }  # fmt: skip
    if backend == "reference":
        check_target(target, lm_head.shape[0], ignore_index)
        with no_autocast(hidden.device):  # autocast would round products to its dtype
            loss, logp, logp_cf, weight = reference.perce_loss(
                hidden, lm_head, target, hidden_cf, logp_cf=logp_cf, token_weight=token_weight, normalize=normalize,
                seq_id=seq_id, reduction="none", **head, **clip,
            )  # fmt: skip
        loss = loss if reduction == "none" else loss.sum()
    elif reduction == "none" or normalize == "sequence":
        loss, logp, logp_cf, weight = _per_token_loss(
            hidden, lm_head, target, hidden_cf, logp_cf, token_weight, normalize, seq_id, head, clip,
            execution,
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
        loss = loss / denominator
    if not return_stats:
        return loss
    logp, logp_cf, weight = logp.detach(), logp_cf.detach(), weight.detach()
    pir = torch.zeros_like(logp) if token_weight is not None else logp - logp_cf
    return loss, PerCEStats(logp, logp_cf, pir, weight)


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
    _check_tensors(hidden=hidden, lm_head=lm_head, target=target, bias=bias)
    backend = resolve_backend(backend, hidden.device, group)
    _check_transforms(backend, hidden=hidden, lm_head=lm_head, bias=bias)
    hidden, lm_head, _, bias = _autocast(hidden, lm_head, None, bias)
    _check_head(hidden, lm_head, target, bias, softcap, logit_scale, ignore_index, group)
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


def _per_token_loss(
    hidden, lm_head, target, hidden_cf, logp_cf, token_weight, normalize, seq_id, head, clip, execution
):
    """(N,) losses by recomputation, for weights or losses per token that are only known after the whole sweep."""
    options = {**head, **execution, "return_entropy": False}
    logp, *_ = ops.logprobs_op(hidden, lm_head, target, **options)
    valid = target != head["ignore_index"]
    if token_weight is None:
        if hidden_cf is not None:
            with torch.no_grad():
                logp_cf, *_ = ops.logprobs_op(hidden_cf, lm_head, target, **options)
        logp_cf = torch.where(valid, logp_cf.to(logp.dtype), 0)
        token_weight = reference.contrast_weight(logp, logp_cf, **clip)
    else:
        logp_cf = torch.zeros_like(logp)
    weight = torch.where(valid, token_weight.to(logp.dtype), 0)
    weight = reference.normalize_weight(weight, valid, normalize, seq_id)
    return -weight * logp, logp, logp_cf, weight


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


def _check_transforms(backend: str, **trainable: Tensor | None) -> None:
    """RuntimeError if a fused op would lose a tangent, or the gradient of a batch, or fail inside torch. Other inputs
    may be transformed, because they are constants in the op, or are applied outside it."""
    if backend == "reference" or (forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active()):
        return
    for name, x in trainable.items():
        if x is not None:
            _check_transform(name, x)


def _check_transform(name: str, x: Tensor) -> None:
    if torch.compiler.is_compiling():  # a traced tensor does not show it; after a graph break this runs untraced
        raise ops.unsupported("forward-mode AD, or a transform of torch.func, inside torch.compile is")
    if forward_ad.unpack_dual(x).tangent is not None:
        raise ops.unsupported(f"forward-mode AD (a tangent of {name}, as of torch.func.jvp or jacfwd) is")
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            raise ops.unsupported(f"torch.vmap over {name} is", ", or one call on the rows of the whole batch")
        if functorch.is_gradtrackingtensor(x):
            asked = f"torch.func.grad, vjp, jacrev or hessian (what reaches {name}) is"
            raise ops.unsupported(asked, ", or torch.autograd.grad for first-order gradients")
        x = functorch.get_unwrapped(x)  # torch.func.functionalize


def _check_options(**options: str) -> None:
    allowed = {
        "contrast": ("log", "ratio"),
        "normalize": ("none", "batch", "sequence"),
        "reduction": ("mean", "sum", "none"),
    }
    for name, value in options.items():
        if value not in allowed[name]:
            raise ValueError(f"{name}: expected one of {_quoted(allowed[name])}, got {value!r}")


def _quoted(choices: tuple[str, ...]) -> str:
    return ", ".join(f'"{choice}"' for choice in choices)


def _check_tensors(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor) and (value is not None or name in ("hidden", "lm_head", "target")):
            remedy = ". Pass its .weight" if isinstance(value, torch.nn.Module) else ""
            raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}{remedy}")
        if hasattr(value, "to_local"):  # of DTensor, whose module takes a while to import
            remedy = "Pass .full_tensor()"
            if name in ("lm_head", "bias"):
                remedy = (
                    "Read it inside its module's own forward, where FSDP2 has gathered it, or pass .to_local() of a "
                    "head that is sharded over its rows, with group=, vocab_start= and vocab_size="
                )
            raise ValueError(f"{name}: expected a plain tensor, got a DTensor. {remedy}")


def _check_head(hidden, lm_head, target, bias, softcap, logit_scale, ignore_index, group) -> None:
    if hidden.dim() != 2 or not hidden.is_floating_point():
        remedy = ". Pass flatten(0, 1) of hidden and of target" if hidden.dim() == 3 else ""
        raise ValueError(f"hidden: expected a floating-point (N, D) tensor, got {_describe(hidden)}{remedy}")
    d = hidden.shape[1]
    if lm_head.dim() != 2 or lm_head.shape[1] != d or (lm_head.shape[0] == 0 and group is None):
        remedy = ""
        if lm_head.dim() == 2 and lm_head.shape[0] == d:
            remedy = ". Pass lm_head.T"
        elif lm_head.numel() == 0:
            remedy = ". If its parameters are partitioned (ZeRO-3), gather it first"
        raise ValueError(
            f"lm_head: expected (V, {d}) with V >= 1 to match hidden (N, {d}), got {_describe(lm_head)}{remedy}"
        )
    _check_like("lm_head", lm_head, hidden, shape=False)
    if hidden.shape[0] != target.shape[:1].numel() == lm_head.shape[0]:
        raise ValueError(
            f"hidden, lm_head: expected hidden with {lm_head.shape[0]} rows as target, got {_describe(hidden)}. Is the "
            "head given first? hidden comes before lm_head"
        )
    _check_per_token("target", target, hidden, "int64")
    if bias is not None:
        if bias.shape != lm_head.shape[:1] or not bias.is_floating_point():
            raise ValueError(f"bias: expected a floating-point ({lm_head.shape[0]},) tensor, got {_describe(bias)}")
        if bias.device != hidden.device:
            raise ValueError(f"bias: expected device {hidden.device} as hidden, got {bias.device}")
    _check_numbers(softcap=1 if softcap is None else softcap, logit_scale=logit_scale, ignore_index=ignore_index)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number > 0 or None, got {softcap}")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale: expected a finite number, got {logit_scale}")


def _check_numbers(**given: Any) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, WHOLE if name == "ignore_index" else REAL):
            got = "a tensor" if isinstance(value, Tensor) else repr(value)
            remedy = ". To train it, multiply hidden, hidden_cf and bias by it" if name == "logit_scale" else ""
            raise ValueError(f"{name}: expected a number, got {got}{remedy}")


def _check_weights(hidden, target, hidden_cf, logp_cf, token_weight, clip_min, clip_max, normalize, seq_id) -> None:
    """ValueError for a wrong source of the weights, clip, or normalisation."""
    sources = {"hidden_cf": hidden_cf, "logp_cf": logp_cf, "token_weight": token_weight}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"expected exactly one of hidden_cf, logp_cf, token_weight, got {' and '.join(given) or 'none'}"
        )
    if hidden_cf is not None:
        _check_like("hidden_cf", hidden_cf, hidden)
    else:
        _check_per_token(given[0], sources[given[0]], target, "float")
    _check_numbers(clip_min=clip_min, clip_max=clip_max)
    if not 0 <= clip_min <= clip_max < math.inf:  # math.isfinite would break the graph of a dynamic compile
        raise ValueError(f"clip_min, clip_max: expected finite 0 <= clip_min <= clip_max, got {clip_min}, {clip_max}")
    if (normalize == "sequence") != (seq_id is not None):
        raise ValueError(f'seq_id: expected with normalize="sequence" and only then, got normalize="{normalize}"')
    if seq_id is not None:
        _check_per_token("seq_id", seq_id, target, "integer")


def _check_like(name: str, value: Tensor, hidden: Tensor, shape: bool = True) -> None:
    same_shape = not shape or value.shape == hidden.shape
    if not same_shape or value.dtype != hidden.dtype or value.device != hidden.device:
        expected = _describe(hidden) if shape else f"{hidden.dtype} on {hidden.device}"
        remedy = "" if value.dtype == hidden.dtype else ". Cast one of them, or use torch.autocast"
        raise ValueError(f"{name}: expected {expected} as hidden, got {_describe(value)}{remedy}")


def _check_per_token(name: str, value: Tensor, like: Tensor, kind: str) -> None:
    right_kind = {
        "float": value.is_floating_point(),
        "integer": not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool),
        "int64": value.dtype == torch.int64,
    }[kind]
    if value.shape != like.shape[:1] or not right_kind or value.device != like.device:
        other = not (right_kind or value.is_floating_point()) and value.shape == like.shape[:1]
        remedy = f". Pass {name}.long()" if kind == "int64" and other else ""
        raise ValueError(f"{name}: expected {kind} ({like.shape[0]},) on {like.device}, got {_describe(value)}{remedy}")


def _denominator(num_items: int | Tensor | None, reduction: str, target: Tensor, ignore_index: int) -> Tensor | int:
    if num_items is not None and reduction != "mean":
        raise ValueError(f'num_items: expected with reduction="mean" only, got reduction="{reduction}"')
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            raise ValueError(f"num_items: expected an int or a 0-d tensor, got {_describe(num_items)}")
        # A number on the CPU can divide a loss on a GPU as it is; copying it there would wait for the GPU.
        return (num_items if num_items.device.type == "cpu" else num_items.to(target.device)).clamp(min=1)
    if num_items is not None:
        if isinstance(num_items, bool) or not isinstance(num_items, WHOLE) or num_items <= 0:
            raise ValueError(f"num_items: expected an int > 0 or a 0-d tensor, got {num_items!r}")
        return num_items
    return (target != ignore_index).sum().clamp(min=1)


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"
