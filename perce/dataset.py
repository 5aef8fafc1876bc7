"""Examples → `datasets` of token pairs: built once, cached on disk, the same on every machine.

load_pairs         what a run trains and evaluates on, and notes on what was left out
load_splits        rows of the training and the validation split, held out by user where the data has none
pair_dataset       all pairs at once, cached by `datasets` under a fingerprint of everything they depend on
PairSource         examples, and counts of what could not be paired; perce/stream.py reads one while training
"""

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets import List as ListOf

from perce.config import DataConfig, LossConfig
from perce.demo import DATA_DIR
from perce.documents import DocumentBuilder
from perce.errors import UserError
from perce.pairs import PairBuilder
from perce.retrieval import make_retriever
from perce.rows import Record, Rows, available_splits, load_examples
from perce.sources import Source
from perce.stream import PairStream

HELD_OUT = 0.1  # share of users, where the data has no validation split
RETRIEVED_FORMATS = ("longlamp", "lamp")  # their persona is a history of passages, of which a retriever picks
# What makes pairs of examples. The labels of formats.py are known to retrieval.
CODE = [
    Path(__file__).with_name(name) for name in ("formats.py", "retrieval.py", "encoder.py", "pairs.py", "documents.py")
]

_COMMON = {
    "input_ids": ListOf(Value("int32")),
    "response_length": Value("int32"),
    "personal": ListOf(Value("bool")),
    "example": Value("int32"),
}
_PERSONA = {
    "persona_span": ListOf(Value("int32")),
    "passages": ListOf(Value("int32")),
    "dropped_passages": Value("int32"),
}
FEATURES = {
    PairBuilder: Features(_COMMON | _PERSONA),
    DocumentBuilder: Features({**_COMMON, "windows": ListOf(ListOf(Value("int32")))}),
}
PERCE = LossConfig()
Builder = PairBuilder | DocumentBuilder


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
    source: "PairSource | None"
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
    if isinstance(splits.train, Rows):
        source = PairSource(splits.train, builder, config.skip_bad_rows)
        train = PairStream(source, seed)
    else:
        train = pair_dataset(splits.train, builder, skip_bad_rows=config.skip_bad_rows)
        notes = notes + left_out("training", len(splits.train), train, config.max_length)
    lengths = [len(ids) for ids in validation["input_ids"]]
    if eval_tokens is not None:
        lengths = lengths[: max(sum(total <= eval_tokens for total in itertools.accumulate(lengths)), 1)]
    # In order of length a batch holds little padding: a fifth less work for long, uneven examples.
    validation = validation.select(sorted(range(len(lengths)), key=lengths.__getitem__))
    return RunPairs(train, validation, splits.validation, splits.format, notes, source)


def picked_by(builder: Builder) -> list[str]:
    """How passages are chosen, in words, where they are."""
    retriever = builder.retriever if isinstance(builder, PairBuilder) else None
    return [f"persona: {retriever.description}"] if retriever else []


@dataclass(frozen=True)
class Splits:
    """What to train on (Rows only when streaming) and to evaluate on."""

    train: Rows | list[Record]
    validation: list[Record]
    format: str
    notes: list[str]


def load_splits(config: DataConfig, *, eval_examples: int, seed: int) -> Splits:
    """Rows of config.data (default: the built-in examples); eval_examples (0: all) are drawn to evaluate on."""
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
        validation, kept = held_out.examples, train if config.streaming else train.examples
        notes = [*skipped_rows(train), *skipped_rows(held_out)]
    elif config.streaming:
        raise UserError(
            f"--data {data}: it has no validation split, and a stream cannot be divided. Add one, or read it whole."
        )
    else:
        kept, validation, note = hold_out(train.examples, seed)
        notes = [note, *skipped_rows(train)]
    if 0 < eval_examples < len(validation):
        validation = random.Random(seed).sample(validation, eval_examples)  # not sorted: any first few are a sample too
    return Splits(kept, validation, held_out.format if config.streaming else train.format, notes)


def skipped_rows(rows: Rows) -> list[str]:
    return [f"{rows.skipped:,} rows skipped; the first: {rows.reasons[0]}"] if rows.skipped else []


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


def make_builder(tokenizer: Any, config: DataConfig, format: str, loss: LossConfig = PERCE) -> Builder:
    """What pairs rows of this format; UserError if the objective needs another kind of rows."""
    if format == "text":
        if loss.objective == "perce":
            raise UserError(
                "objective perce: expected rows with a persona, got documents (format text). Choose longce or ce as "
                "the --objective, or give rows with persona, query and response."
            )
        return DocumentBuilder(
            tokenizer, max_length=config.max_length, short_context=loss.short_context, short_stride=loss.short_stride
        )
    if loss.objective == "longce":
        raise UserError(
            f"objective longce: expected documents, rows like {{'text': …}}, got rows of format {format}. Choose perce "
            "or ce as the --objective, or give documents (--columns text=THEIRS renames a field)."
        )
    return PairBuilder(
        tokenizer,
        max_length=config.max_length,
        retriever=make_retriever(config) if format in RETRIEVED_FORMATS else None,
        chat_template_kwargs=config.template_kwargs(),
    )


