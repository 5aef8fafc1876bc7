"""Chooses which examples are used for training, for validation, and by perce.score and perce.evaluate."""

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from perce.config.questions import SplitConfig
from perce.config.schema import DataConfig, LossConfig
from perce.config.yaml_file import read_yaml
from perce.data.dataset import conversations, numbers, pair_dataset, persona_lengths, sequence_lengths
from perce.data.pairing import (
    PairSource,
    copied_replies,
    dated,
    make_builder,
    picked_by,
    skipped_rows,
    without_persona,
)
from perce.data.rows import (
    Document,
    Example,
    Examples,
    Reading,
    Record,
    available_splits,
    load_examples,
    not_read,
    text_key,
    texts_key,
    texts_of,
    what_is_there,
)
from perce.data.stream import PairStream
from perce.demo import DATA_DIR
from perce.errors import UserError, in_one_line
from perce.files.integrity import read_object
from perce.files.runs import CONFIG_NAME, HELD_OUT_NAME
from perce.hub import from_anywhere
from perce.reading.formats import FORMATS
from perce.visible import as_json

HELD_OUT = 0.1  # share of the users that is held out if the data has no validation split
UNITS = ("users", "rows", "examples")


@dataclass(frozen=True)
class HeldOut:
    """The users (or rows) that are held out for validation, whatever the order and number of the rows.

    A user is known by their id, a row by its texts, because its line number changes when the file changes.
    """

    unit: str
    """One of UNITS."""
    keys: frozenset[str]
    file: Path | None = None
    """The file in which a run has recorded them; None if they were just drawn."""

    @classmethod
    def drawn(cls, examples: Sequence[Record], seed: int) -> "HeldOut":
        """A tenth of the users, so that no user is on both sides; if there is only one, of the rows or examples. Those
        without a persona are not drawn by themselves."""
        examples = of_personas(examples)
        for unit in UNITS if any(example.user_id for example in examples) else UNITS[1:]:
            keys = sorted(set(_keys(examples, unit)))
            if len(keys) > 1:
                random.Random(seed).shuffle(keys)
                return cls(unit, frozenset(keys[: max(1, round(HELD_OUT * len(keys)))]))
        raise UserError(
            "The data has no validation split: at least two different examples are needed, so that one can be held out."
        )

    @classmethod
    def recorded(cls, run: Path) -> "HeldOut | None":
        """The users that a run has held out; None if it has recorded none. UserError for a damaged file."""
        if not (file := run / HELD_OUT_NAME).exists():
            return None
        try:
            content = read_object(file, "unit", "held_out")
            if content["unit"] not in UNITS:
                raise ValueError(f"unit: {content['unit']!r}")
            return cls(content["unit"], frozenset(content["held_out"]), file)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{file}: cannot be read ({in_one_line(error)}); expected the users or rows that this run held out of "
                "its training. Restore it, or draw others with --split_seed: the run may have been trained on those."
            ) from error

    def to_json(self) -> str:
        return as_json({"unit": self.unit, "held_out": sorted(self.keys)}, indent=1) + "\n"

    def divide(self, examples: Sequence[Record], data: str) -> tuple[list[Record], list[Record], str]:
        """(others, held out, their number in words); UserError if the data has none of the recorded users."""
        keys = _keys(examples, self.unit)
        others, held_out = ([x for key, x in zip(keys, examples, strict=True) if (key in self.keys) is out]
                            for out in (False, True))  # fmt: skip
        if not held_out:
            raise UserError(
                f"{self.file}: none of the {len(self.keys):,} {self.unit} that the run held out is in --data {data}. "
                "Give the data that it was trained on; perce.score and perce.evaluate draw others with --split_seed."
            )
        nameless = self.unit == "users" and not all(example.user_id for example in examples)
        units = f"{self.unit}{' and rows without one' if nameless else ''}"
        return others, held_out, f"{len(self.keys.intersection(keys)):,} of {len(set(keys)):,} {units}"


def _keys(examples: Sequence[Record], unit: str) -> list[str]:
    """The key by which each example is held out. All examples of a row have the same, except with unit "examples"."""
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
    """The token pairs of a run."""

    train: Dataset | PairStream
    validation: Dataset
    examples: list[Record]
    """The validation examples, which the column `example` of `validation` indexes."""
    format: str
    notes: list[str]
    """Sentences on what was held out, trimmed and skipped."""
    held_out: HeldOut | None
    """None if the data has a validation split."""
    uncut: int | None
    """How many validation examples there are; None if all of them are used."""


