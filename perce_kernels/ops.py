"""torch.ops.perce.*: schema, shapes for tracing (fake), autograd. Values and errors are the backends' business.

`fused_perce_loss` returns fp32 gradients of the weighted *sum*; autograd only scales them by the upstream gradient, out
of place and before the cast to the input's dtype, so that a second backward, or a loss scale in fp16, is exact.

A process group passes through a schema by its name: `group`, with this rank's `vocab_start` and the whole `vocab_size`.
"""

import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from perce_kernels import chunked, vocab_parallel
from perce_kernels.arguments import Call, Needed, Weighting
from perce_kernels.row_pass import Contrasting

TRITON_FOUND = importlib.util.find_spec("triton") is not None
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs the kernels on CPU tensors. Triton itself reads the variable once, when it is imported."""

HIGHER_ORDER = (
    "perce_kernels: higher-order gradients (create_graph=True) are not supported by the fused op; "
    "use backend='reference', which is plain autograd"
)
WAY_AROUND = (
    'Backend "torch" computes the same without the Triton kernels: --backend torch on a command line, '
    "PERCE_BACKEND=torch in the environment."
)


def triton_needs(device: torch.device) -> str | None:
    """What backend "triton" lacks to run on tensors of this device; None if nothing."""
    if not TRITON_FOUND:
        return "the triton package, which is not installed"
    if device.type == "cuda" or (device.type == "cpu" and TRITON_INTERPRETED):
        return None
    return "a CUDA or ROCm device (or TRITON_INTERPRET=1 set before Triton is imported, for CPU tensors)"


def _implementation(backend: str, device: torch.device) -> ModuleType:
    """The module that computes. "auto" is Triton on a GPU that the kernels are built for, else plain PyTorch."""
    if backend == "torch" or (backend == "auto" and (device.type != "cuda" or not TRITON_FOUND)):
        return chunked
    from perce_kernels.gpu import driver, tiles  # here: Triton is no dependency of a CPU or macOS install

    if backend == "auto" and not tiles.is_supported(device):
        return chunked
    return driver


def _compute(function: str, backend: str, call: Call, *arguments: Any) -> Any:
    """What the backend's function returns. Autocast, which stays on inside a custom op's body, is off in it; an error
    of the Triton backend ends with WAY_AROUND."""
    module = None
    with torch.autocast(call.hidden.device.type, enabled=False):
        try:
            module = _implementation(backend, call.hidden.device)
            return getattr(module, function)(call, *arguments)
        except (ValueError, torch.OutOfMemoryError):  # the caller's mistakes; and what torch has advice for
            raise
        except Exception as error:  # kernels fail to compile, to load or to launch, each with an exception of its own
            if module is chunked:
                raise
            raise RuntimeError(f'backend "triton": {type(error).__name__}: {error}\n{WAY_AROUND}') from error


@torch.library.custom_op("perce::fused_perce_loss", mutates_args=())
def fused_perce_loss(
    hidden: Tensor,  # (N, D)
    lm_head: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    hidden_cf: Tensor | None,  # (N, D)
    logp_cf: Tensor | None,  # (N,)
    token_weight: Tensor | None,  # (N,)
    bias: Tensor | None,  # (V,)
    clip_min: float,
    clip_max: float,
    contrast: str,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    compact: bool,
    need_dhidden: bool,
    need_dlm_head: bool,
    need_dbias: bool,
    backend: str = "auto",
    group: str | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss_sum, logp, logp_cf, token_weight, dhidden, dlm_head, dbias); see chunked.PerCEOutput."""
    shard = vocab_parallel.resolve(group, vocab_start, vocab_size, lm_head)
    call = Call(hidden, lm_head, target, bias, ignore_index, softcap, logit_scale, compact, shard)
    weighting = Weighting(hidden_cf, logp_cf, token_weight, Contrasting(contrast, clip_min, clip_max))
    needed = Needed(need_dhidden, need_dlm_head, need_dbias)
    return tuple(_compute("fused_perce_loss", backend, call, weighting, needed))  # type: ignore[return-value]


