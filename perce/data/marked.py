"""Rows whose labels mark the persona, for trainers of other libraries, which cut, pack and cache them like any rows.

    input_ids   prompt and replies, with the persona
    labels      the ids to learn; IGNORED (-100) at others; PERSONA (-101) at tokens that the counterfactual pass lacks;
                NO_PERSONA (-102) at the first token of a sequence without a persona

PersonaCollator makes a batch of such rows: it calls the trainer's own collator twice.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from perce.config.schema import DataConfig
from perce.data.batch import Batch
from perce.data.dataset import rows_dataset_pairs
from perce.errors import UserError, in_one_line

IGNORED, PERSONA, NO_PERSONA = -100, -101, -102
ALL_WITHOUT = (
    "train_dataset: no example has a persona, so the PIR of every token is 0. Give rows with a persona, of which some "
    "may have none; or train with objective ce."
)


def labelled(rows: Any, tokenizer: Any, data: DataConfig | None = None) -> Dataset:
    """Rows in any format of docs/DATA.md (a Dataset or a list) → `input_ids` and `labels`, one reply per row.

    UserError for a row that cannot be used, and for a `weight` other than 0 or 1, which labels cannot express.
    """
    pairs = rows_dataset_pairs(rows, "rows", tokenizer, data or DataConfig())
    if any(weight != 1 for weight in pairs["data_weight"]):
        raise UserError("rows: expected weights of 0 or 1: labels cannot express others. PerceTrainer takes them.")
    return pairs.map(row_of, remove_columns=pairs.column_names)


def row_of(pair: Mapping[str, Any]) -> dict[str, list[int]]:
    """The row of a pair, given as the columns of a data.pairs.Pair."""
    ids, (start, end), n = pair["input_ids"], pair["persona_span"], pair["response_length"]
    labels = [IGNORED] * (len(ids) - n) + list(ids[-n:])
    labels[start:end] = [PERSONA] * (end - start)
    labels[:1] = labels[:1] if end > start else [NO_PERSONA]
    return {"input_ids": ids, "labels": labels}


def check_marked(dataset: Any) -> None:
    """UserError for a training set of rows that all say that they have no persona, so that nothing is contrasted."""
    labels = dataset["labels"] if isinstance(dataset, Dataset) and "labels" in dataset.column_names else ()
    if not any(PERSONA in row for row in labels) and any(NO_PERSONA in row for row in labels):
        raise UserError(ALL_WITHOUT)


def persona_span(ids: Sequence[int], ids_cf: Sequence[int]) -> tuple[int, int] | None:
    """The half-open range of `ids` whose removal gives `ids_cf`; None if there is no such range."""
    added = len(ids) - len(ids_cf)
    start = next((i for i, (a, b) in enumerate(zip(ids, ids_cf, strict=False)) if a != b), len(ids_cf))
    return (start, start + added) if added > 0 and ids[start + added :] == ids_cf[start:] else None


class PersonaCollator:
    """Rows → the batch of both passes; UserError for rows without PERSONA labels, and for padding on the left.

    Args:
        collator: collates `input_ids` and `labels`; it pads on the right, or concatenates sequences and adds their
            position_ids (padding-free). A row of several sequences has `seq_lengths`.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Batch]):
        from transformers import DataCollatorForLanguageModeling

        if isinstance(collator, DataCollatorForLanguageModeling):
            raise UserError(
                f"data_collator: {type(collator).__name__} replaces the labels of the rows with their ids, and would "
                "train on prompts and personas. Use DataCollatorForSeq2Seq(tokenizer)."
            )
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """The collator's batch, and what model/passes.py needs: rows, target, uses, input_ids_cf, rows_cf, …; and
        of_row, (N,): the number of each target's row in the batch."""
        with_persona, without = zip(*map(_both, rows), strict=True)
        try:
            batch, batch_cf = dict(self.collator([*with_persona])), self.collator([*without])
            (places, target), (places_cf, target_cf) = _predicted(batch), _predicted(batch_cf)
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                "data_collator: expected one that pads input_ids and labels, such as DataCollatorForSeq2Seq; "
                f"{type(self.collator).__name__} fails: {in_one_line(error)}"
            ) from error
        learnt = [[label for label in row["labels"] if label != IGNORED] for row in without]
        own = torch.tensor([*chain.from_iterable(learnt)], dtype=target.dtype)
        if not (torch.equal(target, own) and torch.equal(target_cf, own)):
            raise UserError(
                "data_collator: expected the labels of the rows, in their order and the same in both passes, got "
                f"{len(target)} tokens to learn with the persona and {len(target_cf)} without, of {len(own)}. "
                f"{type(self.collator).__name__} replaces labels, reorders rows or cuts sequences, and cannot be used."
            )
        of_row = torch.arange(len(rows)).repeat_interleave(torch.tensor([*map(len, learnt)]))
        uses = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])
        batch |= {"rows": places, "rows_cf": places_cf, "target": target, "uses": uses, "of_row": of_row}
        return batch | {f"{name}_cf": value for name, value in batch_cf.items()}


def collate_pairs(pairs: Sequence[Mapping[str, Any]], collator: PersonaCollator) -> Batch:
    """Pairs, as columns of data.pairs.Pair → a batch of both passes."""
    return collator([row_of(pair) for pair in pairs])


def _both(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row's inputs to the collator, with the persona and without."""
    ids, labels = (np.array(row.get(name, [])) for name in ("input_ids", "labels"))
    lengths = list(row.get("seq_lengths") or [len(ids)])
    if not len(labels) or len(labels) != len(ids):
        raise UserError(
            f"labels: expected {PERSONA} at the persona's tokens, in rows of input_ids and labels of equal length, got "
            f"a row of {[*row]}."
        )
    kept, starts = labels != PERSONA, np.cumsum([0, *lengths])[:-1]
    left = np.add.reduceat(kept, starts).tolist()
    has_none = (labels[starts] == NO_PERSONA).tolist()
    if any(some == 0 or (some == all_) != none for some, all_, none in zip(left, lengths, has_none, strict=True)):
        raise UserError(
            f"labels: expected {PERSONA} at the persona's tokens and other labels elsewhere, in every sequence, or "
            f"{NO_PERSONA} at the first token of one without a persona; got {left} other labels in sequences of "
            f"{lengths} tokens. perce.labelled makes such labels; rows for TRL need a field persona."
        )
    # Without the persona a sequence may begin with another token, and a sequence's first token is not predicted.
    labels[[start + kept[start:].argmax() for start in starts]] = IGNORED
    with_persona = {"input_ids": ids, "labels": np.where(kept, labels, IGNORED)}
    without = {"input_ids": ids[kept], "labels": labels[kept]}
    several = ({"seq_lengths": lengths}, {"seq_lengths": left}) if "seq_lengths" in row else ({}, {})
    first, second = (
        {name: column.tolist() for name, column in columns.items()} | more
        for columns, more in zip((with_persona, without), several, strict=True)
    )
    return first, second


def _predicted(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(N,) rows of the flattened hidden states that predict a token with a loss, and (N,) these tokens."""
    if "attention_mask" in batch and not batch["attention_mask"][:, 0].all():
        raise UserError("padding_side: expected padding on the right, got it on the left. Set tokenizer.padding_side.")
    sequence, place = (batch["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
    return sequence * batch["labels"].shape[1] + place, batch["labels"][sequence, place + 1]
