"""Ways to make long contexts fit, besides persona_grad (prefill.py): MLPs in tiles, activation checkpointing."""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from perce.config.schema import MemoryConfig
from perce.errors import UserError
from perce.model.patch import forward_of
from perce.model.prefill import prepare_prefill
from perce.model.probe import decoder_of, evaluating, unwrapped, with_attributes

# The field of TrainingArguments, which transformers 5.23 renamed.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
# Largest allowed difference between an MLP's outputs for two tokens alone and among four, relative to its largest.
MLP_TOLERANCE = 1e-4
MLP_TOLERANCE_LOW_PRECISION = 5e-2


def prepare_memory(model: Any, memory: MemoryConfig) -> None:
    """Apply the options to a model that is otherwise ready for the Trainer."""
    if memory.mlp_tile:
        tile_mlps(model, memory.mlp_tile)
    if memory.on_trunks:
        prepare_prefill(model)


def enable_checkpointing(model: Any, options: Mapping[str, Any] | None = None) -> None:
    """Turn activation checkpointing on as the Trainer would, with these arguments, for a model that is trained without
    a Trainer."""
    # transformers 5.23 renamed the method, and takes two of the arguments separately
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    of_checkpoint = {"use_reentrant": False} | dict(options or {})
    apart = {name: of_checkpoint.pop(name) for name in ("every_n_layers", "offload") if name in of_checkpoint}
    enable(of_checkpoint, **apart)


@contextlib.contextmanager
def checkpointed(model: Any, options: Mapping[str, Any] | None) -> Iterator[None]:
    """Activation checkpointing with these arguments inside the context; none if `options` is None."""
    if options is None:
        yield
        return
    hooks = model.get_input_embeddings()._forward_hooks
    before = set(hooks)
    enable_checkpointing(model, options)
    try:
        yield
    finally:
        (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
        for added in set(hooks) - before:  # transformers adds them so that inputs require gradients
            del hooks[added]


# ---- MLPs in tiles


def tile_mlps(model: Any, tile: int) -> None:
    """Run the MLP of every decoder layer over `tile` tokens at a time, each recomputed in backward.

        mlp(h)  =  concatenation of mlp(h[:, i : i + tile])          h (B, T, D)

    Only one tile of the (T, intermediate) activations exists at a time. UserError unless every decoder layer has an
    MLP that treats tokens one by one.
    """
    decoder = decoder_of(unwrapped(model))
    layers: list[Any] = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        _check_mlp(layer, model)
        _tile(layer.mlp, tile)
    if not layers:
        raise UserError(f"mlp_tile: {type(model).__name__} has no decoder layers that perce knows. Use --mlp_tile 0.")


def _tile(mlp: Any, tile: int) -> None:
    whole = forward_of(mlp)

    @functools.wraps(whole)
    def forward(self, hidden: Tensor) -> Tensor:
        if not self.perce_tile or hidden.shape[1] <= self.perce_tile:
            return whole(self, hidden)
        run = functools.partial(whole, self)
        if torch.is_grad_enabled():
            run = functools.partial(checkpoint, run, use_reentrant=False)
        return run_tiles(run, hidden, self.perce_tile)

    mlp.perce_tile = tile
    mlp.forward = types.MethodType(forward, mlp)


def run_tiles(run: Callable[[Tensor], Tensor], hidden: Tensor, tile: int) -> Tensor:
    """run(hidden), (B, T, D), computed for `tile` tokens at a time."""
    # Contiguous because some MLPs take a view of their input, and a part of several sequences is not contiguous.
    return torch.cat([run(part.contiguous()) for part in hidden.split(tile, dim=1)], dim=1)


def tiles_of(model: nn.Module, tile: int) -> contextlib.AbstractContextManager[None]:
    """Inside the context, MLPs that are tiled have tiles of this many tokens (0: no tiles)."""
    return with_attributes((module, "perce_tile", tile) for module in model.modules() if hasattr(module, "perce_tile"))


@torch.no_grad()
def _check_mlp(layer: Any, model: Any) -> None:
    """UserError unless layer.mlp maps (1, T, D) to (1, T, D) token by token. It is tried on four tokens if the model
    has weights."""
    name = f"mlp_tile: {type(layer).__name__} of {model.config.model_type}"
    mlp = getattr(layer, "mlp", None)
    if mlp is None or len(inspect.signature(mlp.forward).parameters) != 1:
        raise UserError(
            f"{name} has {'no module named mlp' if mlp is None else 'an mlp that takes more than hidden states'}, so "
            "it is not known whether its tokens are independent of each other. Use --mlp_tile 0."
        )
    weight = model.get_input_embeddings().weight
    if weight.is_meta:
        return
    hidden = torch.linspace(-1, 1, 4 * model.config.get_text_config().hidden_size).view(1, 4, -1)
    hidden = hidden.to(weight.device, weight.dtype)
    with evaluating(mlp):
        whole, half = mlp(hidden), mlp(hidden[:, 2:])
    tolerance = MLP_TOLERANCE if weight.dtype == torch.float32 else MLP_TOLERANCE_LOW_PRECISION
    if not isinstance(whole, Tensor):
        raise UserError(f"{name}: its mlp returns more than hidden states, which tiles cannot join. Use --mlp_tile 0.")
    if whole.shape != hidden.shape or not (whole[:, 2:] - half).abs().max() <= tolerance * whole.abs().max():
        raise UserError(
            f"{name}: its mlp does not treat tokens one by one, so tiles would change its output. Use --mlp_tile 0."
        )
