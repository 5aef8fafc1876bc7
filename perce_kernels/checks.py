"""Checks of the op's arguments: ValueErrors that name the argument, what was expected and what puts a likely mistake
right, and RuntimeErrors for transforms that a fused op cannot have."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from perce_kernels import ops

WHOLE = (int, torch.SymInt, numbers.Integral)  # the last for NumPy's
REAL = (*WHOLE, float, torch.SymFloat, numbers.Real)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # torch cannot sort the others
LARGEST = torch.finfo(torch.float32).max


def check_transforms(backend: str, **trainable: Tensor | None) -> None:
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


def check_options(**options: str) -> None:
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


def check_tensors(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor) and (value is not None or name in ("hidden", "lm_head", "target")):
            remedy = ". Pass its .weight" if isinstance(value, torch.nn.Module) else ""
            if hasattr(value, "base_layer") or hasattr(value, "original_module"):  # of PEFT: .weight lacks the adapter
                remedy = ". Merge its adapter, or leave the adapter off the head"
            raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}{remedy}")
        if hasattr(value, "to_local"):  # of DTensor, whose module takes a while to import
            remedy = "Pass .full_tensor()"
            if name in ("lm_head", "bias"):
                remedy = (
                    "Read it inside its module's own forward, where FSDP2 has gathered it, or pass .to_local() of a "
                    "head that is sharded over its rows, with group=, vocab_start= and vocab_size="
                )
            raise ValueError(f"{name}: expected a plain tensor, got a DTensor. {remedy}")


def check_head(hidden, lm_head, target, bias, softcap, logit_scale, ignore_index, group) -> None:
    if hidden.dim() != 2 or not hidden.is_floating_point() or hidden.itemsize < 2:
        rows = (  # flattened, rows of the two passes would belong to other tokens where these are padded
            ". Select the response's rows, of which row i predicts target[i]: hidden[:, :-1][mask[:, 1:]], "
            "target[:, 1:][mask[:, 1:]]; likewise of the other pass"
        )
        remedy = rows if hidden.dim() == 3 else ""
        raise ValueError(
            f"hidden: expected a floating-point (N, D) tensor of 16 bits or more, got {describe(hidden)}{remedy}"
        )
    d = hidden.shape[1]
    if lm_head.dim() != 2 or lm_head.shape[1] != d or (lm_head.shape[0] == 0 and group is None):
        remedy = ""
        if lm_head.dim() == 2 and lm_head.shape[0] == d:
            remedy = ". Pass lm_head.T"
        elif lm_head.numel() == 0:
            remedy = ". If its parameters are partitioned (ZeRO-3), gather it first"
        raise ValueError(
            f"lm_head: expected (V, {d}) with V >= 1 to match hidden (N, {d}), got {describe(lm_head)}{remedy}"
        )
    _check_like("lm_head", lm_head, hidden, shape=False)
    if hidden.shape[0] != target.shape[:1].numel() == lm_head.shape[0]:
        raise ValueError(
            f"hidden, lm_head: expected hidden with {lm_head.shape[0]} rows as target, got {describe(hidden)}. Is the "
            "head given first? hidden comes before lm_head"
        )
    _check_per_token("target", target, hidden, "int64")
    if bias is not None:
        if bias.shape != lm_head.shape[:1] or not bias.is_floating_point():
            raise ValueError(f"bias: expected a floating-point ({lm_head.shape[0]},) tensor, got {describe(bias)}")
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


def check_weights(hidden, target, hidden_cf, logp_cf, token_weight, clip_min, clip_max, normalize, seq_id) -> None:
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
    if not 0 <= clip_min <= clip_max <= LARGEST:
        raise ValueError(
            f"clip_min, clip_max: expected 0 <= clip_min <= clip_max <= {LARGEST:g}, got {clip_min}, {clip_max}"
        )
    if (normalize == "sequence") != (seq_id is not None):
        raise ValueError(f'seq_id: expected with normalize="sequence" and only then, got normalize="{normalize}"')
    if seq_id is not None:
        _check_per_token("seq_id", seq_id, target, "integer")


def _check_like(name: str, value: Tensor, hidden: Tensor, shape: bool = True) -> None:
    same_shape = not shape or value.shape == hidden.shape
    if not same_shape or value.dtype != hidden.dtype or value.device != hidden.device:
        expected = describe(hidden) if shape else f"{hidden.dtype} on {hidden.device}"
        remedy = "" if value.dtype == hidden.dtype else ". Cast one of them, or use torch.autocast"
        raise ValueError(f"{name}: expected {expected} as hidden, got {describe(value)}{remedy}")


def _check_per_token(name: str, value: Tensor, like: Tensor, kind: str) -> None:
    right_kind = {
        "float": value.is_floating_point(),
        "integer": value.dtype in INTEGERS,
        "int64": value.dtype == torch.int64,
    }[kind]
    if value.shape != like.shape[:1] or not right_kind or value.device != like.device:
        other = not (right_kind or value.is_floating_point()) and value.shape == like.shape[:1]
        remedy = f". Pass {name}.long()" if kind == "int64" and other else ""
        raise ValueError(f"{name}: expected {kind} ({like.shape[0]},) on {like.device}, got {describe(value)}{remedy}")


def describe(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"