def load_pairs(
    config: DataConfig, tokenizer: Any, *, loss: LossConfig, eval_examples: int, eval_tokens: int | None, seed: int,
    validation_seed: int,
) -> RunPairs:  # fmt: skip
    """Read, check and pair config.data. At most eval_examples (0: all) and eval_tokens are kept for validation.

    seed: of the order of a stream. validation_seed: of who is held out, and of the draw of eval_examples. Every mistake
    in the data is found here, unless it is streamed.
    """
    splits = load_splits(config, eval_examples=eval_examples, seed=validation_seed)
    builder = make_builder(tokenizer, config, splits.format, loss)
    validation = pair_dataset(splits.validation, builder, skip_bad_rows=config.skip_bad_rows)
    notes = [*splits.notes, *picked_by(builder), *dated(builder)]
    notes += left_out("validation", len(splits.validation), validation, config.max_length)
    train: Dataset | PairStream
    if isinstance(splits.train, Examples):
        train = PairStream(PairSource(splits.train, builder, config.skip_bad_rows), seed)
    else:
        train = pair_dataset(splits.train, builder, skip_bad_rows=config.skip_bad_rows)
        notes += left_out("training", len(splits.train), train, config.max_length)
    lengths = sequence_lengths(validation)
    if eval_tokens is not None:
        fitting = sum(total <= eval_tokens for total in itertools.accumulate(lengths))
        lengths = lengths[: max(fitting, 1)]
    cut = len(splits.validation) < splits.available or len(lengths) < len(validation)
    # Sorted by length, batches have little padding: a fifth less work for long examples of uneven length. Replies of a
    # conversation stay together, because they share tokens only within a batch.
    kept = range(len(lengths))
    together = conversations(validation.select(kept)) if config.share == "conversations" else [[i] for i in kept]
    together.sort(key=lambda indices: max(lengths[index] for index in indices))
    validation = validation.select([index for indices in together for index in indices])
    return RunPairs(train, validation, splits.validation, splits.format, notes, splits.held_out,
                    splits.available if cut else None)  # fmt: skip


@dataclass(frozen=True)
class Splits:
    """The examples for training (`Examples` only if streaming) and for validation."""

    train: Examples | list[Record]
    validation: list[Record]
    format: str
    notes: list[str]
    held_out: HeldOut | None
    available: int
    """Validation examples before eval_examples of them were drawn."""


def load_splits(config: DataConfig, *, eval_examples: int, seed: int) -> Splits:
    """Examples of config.data (default: the built-in ones). eval_examples (0: all) are drawn for validation."""
    data = config.data or str(DATA_DIR)
    options = vars(Reading.of(config))
    train = load_examples(data, "train", streaming=config.streaming, **options)
    who: HeldOut | None = None
    present = available_splits(data)
    if "validation" in present:
        held_out = load_examples(data, "validation", **options)
        if config.streaming and train.format == "auto":
            train.format = held_out.format
        ours, others = FORMATS[train.format], FORMATS[held_out.format]
        if (ours.documents, ours.history) != (others.documents, others.history):  # one builder makes the pairs of both
            raise UserError(
                f"--data {data}: documents, personas and histories cannot be mixed; the training rows are of format "
                f"{train.format}, the validation rows of format {held_out.format}."
            )
        validation, kept = held_out.all, train if config.streaming else train.all
        notes = [] if config.streaming else trained_on_too(train.all, validation)
        notes += [*skipped_rows(train), *skipped_rows(held_out)]
    elif config.streaming:
        raise UserError(
            f"--data {data}: expected a validation split, because none can be held out of a stream. Add one, or leave "
            "out --streaming."
        )
    else:
        who = HeldOut.drawn(train.all, seed)
        kept, validation, counted = who.divide(train.all, data)
        notes = [f"{counted} held out for validation", *without_user(train.all, who), *skipped_rows(train)]
    of_nobody = len(validation) - len(of_personas(validation))
    validation = of_personas(validation)
    if of_nobody:
        notes.append(f"validation: {of_nobody:,} examples without a persona left out")
    available = len(validation)
    if 0 < eval_examples < available:
        validation = random.Random(seed).sample(validation, eval_examples)  # not sorted: its beginning is a sample too
    notes += not_read(train.unread)
    return Splits(kept, validation, held_out.format if config.streaming else train.format, notes, who, available)


def of_personas(examples: Sequence[Record]) -> list[Record]:
    """The examples that have a persona, or are documents; all if none is. Validation measures what personas do."""
    found = [example for example in examples if isinstance(example, Document) or example.persona]
    return found or [*examples]