@fused_perce_loss.register_fake
def _(hidden, lm_head, target, hidden_cf, logp_cf, token_weight, bias, clip_min, clip_max, contrast, ignore_index,
      softcap, logit_scale, compact, need_dhidden, need_dlm_head, need_dbias, backend="auto", group=None,
      vocab_start=None, vocab_size=None):  # fmt: skip
    (n, d), v = hidden.shape, lm_head.shape[0]
    dtype = chunked.statistics_dtype(hidden.dtype)
    shapes = [(), (n,), (n,), (n,), (n, d) if need_dhidden else (0,), (v, d) if need_dlm_head else (0,),
              (v,) if need_dbias else (0,)]  # fmt: skip
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


def _setup_context(ctx, inputs, output) -> None:
    hidden, lm_head, bias = inputs[0], inputs[1], inputs[6]
    *_, dhidden, dlm_head, dbias = output
    ctx.dtypes = hidden.dtype, lm_head.dtype, None if bias is None else bias.dtype
    ctx.needed = inputs[14:17]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dhidden, dlm_head, dbias)


def _backward(ctx, dloss, *_statistics):
    """Statistics and stored gradients are constants by definition: only loss_sum is differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(HIGHER_ORDER)
    # In one pass, without a second fp32 tensor of the head's size: 8 GB of memory traffic less for V·D of a billion.
    scaled = [
        torch.mul(gradient, dloss, out=torch.empty_like(gradient, dtype=dtype))
        if needed and dloss is not None
        else None
        for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needed, strict=True)
    ]
    dhidden, dlm_head, dbias = scaled
    return dhidden, dlm_head, None, None, None, None, dbias, *[None] * 14


fused_perce_loss.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("perce::token_logprobs", mutates_args=())
def token_logprobs(
    hidden: Tensor,  # (N, D)
    lm_head: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    compact: bool,
    return_entropy: bool,
    backend: str = "auto",
    group: str | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """((N,) log-probabilities, (N,) entropies or (0,)); see chunked.token_logprobs."""
    shard = vocab_parallel.resolve(group, vocab_start, vocab_size, lm_head)
    call = Call(hidden, lm_head, target, bias, ignore_index, softcap, logit_scale, compact, shard)
    return _compute("token_logprobs", backend, call, return_entropy)


@token_logprobs.register_fake
def _(hidden, lm_head, target, bias, ignore_index, softcap, logit_scale, compact, return_entropy, backend="auto",
      group=None, vocab_start=None, vocab_size=None):  # fmt: skip
    dtype = chunked.statistics_dtype(hidden.dtype)
    n = hidden.shape[0]
    return hidden.new_empty(n, dtype=dtype), hidden.new_empty(n if return_entropy else 0, dtype=dtype)


def _setup_logprobs(ctx, inputs, output) -> None:
    hidden, lm_head, target, bias = inputs[:4]
    ctx.options, ctx.placement = inputs[4:8], inputs[9:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, lm_head, target, bias)


def _backward_logprobs(ctx, dlogp, _dentropy):
    """Recompute: d(Σ g·logp) is the fused loss's own gradient with the token weights −g."""
    if torch.is_grad_enabled():
        raise RuntimeError(HIGHER_ORDER)
    hidden, lm_head, target, bias = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] and dlogp is not None for i in (0, 1, 3)]
    grads = [None] * 3
    if any(needed):
        *_, dhidden, dlm_head, dbias = fused_perce_loss(
            hidden, lm_head, target, None, None, -dlogp, bias, 0.0, 0.0, "log", *ctx.options, *needed, *ctx.placement,
        )  # fmt: skip
        inputs = (hidden, lm_head, bias)
        grads = [
            gradient.to(x.dtype) if need else None
            for gradient, x, need in zip((dhidden, dlm_head, dbias), inputs, needed, strict=True)
        ]
    return grads[0], grads[1], None, grads[2], *[None] * 9


token_logprobs.register_autograd(_backward_logprobs, setup_context=_setup_logprobs)
