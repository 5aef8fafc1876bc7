"""Which examples are trained on, evaluated on and asked about."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from perce.config.options import read_yaml
from perce.config.schema import CONFIG_NAME, DataConfig, LossConfig, RunConfig, SplitConfig
from perce.data.dataset import pair_dataset, sequence_lengths
from perce.data.pairing import PairSource, make_builder, picked_by, skipped_rows
from perce.data.rows import Examples, Record, available_splits, load_examples
from perce.data.stream import PairStream
from perce.demo import DATA_DIR
from perce.errors import UserError

HELD_OUT = 0.1  # share of users, where the data has no validation split


@dataclass(frozen=True)
class RunPairs:
    """Token pairs of a run."""

    train: Dataset | PairStream
    validation: Dataset
    examples: list[Record]
    """Those that validation's column `example` points into."""
    format: str
    notes: list[str]
    """What was held out, trimmed and skipped, in words."""
    source: PairSource | None
    """Of a stream: counts what is left out while it is read."""


def load_pairs(
    config: DataConfig, tokenizer: Any, *, loss: LossConfig, eval_examples: int, eval_tokens: int | None, seed: int
) -> RunPairs:  # fmt: skip
    """Read, check and pair config.data; at most eval_examples (0: all) and eval_tokens are kept to evaluate on.

    Everything that is wrong with the data is found here, unless it is streamed.
    """
    splits = load_splits(config, eval_examples=eval_examples, seed=seed)
    builder = make_builder(tokenizer, config, splits.format, loss)
    validation = pair_dataset(splits.validation, builder, skip_bad_rows=config.skip_bad_rows)
    notes = [*splits.notes, *picked_by(builder)]
    notes += left_out("validation", len(splits.validation), validation, config.max_length)
    source: PairSource | None = None
    train: Dataset | PairStream
    if isinstance(splits.train, Examples):
        source = PairSource(splits.train, builder, config.skip_bad_rows)
        train = PairStream(source, seed)
    else:
        train = pair_dataset(splits.train, builder, skip_bad_rows=config.skip_bad_rows)
        notes += left_out("training", len(splits.train), train, config.max_length)
    lengths = sequence_lengths(validation)
    if eval_tokens is not None:
        fitting = sum(total <= eval_tokens for total in itertools.accumulate(lengths))
        lengths = lengths[: max(fitting, 1)]
    # In order of length a batch holds little padding: a fifth less work for long, uneven examples.
    validation = validation.select(sorted(range(len(lengths)), key=lengths.__getitem__))
    return RunPairs(train, validation, splits.validation, splits.format, notes, source)


@dataclass(frozen=True)
class Splits:
    """What to train on (Examples only when streaming) and to evaluate on."""

    train: Examples | list[Record]
    validation: list[Record]
    format: str
    notes: list[str]


def load_splits(config: DataConfig, *, eval_examples: int, seed: int) -> Splits:
    """Examples of config.data (default: the built-in examples); eval_examples (0: all) are drawn to evaluate on."""
    data = config.data or str(DATA_DIR)
    options: dict[str, Any] = {
        "format": config.format, "columns": config.column_names(), "skip_bad_rows": config.skip_bad_rows,
    }  # fmt: skip
    train = load_examples(data, "train", streaming=config.streaming, **options)
    if "validation" in available_splits(data):
        held_out = load_examples(data, "validation", **options)
        if config.streaming and train.format == "auto":
            train.format = held_out.format
        if (train.format == "text") != (held_out.format == "text"):
            raise UserError(
                f"--data {data}: documents and personas cannot be mixed; the training rows are of format "
                f"{train.format}, the validation rows of format {held_out.format}."
            )
        validation, kept = held_out.all, train if config.streaming else train.all
        notes = [*skipped_rows(train), *skipped_rows(held_out)]
    elif config.streaming:
        raise UserError(
            f"--data {data}: it has no validation split, and a stream cannot be divided. Add one, or read it whole."
        )
    else:
        kept, validation, note = hold_out(train.all, seed)
        notes = [note, *skipped_rows(train)]
    if 0 < eval_examples < len(validation):
        validation = random.Random(seed).sample(validation, eval_examples)  # not sorted: any first few are a sample too
    return Splits(kept, validation, held_out.format if config.streaming else train.format, notes)


