"""What makes long contexts fit, beside persona_grad (prefill.py): MLPs in tiles, checkpointing, positions."""

import functools
import inspect
import types
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

# TrainingArguments' own names, which changed with transformers 5.23.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
# Largest difference of an MLP on two tokens from the same on four, in parts of its largest output.
MLP_TOLERANCE = 1e-4
MLP_TOLERANCE_LOW_PRECISION = 5e-2


def prepare_memory(model: Any, memory: MemoryConfig) -> None:
    """Apply the options to a model that is otherwise ready for the Trainer."""
    if memory.mlp_tile:
        tile_mlps(model, memory.mlp_tile)
    if memory.persona_grad == "none":
        prepare_prefill(model)


def enable_checkpointing(model: Any) -> None:
    """What the Trainer does under activation_checkpointing, for a model that trains without one."""
    # transformers 5.23 renamed it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


# ---- MLPs in tiles


def tile_mlps(model: Any, tile: int) -> None:
    """Run the MLP of every decoder layer over `tile` tokens at a time, each recomputed in backward.

        mlp(h)  =  concatenation of mlp(h[:, i : i + tile])          h (B, T, D)

    Of the (T, intermediate) activations only one tile's exist at a time. UserError unless every decoder layer has an
    MLP that treats tokens one by one.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        _check_mlp(layer, model)
        _tile(layer.mlp, tile)
    if not layers:
        raise UserError(f"mlp_tile: {type(model).__name__} has no decoder layers that are known here. Use 0.")


def _tile(mlp: nn.Module, tile: int) -> None:
    whole = forward_of(mlp)

    @functools.wraps(whole)
    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.shape[1] <= tile:
            return whole(self, hidden)
        run = functools.partial(whole, self)
        if torch.is_grad_enabled():
            run = functools.partial(checkpoint, run, use_reentrant=False)
        # Contiguous, as a whole sequence is: of several sequences a part is not, and some MLPs take a view of it.
        return torch.cat([run(part.contiguous()) for part in hidden.split(tile, dim=1)], dim=1)

    mlp.forward = types.MethodType(forward, mlp)


@torch.no_grad()
def _check_mlp(layer: Any, model: Any) -> None:
    """UserError unless layer.mlp maps (1, T, D) to (1, T, D) token by token; found out on four tokens, where the model
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
    training = mlp.training
    mlp.eval()
    whole, half = mlp(hidden), mlp(hidden[:, 2:])
    mlp.train(training)
    tolerance = MLP_TOLERANCE if weight.dtype == torch.float32 else MLP_TOLERANCE_LOW_PRECISION
    if (
        not isinstance(whole, Tensor)
        or whole.shape != hidden.shape
        or not (whole[:, 2:] - half).abs().max() <= tolerance * whole.abs().max()
    ):
        raise UserError(f"{name}: its mlp does not treat tokens one by one, and tiles would change it. Use 0.")


# ---- host memory and kernels of a GPU


# ---- contexts that cannot work


def position_limit(config: Any) -> int | None:
    """Tokens that the model has positions for; None: not said. Rotary encodings may be stretched by a factor."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):
        if limit and isinstance(part, dict) and part.get("factor") and part.get("original_max_position_embeddings"):
            limit = max(limit, int(part["factor"] * part["original_max_position_embeddings"]))
    return limit
