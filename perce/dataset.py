"""Examples → `datasets` of token pairs: built once, cached on disk, the same on every machine.

load_splits        rows of the training and the validation split, held out by user where the data has none
pair_dataset       all pairs at once, cached by `datasets` under a fingerprint of everything they depend on
stream_pairs       one pair at a time, for data too large to read first
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value
from datasets import List as ListOf

from perce import pairs
from perce.config import DataConfig
from perce.demo import DATA_DIR
from perce.errors import UserError
from perce.pairs import PairBuilder
from perce.rows import Example, Rows, available_splits, load_examples
from perce.sources import Source

HELD_OUT = 0.1  # share of users, where the data has no validation split
SHUFFLE_BUFFER = 1000  # examples among which a stream is shuffled
RETRIEVED_FORMATS = ("longlamp", "lamp")  # their persona is a history of passages, of which retrieve_k are shown

FEATURES = Features(
    {
        "input_ids": ListOf(Value("int32")),
        "persona_span": ListOf(Value("int32")),
        "response_length": Value("int32"),
        "personal": ListOf(Value("bool")),
        "dropped_passages": Value("int32"),
        "example": Value("int32"),
    }
)


@dataclass(frozen=True)
class Splits:
    """What to train on (Rows only when streaming) and to evaluate on; `held_out`: how the latter was made, or None."""

    train: Rows | list[Example]
    validation: list[Example]
    format: str
    held_out: str | None
    skipped: int
    reasons: list[str]


def load_splits(config: DataConfig, *, eval_examples: int, seed: int) -> Splits:
    """Rows of config.data (default: the built-in examples); eval_examples (0: all) are drawn to evaluate on."""
    data = config.data or str(DATA_DIR)
    options: dict[str, Any] = {
        "format": config.format, "columns": config.column_names(), "skip_bad_rows": config.skip_bad_rows,
    }  # fmt: skip
    splits = available_splits(data)
    train = load_examples(data, "train", streaming=config.streaming, **options)
    held_out = None
    if "validation" in splits:
        rows = load_examples(data, "validation", **options)
        kept: Rows | list[Example] = train if config.streaming else train.examples
        validation = rows.examples
        skipped, reasons = train.skipped + rows.skipped, [*train.reasons, *rows.reasons]
    elif config.streaming:
        raise UserError(
            f"--data {data}: it has no validation split, and a stream cannot be divided. Add one, or read it whole."
        )
    else:
        kept, validation, held_out = hold_out(train.examples, seed)
        skipped, reasons = train.skipped, train.reasons
    if 0 < eval_examples < len(validation):
        validation = random.Random(seed).sample(validation, eval_examples)  # not sorted: any first few are a sample too
    return Splits(kept, validation, rows.format if "validation" in splits else train.format, held_out, skipped, reasons)


def hold_out(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example], str]:
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


def make_builder(tokenizer: Any, config: DataConfig, format: str) -> PairBuilder:
    return PairBuilder(
        tokenizer,
        max_length=config.max_length,
        max_passages=config.retrieve_k if format in RETRIEVED_FORMATS else None,
        chat_template_kwargs=config.template_kwargs(),
    )


def pair_dataset(examples: Sequence[Example], builder: PairBuilder, *, skip_bad_rows: bool = False) -> Dataset:
    """Pairs of all examples, in order; an example that cannot be built raises UserError, or is left out.

    The column `example` is the index into `examples`, so that texts need not be stored again.
    """
    from datasets.exceptions import DatasetGenerationError

    try:
        return Dataset.from_generator(
            _generate,
            features=FEATURES,
            fingerprint=_fingerprint(examples, builder, skip_bad_rows),
            gen_kwargs={"source": _PairSource(examples, builder, skip_bad_rows)},
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def left_out(name: str, examples: int, dataset: Dataset, max_length: int) -> list[str]:
    """What trimming and skipping took from a split, in words."""
    notes = []
    dropped = [count for count in dataset["dropped_passages"] if count]
    if dropped:
        notes.append(
            f"{name}: {sum(dropped):,} persona entries dropped from {len(dropped):,} examples to fit --max_length "
            f"{max_length}"
        )
    if examples > len(dataset):
        notes.append(f"{name}: {examples - len(dataset):,} examples skipped, longer than --max_length {max_length}")
    return notes


def stream_pairs(rows: Rows, builder: PairBuilder, *, skip_bad_rows: bool, seed: int) -> IterableDataset:
    """Pairs read and built while training; a fresh pass over the rows each epoch, shuffled within a buffer."""
    stream = IterableDataset.from_generator(
        _generate, features=FEATURES, gen_kwargs={"source": _PairSource(rows, builder, skip_bad_rows)}
    )
    return stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)


def rows_dataset_pairs(dataset: Any, name: str, tokenizer: Any, config: DataConfig) -> Dataset:
    """Pairs of a `datasets.Dataset` (or a list) of raw rows in any supported format."""
    source = Source(name, name, lambda: ((f" row {number}", row) for number, row in enumerate(dataset, start=1)))
    rows = Rows(source, config.format, config.column_names() or {}, config.skip_bad_rows, None)
    examples = rows.examples
    return pair_dataset(examples, make_builder(tokenizer, config, rows.format), skip_bad_rows=config.skip_bad_rows)


@dataclass(frozen=True)
class _PairSource:
    """What the generator reads."""

    examples: Sequence[Example] | Rows
    builder: PairBuilder
    skip_bad_rows: bool


def _generate(source: _PairSource) -> Iterator[dict[str, Any]]:
    reason, built = "", False
    for index, example in enumerate(source.examples):
        try:
            pair = source.builder.build(example)
        except UserError as error:
            if not source.skip_bad_rows:
                raise
            reason = reason or str(error)
            continue
        built = True
        yield asdict(pair) | {"example": index}
    if not built:
        raise UserError(f"No example is left, none of them fits. The first: {reason}")


def _fingerprint(examples: Sequence[Example], builder: PairBuilder, skip_bad_rows: bool) -> str:
    """Of the texts, the tokenizer, the limits and the code that pairs them."""
    tokenizer = builder.tokenizer
    parts = [
        Path(pairs.__file__).read_bytes(), repr(FEATURES), repr(list(examples)), skip_bad_rows, builder.max_length,
        builder.max_passages, sorted(builder.template_kwargs.items()), tokenizer.chat_template, tokenizer.eos_token,
        tokenizer.bos_token, tokenizer.backend_tokenizer.to_str(),
    ]  # fmt: skip
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:32]