def trained_on_too(train: Sequence[Record], validation: Sequence[Record]) -> list[str]:
    """A warning if validation rows are trained on as well. Users in both splits may be intended, so they are noted."""
    texts = {texts_of(example) for example in validation}.intersection(map(texts_of, train))
    same = [example for example in validation if texts_of(example) in texts]
    users = {example.user_id for example in validation} - {None}
    shared = users.intersection(example.user_id for example in train)
    both = f"{len(shared):,} of {len(users):,} users" if shared else ""
    if not same:
        return [f"{both} of the validation split are also trained on"] if both else []
    return [
        f"warning: {len(same):,} of {len(validation):,} validation examples are also trained on (the first: "
        f"{same[0].source}){f', and {both}' if both else ''}, which makes eval_loss lower than it is on new rows. "
        "Remove them from one of the splits"
    ]


def without_user(examples: Sequence[Record], who: HeldOut) -> list[str]:
    """A warning if a user may be both trained and validated on."""
    known = [example for example in examples if isinstance(example, Example) and example.persona]
    nameless = sum(example.user_id is None for example in known)
    if (who.unit == "users" and not nameless) or not known:
        return []
    which = f"{nameless:,} of {len(known):,} examples have no user_id" if nameless else "all rows are of one user"
    held = "rows" if who.unit == "users" else who.unit
    return [
        f"warning: {which}: {held} are held out, not users, so a user with several of them may be both trained and "
        "validated on. --columns user_id=FIELD names the field that tells users apart"
    ]


def left_out(name: str, examples: int, dataset: Dataset, max_length: int) -> list[str]:
    """Notes on what was trimmed and skipped in a split."""
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
    found = without_persona(int((persona_lengths(dataset) == 0).sum()), len(dataset))
    found += copied_replies(int(numbers(dataset, "copied").sum()), len(dataset))
    notes += [f"{name}: {note}" for note in found]
    if examples > len(dataset):
        notes.append(
            f"{name}: {examples - len(dataset):,} examples skipped, longer than --max_length {max_length} or unusable"
        )
    return notes


def load_split(
    data: DataConfig, chosen: SplitConfig, run: Path | None = None, *, unanswered: bool = False
) -> tuple[Examples, str, str]:  # fmt: skip
    """(examples, name of their split, its description). Rows are checked now or, with --streaming, when iterated over.

    run: the directory of the run that trained the model, if any. unanswered: rows without a response are examples too.
    """
    where = data.data or str(DATA_DIR)
    present = available_splits(where)
    split: str = chosen.split or _unnamed_split(data, present, run)
    held_out = split == "held_out"
    if held_out:
        who = _recorded(chosen, run, where, present)
    elif split not in present:
        held = (
            f" --split held_out takes the users that {run} held out." if run and (run / HELD_OUT_NAME).exists() else ""
        )
        raise UserError(f"--split {split}: {where} has no such split; {what_is_there(where)}.{held}")
    if data.streaming and (held_out or chosen.sample):
        needs = "--split held_out" if held_out else "--sample"
        raise UserError(f"{needs}: all rows must be read first to choose from them. Leave out --streaming.")
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
    """The split to use if none is named. For the data of a run, it is one that the run was not trained on, if any."""
    first = next((x for x in ("test", "validation", "train") if x in present), "train")
    if run is None or first == "test":
        return first
    own = read_yaml(str(run / CONFIG_NAME), "--model").get("data") == (data.data and from_anywhere(data.data))
    return "held_out" if own and (first == "train" or (run / HELD_OUT_NAME).exists()) else first


def _recorded(chosen: SplitConfig, run: Path | None, where: str, present: Sequence[str]) -> HeldOut | None:
    """The users that the run has held out; None if they are to be drawn. UserError if no users can be held out."""
    if "validation" in present and not (run and (run / HELD_OUT_NAME).exists()):
        raise UserError(
            f"--split held_out: {where} has a validation split, which training leaves out. Use --split validation."
        )
    if run is None or chosen.split_seed is not None:
        return None
    if (recorded := HeldOut.recorded(run)) is None:
        raise UserError(
            f"{run} has held out no users ({HELD_OUT_NAME} is missing), probably because its data had a validation "
            "split. Put that split back; or give --split train, or --split held_out with --split_seed to draw users: "
            "the model may have been trained on either."
        )
    return recorded


def _where_from(who: HeldOut, chosen: SplitConfig, run: Path | None) -> str:
    if who.file:
        return f"those that {who.file} names"
    others = run and (run / HELD_OUT_NAME).exists() and f", not those that {run / HELD_OUT_NAME} names"
    return f"drawn by seed {chosen.seed}{others or ''}{f'; {run} may have been trained on them' if run else ''}"


def training_rows_note(data: DataConfig, split: str) -> list[str]:
    """A caveat for numbers that were measured on rows that the model may have been trained on."""
    if split != "train" or data.data is None:
        return []
    return [
        "these are training rows: a model that was trained on this data has seen them. --split held_out takes the "
        "tenth that training leaves out if there is no validation split"
    ]
