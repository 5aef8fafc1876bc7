"""Which examples are trained on, evaluated on and asked about."""

import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from perce.config.options import read_yaml
from perce.config.schema import CONFIG_NAME, HELD_OUT_NAME, DataConfig, LossConfig, SplitConfig
from perce.data.dataset import conversations, numbers, pair_dataset, sequence_lengths
from perce.data.pairing import PairSource, make_builder, picked_by, skipped_rows
from perce.data.rows import Document, Examples, Reading, Record, available_splits, load_examples, text_key, texts_key
from perce.data.stream import PairStream
from perce.demo import DATA_DIR
from perce.errors import UserError, in_one_line
from perce.hub import from_anywhere
from perce.visible import as_json

HELD_OUT = 0.1  # share of users, where the data has no validation split
UNITS = ("users", "rows", "examples")


@dataclass(frozen=True)
class HeldOut:
    """Who is evaluated on instead of trained on, whatever the order and number of the rows.

    A user is known by name, a row by its texts: a line has another number once the file has changed.
    """

    unit: str
    """One of UNITS."""
    keys: frozenset[str]
    file: Path | None = None
    """Where a run has recorded them; None: just drawn."""

    @classmethod
    def drawn(cls, examples: Sequence[Record], seed: int) -> "HeldOut":
        """A tenth of the users, so that none is in both; where there is one user only, of the rows or examples."""
        for unit in UNITS if any(example.user_id for example in examples) else UNITS[1:]:
            keys = sorted(set(_keys(examples, unit)))
            if len(keys) > 1:
                random.Random(seed).shuffle(keys)
                return cls(unit, frozenset(keys[: max(1, round(HELD_OUT * len(keys)))]))
        raise UserError(
            "The data has no validation split: at least two different examples are needed, to hold one out."
        )

    @classmethod
    def recorded(cls, run: Path) -> "HeldOut | None":
        """Those of a run; None where it has recorded nobody. UserError for a file that is not as it was written."""
        if not (file := run / HELD_OUT_NAME).exists():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return cls(UNITS[UNITS.index(content["unit"])], frozenset(content["held_out"]), file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: cannot be read ({in_one_line(error)}); expected who was held out of the training of this "
                "run. Restore it, or draw others with --split_seed: the run may have been trained on them."
            ) from error

    def to_json(self) -> str:
        return as_json({"unit": self.unit, "held_out": sorted(self.keys)}, indent=1) + "\n"

    def divide(self, examples: Sequence[Record], data: str) -> tuple[list[Record], list[Record], str]:
        """(others, held out, how many in words); UserError where none of those that were recorded is among them."""
        keys = _keys(examples, self.unit)
        others, held_out = ([x for key, x in zip(keys, examples, strict=True) if (key in self.keys) is out]
                            for out in (False, True))  # fmt: skip
        if not held_out:
            raise UserError(
                f"{self.file}: none of the {len(self.keys):,} {self.unit} that the run held out is in --data {data}. "
                "Give the data that it was trained on; perce.score and perce.evaluate draw others with --split_seed."
            )
        return others, held_out, f"{len(self.keys.intersection(keys)):,} of {len(set(keys)):,} {self.unit}"


def _keys(examples: Sequence[Record], unit: str) -> list[str]:
    """What each example is held out by; all that come from one row have one key, but as examples."""
    if unit == "examples":
        return [text_key(example) for example in examples]
    users = [example.user_id if unit == "users" else None for example in examples]
    rows = defaultdict(list)
    for user, example in zip(users, examples, strict=True):
        if not user:
            rows[example.source].append(example)
    by_row = {source: texts_key(of_row) for source, of_row in rows.items()}
    return [user or by_row[example.source] for user, example in zip(users, examples, strict=True)]


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
    held_out: HeldOut | None
    """None where the data has a validation split."""


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
    # In order of length a batch holds little padding: a fifth less work for long, uneven examples. Replies of a
    # conversation share what they have in common where they are in one batch.
    kept = range(len(lengths))
    together = conversations(validation.select(kept)) if config.share == "conversations" else [[i] for i in kept]
    together.sort(key=lambda indices: max(lengths[index] for index in indices))
    validation = validation.select([index for indices in together for index in indices])
    return RunPairs(train, validation, splits.validation, splits.format, notes, source, splits.held_out)


@dataclass(frozen=True)
class Splits:
    """What to train on (Examples only when streaming) and to evaluate on."""

    train: Examples | list[Record]
    validation: list[Record]
    format: str
    notes: list[str]
    held_out: HeldOut | None


def load_splits(config: DataConfig, *, eval_examples: int, seed: int) -> Splits:
    """Examples of config.data (default: the built-in examples); eval_examples (0: all) are drawn to evaluate on."""
    data = config.data or str(DATA_DIR)
    options = vars(Reading.of(config))
    train = load_examples(data, "train", streaming=config.streaming, **options)
    who: HeldOut | None = None
    present = available_splits(data)
    if "validation" in present:
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
        who = HeldOut.drawn(train.all, seed)
        kept, validation, counted = who.divide(train.all, data)
        notes = [f"{counted} held out for validation", *without_user(train.all, who), *skipped_rows(train)]
    if 0 < eval_examples < len(validation):
        validation = random.Random(seed).sample(validation, eval_examples)  # not sorted: any first few are a sample too
    return Splits(kept, validation, held_out.format if config.streaming else train.format, notes, who)