def make_persona_builder(tokenizer: Any, config: DataConfig, format: str) -> PairBuilder:
    """make_builder for what asks about personas; UserError for documents, which have none."""
    if format == "text":
        raise UserError("Expected rows with a persona, got documents (format text): there is no persona to leave out.")
    builder = make_builder(tokenizer, config, format)
    assert isinstance(builder, PairBuilder)
    return builder


def pair_dataset(examples: Sequence[Record], builder: Builder, *, skip_bad_rows: bool = False) -> Dataset:
    """Pairs of all examples, in order; an example that cannot be built raises UserError, or is left out.

    The column `example` is the index into `examples`, so that texts need not be stored again.
    """
    from datasets.exceptions import DatasetGenerationError

    try:
        return Dataset.from_generator(
            _generate,
            features=FEATURES[type(builder)],
            fingerprint=_fingerprint(examples, builder, skip_bad_rows),
            gen_kwargs={"source": PairSource(examples, builder, skip_bad_rows)},
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


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


def rows_dataset_pairs(
    dataset: Any, name: str, tokenizer: Any, config: DataConfig, loss: LossConfig = PERCE
) -> Dataset:  # fmt: skip
    """Pairs of a `datasets.Dataset` (or a list) of raw rows in any supported format."""
    source = Source(name, name, lambda: ((f" row {number}", row) for number, row in enumerate(dataset, start=1)))
    rows = Rows(source, config.format, config.column_names() or {}, config.skip_bad_rows, None)
    examples = rows.examples
    return pair_dataset(
        examples, make_builder(tokenizer, config, rows.format, loss), skip_bad_rows=config.skip_bad_rows
    )


@dataclass
class PairSource:
    """Examples to pair, and counts of what the first pass left out."""

    examples: Sequence[Record] | Rows
    builder: Builder
    skip_bad_rows: bool
    unfit: int = 0
    dropped_passages: int = 0
    cut_documents: int = 0
    reason: str = ""
    """Why the first of the unfit ones was left out."""
    _first_pass: tuple[list[str], list[str]] | None = None

    def build(self, index: int, example: Record) -> list[dict[str, Any]]:
        """Columns of the example's pairs: none where it does not fit and may be skipped."""
        try:
            pairs = self.builder.pairs(example)  # type: ignore[arg-type]  # of the kind that the builder is for
        except UserError as error:
            if not self.skip_bad_rows:
                raise
            self.unfit += 1
            self.reason = self.reason or str(error)
            return []
        self.dropped_passages += sum(getattr(pair, "dropped_passages", 0) for pair in pairs)
        self.cut_documents += len(pairs) > 1
        return [asdict(pair) | {"example": index} for pair in pairs]

    def end_of_pass(self) -> None:
        if self._first_pass is None:
            self._first_pass = self._counted()

    def notes(self, of_share: str = "") -> list[str]:
        """What was left out so far, in words; of a stream's later passes nothing is told again.

        `of_share` follows what is counted of built examples alone: rows are read, and counted, by every process.
        """
        rows, examples = self._first_pass or self._counted()
        return [*rows, *(note + of_share for note in examples)]

    def _counted(self) -> tuple[list[str], list[str]]:
        """Notes of rows, and of the examples that were built."""
        rows = skipped_rows(self.examples) if isinstance(self.examples, Rows) else []
        limit, notes = f"--max_length {self.builder.max_length}", []
        if self.dropped_passages:
            notes.append(f"training: {self.dropped_passages:,} persona entries dropped to fit {limit}")
        if self.cut_documents:
            notes.append(f"training: {self.cut_documents:,} documents longer than {limit} cut into pieces")
        if self.unfit:
            notes.append(f"training: {self.unfit:,} examples skipped, the first: {self.reason}")
        return rows, notes

    def nothing_left(self) -> str:
        return f"No example is left, none of them fits. The first: {self.reason}"


def _generate(source: PairSource) -> Iterator[dict[str, Any]]:
    built = False
    for index, example in enumerate(source.examples):
        for row in source.build(index, example):
            built = True
            yield row
    if not built:
        raise UserError(source.nothing_left())


def _fingerprint(examples: Sequence[Record], builder: Builder, skip_bad_rows: bool) -> str:
    """Of the texts, the tokenizer, the limits, the retriever with its model, and the code that picks and pairs."""
    tokenizer = builder.tokenizer
    parts = [
        *(path.read_bytes() for path in CODE), repr(FEATURES), repr(list(examples)), skip_bad_rows, builder.settings,
        tokenizer.chat_template, tokenizer.eos_token, tokenizer.bos_token, tokenizer.backend_tokenizer.to_str(),
    ]  # fmt: skip
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:32]
