"""The datasets that a trainer is given: raw rows become token pairs, and what does not fit the model is refused."""

from collections.abc import Mapping
from typing import Any

import pyarrow.compute
import torch
from datasets import Dataset, IterableDataset
from transformers.trainer_utils import has_length

from perce.config.schema import LossConfig, MemoryConfig
from perce.data.dataset import columns_of, listed, persona_lengths, pieces_of, rows_dataset_pairs, sequence_lengths
from perce.data.documents import DocumentBuilder
from perce.data.marked import ALL_WITHOUT
from perce.data.stream import PairStream
from perce.errors import UserError
from perce.hub import stated
from perce.model.positions import (
    choose_factors,
    has_long,
    is_dynamic,
    needs_long_factors,
    position_limit,
    switch_length,
)
from perce.model.probe import check_ids
from perce.training.arguments import PerceArguments

# A T × T mask or T × T scores of up to this size are only slow; larger ones are what memory does not suffice for.
SQUARE_BYTES = 2**32


def checked_pairs(dataset: Any, name: str, tokenizer: Any, args: PerceArguments, config: Any, vocabulary: int) -> Any:
    """The dataset as token pairs: raw rows are converted, pairs stay as they are. UserError for pairs that do not fit a
    model of this config and vocabulary."""
    if dataset is None:
        return None
    if isinstance(dataset, Mapping) and dataset:
        given = tokenizer, args, config, vocabulary
        return {key: checked_pairs(part, f"{name}[{key!r}]", *given) for key, part in dataset.items()}
    dataset = dataset if name == "train_dataset" else read_whole(dataset, name)
    check_dataset(dataset, name)
    if "response_length" not in columns_of(dataset):
        dataset = rows_dataset_pairs(dataset, name, tokenizer, args.data, args.loss)
    elif isinstance(dataset, list):
        dataset = listed(dataset)
    check_vocabulary(dataset, name, vocabulary)
    check_context(dataset, name, config, args.memory, args.data.max_length)
    if name == "train_dataset":
        check_personas(dataset, args.loss)
    return dataset


def read_whole(dataset: Any, name: str) -> Any:
    """A list of the examples if it is a stream: processes that take turns would evaluate some of a stream twice.
    UserError for one without an end."""
    if isinstance(dataset, PairStream):
        raise UserError(f"{name}: a PairStream never ends. Give a Dataset, or a list of rows or of token pairs.")
    return [*dataset] if isinstance(dataset, IterableDataset | torch.utils.data.IterableDataset) else dataset


def check_dataset(dataset: Any, name: str) -> None:
    """UserError if `dataset` is not a dataset, or is empty."""
    if isinstance(dataset, str) or not (isinstance(dataset, IterableDataset) or hasattr(dataset, "__getitem__")):
        raise UserError(
            f"{name}: expected a Dataset or a list of rows or of token pairs, got {type(dataset).__name__}."
        )
    if has_length(dataset) and not len(dataset):
        raise UserError(f"{name}: expected at least one example, got an empty {type(dataset).__name__}.")


def check_personas(dataset: Any, loss: LossConfig) -> None:
    """UserError for training pairs that all lack a persona or a personal token, if the weights come from it."""
    columns = dataset.column_names if isinstance(dataset, Dataset) else ()
    if loss.entry.counterfactual and "persona_span" in columns and not persona_lengths(dataset).any():
        raise UserError(ALL_WITHOUT)
    if "personal" not in loss.weighting.needs or "personal" not in columns:
        return
    if not any(pyarrow.compute.any(pyarrow.compute.list_flatten(x)).as_py() for x in pieces_of(dataset, "personal")):
        raise UserError(
            f"train_dataset: no reply quotes its persona, so objective {loss.objective} weighs all tokens the same. "
            "Give rows whose replies do, or mark their personal_spans; or train with objective ce."
        )


def check_vocabulary(dataset: Any, name: str, vocabulary: int) -> None:
    """UserError for a dataset with a token id that the model lacks."""
    if isinstance(dataset, Dataset):
        columns = map(pyarrow.compute.list_flatten, pieces_of(dataset, "input_ids"))
        check_ids(max(pyarrow.compute.max(ids).as_py() for ids in columns), vocabulary, name)


