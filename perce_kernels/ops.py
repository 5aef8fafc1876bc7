"""torch.ops.perce.*: schema, shapes for tracing (fake), autograd. The backends compute the values and raise the errors.

`fused_perce_loss` returns fp32 gradients of the weighted *sum*. Autograd only scales them by the upstream gradient, out
of place and before the cast to the input's dtype, so that a second backward pass, or a loss scale in fp16, is exact.

A schema takes a process group by its name: `group`, with this rank's `vocab_start` and the whole `vocab_size`.

torch.library has no rules for forward-mode AD and torch.func.grad: the ops would silently drop tangents. So checks.py
refuses inputs that have tangents, and the backward pass refuses such upstream gradients. Under torch.vmap an op is
called once per element.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from perce_kernels import backends, vocab_parallel
from perce_kernels.contract import Call, Contrasting, Needed, Weighting, no_autocast, statistics_dtype

WAY_AROUND = (
    'Backend "torch" computes the same without the Triton kernels: --backend torch on a command line, '
    "PERCE_BACKEND=torch in the environment."
)

ASSERTED = (
    "An earlier call failed on the device, often by a target outside [0, V). "
    "Run again with CUDA_LAUNCH_BLOCKING=1 in the environment to see which."
)
NOT_OF_KERNELS = (ValueError, torch.OutOfMemoryError, *([dist.DistError] if dist.is_available() else []))
"""Mistakes of the caller, and errors with advice from torch."""


def _compute(function: str, backend: str, device: torch.device, *arguments: Any) -> Any:
    """The result of the backend's function. An error of the Triton backend ends with advice."""
    module = None
    with no_autocast(device):
        try:
            module = backends.implementation(backend, device)
            return getattr(module, function)(*arguments)
        except NOT_OF_KERNELS:
            raise
        except Exception as error:  # kernels that fail to compile, load or launch raise many types
            if module is not None and module.__name__ == backends.BACKENDS["torch"].module:
                raise
            advice = ASSERTED if "device-side assert" in str(error) else WAY_AROUND
            raise RuntimeError(f'backend "triton": {type(error).__name__}: {error}\n{advice}') from error


UNGRAPHED = (torch.Tag.cudagraph_unsafe,)
"""Inductor's CUDA graphs leave the ops out: with compact=True their bodies wait for the number of rows."""
TRAINABLE = ("hidden", "lm_head", "bias")


def unsupported(asked: str, otherwise: str = "") -> RuntimeError:
    """The error for a use that the ops have no rule for."""
    return RuntimeError(
        f"perce_kernels: {asked} not supported by the fused op; use backend='reference' (which takes no group), "
        f"plain autograd{otherwise}"
    )


