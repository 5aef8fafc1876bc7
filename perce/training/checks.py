"""What PerceTrainer refuses or warns of on construction: what would fail later, on a GPU, or in silence."""

import warnings
from collections.abc import Mapping
from typing import Any

import pyarrow.compute
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from perce.config.schema import MemoryConfig
from perce.data.dataset import sequence_lengths, token_ids
from perce.data.documents import DocumentBuilder
from perce.data.stream import PairStream
from perce.errors import UserError
from perce.model.memory import position_limit

# A mask or scores of T × T up to here are slow and no more; beyond, they are what memory ends at.
SQUARE_BYTES = 2**32


def warn_of_dropout(model: nn.Module) -> None:
    """Adapters may have dropout; a base model may not (see model/patch.py)."""
    dropout = max((module.p for module in model.modules() if isinstance(module, nn.Dropout)), default=0.0)
    if dropout > 0:
        warnings.warn(
            f"Dropout of {dropout} in the adapter acts in the factual pass and not in the counterfactual one: every "
            "PIR is a little too low. Leave it at 0, or use --estimate epoch or frozen, which have none then.",
            stacklevel=3,
        )


def check_hooks(kwargs: Mapping[str, Any]) -> None:
    """UserError for what the Trainer would call with logits, or instead of the loss: neither happens here."""
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if kwargs.get(name) is not None:
            raise UserError(
                f"{name}: PerceTrainer computes its own loss and never holds logits, so this would not be called. Read "
                "trainer.last_evaluation for per-token log-probabilities, or use python -m perce.evaluate."
            )


def check_vocabulary(dataset: Any, name: str, vocabulary: int) -> None:
    """UserError for a token id without an embedding: on a GPU it would end the process with a device-side assert."""
    largest = -1
    if isinstance(dataset, Dataset):
        for column in token_ids(dataset):
            largest = max(largest, pyarrow.compute.max(pyarrow.compute.list_flatten(column)).as_py())
    elif isinstance(dataset, list):
        largest = max((max(pair["input_ids"]) for pair in dataset), default=-1)
    if largest >= vocabulary:
        raise UserError(
            f"{name}: token id {largest} is outside the model's vocabulary of {vocabulary}. Expected the model's own "
            "tokenizer; after adding tokens, call model.resize_token_embeddings(len(tokenizer))."
        )


def check_sharding(trainer: Trainer, memory: MemoryConfig) -> None:
    """UserError where persona_grad="none" would leave processes waiting for each other for ever."""
    if memory.persona_grad == "none" and (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
        raise UserError(
            "persona_grad=none with sharded weights (FSDP, ZeRO-3): personas of different lengths take different "
            "numbers of forwards, and each forward waits for all processes. Use data parallelism (DDP), or "
            "--persona_grad full."
        )


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