def without_user(examples: Sequence[Record], who: HeldOut) -> list[str]:
    """A warning, where a user may be on both sides."""
    nameless = sum(example.user_id is None for example in examples)
    if (who.unit == "users" and not nameless) or isinstance(examples[0], Document):
        return []
    which = f"{nameless:,} of {len(examples):,} examples have no user_id" if nameless else "all rows are of one user"
    held = "rows" if who.unit == "users" else who.unit
    return [
        f"warning: {which}: {held} are held out, not users, and whoever has several may be trained and validated on. "
        "--columns user_id=FIELD names the field that tells users apart"
    ]


def left_out(name: str, examples: int, dataset: Dataset, max_length: int) -> list[str]:
    """What trimming and skipping took from a split, in words."""
    notes = []
    if "windows" in dataset.column_names:
        pieces = Counter(numbers(dataset, "example").tolist())
        if cut := sum(count > 1 for count in pieces.values()):
            notes.append(f"{name}: {cut:,} documents longer than --max_length {max_length} cut into pieces")
        if examples > len(pieces):
            notes.append(f"{name}: {examples - len(pieces):,} documents of one token skipped")
        return notes
    dropped = numbers(dataset, "dropped_passages")
    if entries := int(dropped.sum()):
        notes.append(
            f"{name}: {entries:,} persona entries dropped from {int((dropped > 0).sum()):,} examples to fit "
            f"--max_length {max_length}"
        )
    if examples > len(dataset):
        notes.append(f"{name}: {examples - len(dataset):,} examples skipped, longer than --max_length {max_length}")
    return notes


def load_split(
    data: DataConfig, chosen: SplitConfig, run: Path | None = None, *, unanswered: bool = False
) -> tuple[Examples, str, str]:  # fmt: skip
    """(examples, their split, the same in words): read and checked now, or while iterated over with --streaming.

    run: the directory of the model's, where it is of one. unanswered: rows without a response are examples too.
    """
    where = data.data or str(DATA_DIR)
    present = available_splits(where)
    split: str = chosen.split or _unnamed_split(data, present, run)
    held_out = split == "held_out"
    if held_out:
        who = _recorded(chosen, run, where, present)
    elif split not in present:
        raise UserError(f"--split {split}: {where} has no such split; it has {', '.join(present)}.")
    if data.streaming and (held_out or chosen.sample):
        needs = "--split held_out" if held_out else "--sample"
        raise UserError(f"{needs}: all rows must be known to choose from them. Leave out --streaming.")
    rows = load_examples(
        where, "train" if held_out else split, **vars(Reading.of(data, unanswered)), streaming=data.streaming,
        limit=None if held_out else chosen.limit,
    )  # fmt: skip
    told = split
    if held_out:
        who = who or HeldOut.drawn(rows.all, chosen.seed)
        _, examples, counted = who.divide(rows.all, where)
        told = f"{split}: {counted}, {_where_from(who, chosen, run)}"
        rows.keep(examples[: chosen.limit])
    if chosen.sample is not None and chosen.sample < len(rows.all):
        rows.keep(random.Random(chosen.seed).sample(rows.all, chosen.sample))
    return rows, split, told


def _unnamed_split(data: DataConfig, present: Sequence[str], run: Path | None) -> str:
    """Which split is meant where none is named: of the data that a run was trained on, one that it was not."""
    first = next((x for x in ("test", "validation", "train") if x in present), "train")
    if run is None or first == "test":
        return first
    own = read_yaml(str(run / CONFIG_NAME), "--model").get("data") == (data.data and from_anywhere(data.data))
    return "held_out" if own and (first == "train" or (run / HELD_OUT_NAME).exists()) else first


def _recorded(chosen: SplitConfig, run: Path | None, where: str, present: Sequence[str]) -> HeldOut | None:
    """Whom the run has held out; None where they are to be drawn. UserError where there is nobody to be asked about."""
    if "validation" in present and not (run and (run / HELD_OUT_NAME).exists()):
        raise UserError(f"--split held_out: {where} has a validation split, which training leaves out. Use that.")
    if run is None or chosen.split_seed is not None:
        return None
    if (recorded := HeldOut.recorded(run)) is None:
        raise UserError(
            f"{run} held nobody out of its training, as where the data has a validation split ({HELD_OUT_NAME} is "
            "missing). Put that split back; or give --split train, or --split held_out with --split_seed to draw "
            "users: the model may have been trained on either."
        )
    return recorded


def _where_from(who: HeldOut, chosen: SplitConfig, run: Path | None) -> str:
    if who.file:
        return f"those that {who.file} names"
    others = run and (run / HELD_OUT_NAME).exists() and f", not those that {run / HELD_OUT_NAME} names"
    return f"drawn by seed {chosen.seed}{others or ''}{f'; {run} may have been trained on them' if run else ''}"


def training_rows_note(data: DataConfig, split: str) -> list[str]:
    """What to know of numbers that were taken on rows that the model may have been trained on."""
    if split != "train" or data.data is None:
        return []
    return [
        "these are training rows: a model that was trained on this data has seen them. --split held_out takes the "
        "tenth that training leaves out where there is no validation split"
    ]