def hold_out(examples: Sequence[Record], seed: int) -> tuple[list[Record], list[Record], str]:
    """(train, validation, what was done): a tenth of the users, so that none is in both; of a single user, rows."""
    if len(examples) < 2:
        raise UserError("The data has one example and no validation split: at least two examples are needed.")
    keys: list[Any] = [example.user_id or example.source for example in examples]
    unit = "users" if any(example.user_id for example in examples) else "rows"
    if len(set(keys)) < 2:
        keys, unit = list(range(len(examples))), "examples"
    groups = list(dict.fromkeys(keys))
    random.Random(seed).shuffle(groups)
    chosen = set(groups[: max(1, round(HELD_OUT * len(groups)))])
    train = [example for key, example in zip(keys, examples, strict=True) if key not in chosen]
    validation = [example for key, example in zip(keys, examples, strict=True) if key in chosen]
    return train, validation, f"{len(chosen)} of {len(groups)} {unit} held out for validation"


def left_out(name: str, examples: int, dataset: Dataset, max_length: int) -> list[str]:
    """What trimming and skipping took from a split, in words."""
    notes = []
    if "windows" in dataset.column_names:
        pieces = Counter(dataset["example"])
        if cut := sum(count > 1 for count in pieces.values()):
            notes.append(f"{name}: {cut:,} documents longer than --max_length {max_length} cut into pieces")
        if examples > len(pieces):
            notes.append(f"{name}: {examples - len(pieces):,} documents of one token skipped")
        return notes
    dropped = [count for count in dataset["dropped_passages"] if count]
    if dropped:
        notes.append(
            f"{name}: {sum(dropped):,} persona entries dropped from {len(dropped):,} examples to fit --max_length "
            f"{max_length}"
        )
    if examples > len(dataset):
        notes.append(f"{name}: {examples - len(dataset):,} examples skipped, longer than --max_length {max_length}")
    return notes


def split_seed(chosen: SplitConfig, model: str | None) -> int:
    """--split_seed, or what was held out of the run in the model's directory, or train's default.

    A sample follows no model: two that are compared are asked the same.
    """
    if chosen.split_seed is not None:
        return chosen.split_seed
    if chosen.split != "held_out":
        return RunConfig.seed
    saved = Path(model or "").expanduser() / CONFIG_NAME
    return int(read_yaml(str(saved)).get("seed", RunConfig.seed)) if model and saved.is_file() else RunConfig.seed


def load_split(data: DataConfig, chosen: SplitConfig, seed: int) -> tuple[Examples, str]:
    """(examples, which they are): read and checked now, or while iterated over with --streaming.

    `seed`: of a sample, and of what was held out.
    """
    where = data.data or str(DATA_DIR)
    present = available_splits(where)
    split: str = chosen.split or next((x for x in ("test", "validation", "train") if x in present), "train")
    held_out = split == "held_out"
    if data.streaming and (held_out or chosen.sample):
        needs = "--split held_out" if held_out else "--sample"
        raise UserError(f"{needs}: all rows must be known to choose from them. Leave out --streaming.")
    if not held_out and split not in present:
        raise UserError(f"--split {split}: {where} has no such split; it has {', '.join(present)}.")
    if held_out and "validation" in present:
        raise UserError(f"--split held_out: {where} has a validation split, which training leaves out. Use that.")
    rows = load_examples(
        where, "train" if held_out else split, format=data.format, columns=data.column_names(),
        skip_bad_rows=data.skip_bad_rows, streaming=data.streaming, limit=None if held_out else chosen.limit,
    )  # fmt: skip
    if held_out:
        _, examples, _ = hold_out(rows.all, seed)
        rows.keep(examples[: chosen.limit])
    if chosen.sample is not None and chosen.sample < len(rows.all):
        rows.keep(random.Random(seed).sample(rows.all, chosen.sample))
    return rows, split


def training_rows_note(data: DataConfig, split: str) -> list[str]:
    """What to know of numbers that were taken on rows that the model may have been trained on."""
    if split != "train" or data.data is None:
        return []
    return [
        "these are training rows: a model that was trained on this data has seen them. --split held_out takes the "
        "tenth that training leaves out where there is no validation split"
    ]
