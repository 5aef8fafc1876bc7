"""What makes long contexts fit, beside persona_grad (perce/prefill.py): MLPs in tiles, activations in host memory, and
the checks that find a context which cannot work before training does.
"""

import functools
import inspect
import types
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer

from perce.config import MemoryConfig
from perce.documents import DocumentBuilder
from perce.errors import UserError
from perce.loader import sequence_lengths
from perce.model import forward_of
from perce.prefill import prepare_prefill
from perce.stream import PairStream

# TrainingArguments' own names, which changed with transformers 5.23.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
# A mask or scores of T × T up to here are slow and no more; beyond, they are what memory ends at.
SQUARE_BYTES = 2**32
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


def check_sharding(trainer: Trainer, memory: MemoryConfig) -> None:
    """UserError where persona_grad="none" would leave processes waiting for each other for ever."""
    if memory.persona_grad == "none" and (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
        raise UserError(
            "persona_grad=none with sharded weights (FSDP, ZeRO-3): personas of different lengths take different "
            "numbers of forwards, and each forward waits for all processes. Use data parallelism (DDP), or "
            "--persona_grad full."
        )


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
        return torch.cat([run(part) for part in hidden.split(tile, dim=1)], dim=1)

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


def settle_device(args: Any, memory: MemoryConfig) -> None:
    """Options that need a GPU: refused on a CPU, and handed to transformers elsewhere."""
    if args.device.type == "cpu" and args.use_liger_kernel:
        raise UserError("use_liger_kernel: Liger's kernels are written in Triton and need a GPU. Leave it out here.")
    if not memory.activation_offload:
        return
    if args.device.type == "cpu":
        raise UserError(
            "activation_offload: training is on a CPU, whose activations are in host memory already. Leave it out."
        )
    if not getattr(args, CHECKPOINTING):
        raise UserError(
            "activation_offload: holds the inputs of checkpointed layers in host memory, and nothing is checkpointed. "
            "Add --activation_checkpointing."
        )
    given = getattr(args, f"{CHECKPOINTING}_kwargs") or {"use_reentrant": False}
    setattr(args, f"{CHECKPOINTING}_kwargs", {**given, "offload": True})


# ---- contexts that cannot work


def check_context(dataset: Any, name: str, config: Any, memory: MemoryConfig, max_length: int) -> None:
    """UserError for sequences longer than the model has positions, or than its attention can take without T × T."""
    documents = "windows" in (getattr(dataset, "column_names", None) or ())
    if isinstance(dataset, PairStream):
        documents = isinstance(dataset.source.builder, DocumentBuilder)
    if memory.persona_grad == "none" and documents:
        raise UserError(f"{name}: persona_grad=none needs rows with a persona, and these are documents. Use full.")
    longest = _longest(dataset, max_length)
    limit = position_limit(config)
    if limit is not None and longest > limit:
        raise UserError(
            f"{name}: sequences of up to {longest} tokens, and the model has {limit} positions "
            f"(max_position_embeddings). Use --max_length {limit} or less, which drops persona entries, or a model "
            "with a longer context."
        )
    if memory.persona_grad == "full":
        _check_square(longest, name, config)


def position_limit(config: Any) -> int | None:
    """Tokens that the model has positions for; None: not said. Rotary encodings may be stretched by a factor."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):
        if limit and isinstance(part, dict) and part.get("factor") and part.get("original_max_position_embeddings"):
            limit = max(limit, int(part["factor"] * part["original_max_position_embeddings"]))
    return limit


def _longest(dataset: Any, max_length: int) -> int:
    """Tokens of the longest sequence, of a stream as many as it may have; 0 where that is not known."""
    if isinstance(dataset, Dataset | list):
        return max(sequence_lengths(dataset), default=0)
    return max_length if isinstance(dataset, IterableDataset | PairStream) else 0


def _check_square(longest: int, name: str, config: Any) -> None:
    """UserError where attention would build a mask or scores of more than SQUARE_BYTES."""
    text = config.get_text_config()
    kind = text._attn_implementation
    window = getattr(text, "sliding_window", None) or 0
    windowed = window and "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"])
    if kind == "eager":
        reason, size = "eager attention scores every pair of tokens", 4 * text.num_attention_heads
    elif kind == "sdpa" and windowed and longest >= window:
        reason, size = "sdpa needs a mask for sliding windows", 5  # a boolean and its copy as numbers
    else:
        return
    if longest**2 * size > SQUARE_BYTES:
        raise UserError(
            f"{name}: sequences of up to {longest} tokens with attn_implementation={kind}: {reason}, "
            f"{longest} × {longest} × {size} bytes. Use --attn_implementation flash_attention_2, --persona_grad none, "
            "or a smaller --max_length."
        )