def check_context(dataset: Any, name: str, config: Any, memory: MemoryConfig, max_length: int) -> None:
    """UserError for sequences that are too long for the model's positions, or for attention that builds T × T."""
    documents = "windows" in columns_of(dataset)
    if isinstance(dataset, PairStream):
        documents = isinstance(dataset.source.builder, DocumentBuilder)
    if _some_are_documents(dataset):
        raise UserError(f"{name}: has documents as well as examples with a persona. Expected one of them.")
    if (memory.on_trunks or memory.share_persona) and documents:
        option = memory.by_itself if memory.on_trunks else "share_persona"
        raise UserError(f"{name}: {option} needs rows with a persona, and these are documents. Leave it out.")
    longest = longest_sequence(dataset, max_length)
    limit = position_limit(config)
    if limit is not None and longest > limit:
        beyond = " and its encoding of longer sequences (rope_type dynamic) depends on the longest of a batch"
        raise UserError(
            f"{name}: sequences have up to {longest} tokens, and the model has {limit} positions "
            f"(max_position_embeddings){beyond if is_dynamic(config) else ''}. Use --max_length {limit} or less, which "
            "drops persona entries, or a model with a longer context."
        )
    if memory.persona_grad == "full":
        _check_square(longest, name, config)


def settle_factors(model: Any, datasets: Any, max_length: int) -> bool:
    """Make every forward pass use longrope's long factors if a sequence of these datasets needs them, else the short
    ones. Returns whether the datasets have a known longest sequence, which decides it."""
    if longest := longest_sequence(datasets, max_length):
        choose_factors(model, long=needs_long_factors(model.config, longest))
    return bool(longest)


def check_factors(model: Any, dataset: Any, max_length: int) -> None:
    """UserError for sequences beyond the switch of longrope if forward passes use the short factors."""
    if needs_long_factors(model.config, longest := longest_sequence(dataset, max_length)) and not has_long(model):
        raise UserError(
            f"eval_dataset: sequences have up to {longest} tokens, and beyond {switch_length(model.config)} the "
            f"position encoding of {model.config.model_type} (rope_type longrope) has other factors than those that "
            "the trainer's own datasets have settled. Give the trainer this dataset when it is made, or use shorter "
            "sequences."
        )


def longest_sequence(dataset: Any, max_length: int) -> int:
    """Tokens of the longest sequence; for a stream, as many as one may have; 0 if that is not known."""
    if isinstance(dataset, Mapping):
        return max((longest_sequence(part, max_length) for part in dataset.values()), default=0)
    if isinstance(dataset, Dataset):
        return max(sequence_lengths(dataset), default=0)
    return max_length if isinstance(dataset, IterableDataset | PairStream) else 0


def _some_are_documents(dataset: Any) -> bool:
    """Whether some pairs are of documents and others are not. Of a stream it is not known."""
    if not isinstance(dataset, Dataset) or "persona_span" not in dataset.column_names:
        return False
    return any(column.null_count for column in pieces_of(dataset, "persona_span"))


def _check_square(longest: int, name: str, config: Any) -> None:
    """UserError if attention would build a mask or scores of more than SQUARE_BYTES."""
    text = config.get_text_config()
    kind = text._attn_implementation
    heads, window = stated(text, "num_attention_heads") or 0, stated(text, "sliding_window") or 0
    windowed = window and "sliding_attention" in (stated(text, "layer_types") or ["sliding_attention"])
    if kind == "eager":
        reason, size = "eager attention scores every pair of tokens", 4 * heads
    elif kind == "sdpa" and windowed and longest >= window:
        reason, size = "sdpa needs a mask for sliding windows", 5  # a boolean and its copy as numbers
    else:
        return
    if longest**2 * size > SQUARE_BYTES:
        raise UserError(
            f"{name}: sequences have up to {longest} tokens, with attn_implementation={kind}: {reason}, "
            f"{longest} × {longest} × {size} bytes. Use --attn_implementation flash_attention_2, --persona_grad none, "
            "or a smaller --max_length."
        )