def _check_upstream(upstream: Tensor | None) -> None:
    """RuntimeError if a backward pass is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise unsupported("higher-order gradients (create_graph=True) are")
    if upstream is None or forward_ad._current_level < 0:
        return
    # A traced tensor does not show a tangent; after a graph break this runs again untraced.
    if torch.compiler.is_compiling() or forward_ad.unpack_dual(upstream).tangent is not None:
        raise unsupported("forward-mode AD of a gradient (a tangent of the upstream gradient) is")


def _argument_names(op: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in op.default._schema.arguments)


@torch.library.custom_op("perce::fused_perce_loss", mutates_args=(), tags=UNGRAPHED)
def loss_op(
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
    """(loss_sum, logp, logp_cf, token_weight, dhidden, dlm_head, dbias); see contract.PerCEOutput."""
    shard = vocab_parallel.resolve(group, vocab_start, vocab_size, lm_head)
    call = Call(hidden, lm_head, target, bias, ignore_index, softcap, logit_scale, compact, shard)
    weighting = Weighting(hidden_cf, logp_cf, token_weight, Contrasting(contrast, clip_min, clip_max))
    needed = Needed(need_dhidden, need_dlm_head, need_dbias)
    return tuple(_compute("sweep", backend, hidden.device, call, weighting, needed))  # type: ignore[return-value]


@loss_op.register_fake
def _(hidden, lm_head, target, hidden_cf, logp_cf, token_weight, bias, clip_min, clip_max, contrast, ignore_index,
      softcap, logit_scale, compact, need_dhidden, need_dlm_head, need_dbias, backend="auto", group=None,
      vocab_start=None, vocab_size=None):  # fmt: skip
    (n, d), v = hidden.shape, lm_head.shape[0]
    dtype = statistics_dtype(hidden.dtype)
    shapes = [(), (n,), (n,), (n,), (n, d) if need_dhidden else (0,), (v, d) if need_dlm_head else (0,),
              (v,) if need_dbias else (0,)]  # fmt: skip
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


LOSS_ARGUMENTS = _argument_names(torch.ops.perce.fused_perce_loss)


def _setup_context(ctx, inputs, output) -> None:
    given = dict(zip(LOSS_ARGUMENTS, inputs, strict=True))
    *_, dhidden, dlm_head, dbias = output
    ctx.dtypes = [None if given[name] is None else given[name].dtype for name in TRAINABLE]
    ctx.needed = [given[f"need_d{name}"] for name in TRAINABLE]
    ctx.backend = given["backend"]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dhidden, dlm_head, dbias)


@torch.library.custom_op("perce::scaled", mutates_args=())
def scaled_op(gradient: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """gradient · factor (), in the given dtype."""
    return _compute("scaled", backend, gradient.device, gradient, factor, dtype)


@scaled_op.register_fake
def _(gradient, factor, dtype, backend):
    return torch.empty_like(gradient, dtype=dtype)


def _backward(ctx, dloss, *_statistics):
    """The gradients of loss_sum. The other outputs, statistics and stored gradients, are constants by definition."""
    _check_upstream(dloss)
    scaled = [
        scaled_op(gradient, dloss, dtype, ctx.backend) if needed and dloss is not None else None
        for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needed, strict=True)
    ]
    gradients = dict(zip(TRAINABLE, scaled, strict=True))
    return tuple(gradients.get(name) for name in LOSS_ARGUMENTS)


loss_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("perce::token_logprobs", mutates_args=(), tags=UNGRAPHED)
def logprobs_op(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """((N,) log-probabilities, (N,) entropies or (0,), (N,) bool); see contract.py."""
    shard = vocab_parallel.resolve(group, vocab_start, vocab_size, lm_head)
    call = Call(hidden, lm_head, target, bias, ignore_index, softcap, logit_scale, compact, shard)
    return _compute("logprobs", backend, hidden.device, call, return_entropy)


@logprobs_op.register_fake
def _(hidden, lm_head, target, bias, ignore_index, softcap, logit_scale, compact, return_entropy, backend="auto",
      group=None, vocab_start=None, vocab_size=None):  # fmt: skip
    dtype = statistics_dtype(hidden.dtype)
    n = hidden.shape[0]
    entropy = hidden.new_empty(n if return_entropy else 0, dtype=dtype)
    return hidden.new_empty(n, dtype=dtype), entropy, hidden.new_empty(n, dtype=torch.bool)


LOGPROBS_ARGUMENTS = _argument_names(torch.ops.perce.token_logprobs)


def _setup_logprobs(ctx, inputs, output) -> None:
    given = dict(zip(LOGPROBS_ARGUMENTS, inputs, strict=True))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(given.pop(name) for name in (*TRAINABLE, "target")))
    del given["return_entropy"]
    ctx.options = given


def _backward_logprobs(ctx, dlogp, *_statistics):
    """Recompute: d(Σ g·logp) is the gradient of the fused loss with token weights −g."""
    _check_upstream(dlogp)
    *inputs, target = ctx.saved_tensors
    trainable = dict(zip(TRAINABLE, inputs, strict=True))
    # torch leaves out trailing arguments that have their default value
    wanted = dict(zip(LOGPROBS_ARGUMENTS, ctx.needs_input_grad, strict=False))
    needed = {name: dlogp is not None and wanted[name] for name in TRAINABLE}
    gradients: dict[str, Tensor] = {}
    if any(needed.values()):
        *_, dhidden, dlm_head, dbias = loss_op(
            **trainable, target=target, hidden_cf=None, logp_cf=None, token_weight=-dlogp, clip_min=0.0, clip_max=0.0,
            contrast="log", **{f"need_d{name}": need for name, need in needed.items()}, **ctx.options,
        )  # fmt: skip
        gradients = {
            name: gradient.to(trainable[name].dtype)
            for name, gradient in zip(TRAINABLE, (dhidden, dlm_head, dbias), strict=True)
            if needed[name]
        }
    return tuple(gradients.get(name) for name in LOGPROBS_ARGUMENTS)


logprobs_op.register_autograd(_backward_logprobs, setup_context=_setup_logprobs)
