"""Examples → `datasets` of token pairs: built once, cached on disk, the same on every machine.

The cache's key is a fingerprint of everything that pairs depend on: texts, tokenizer, limits, retriever, and the
version of the code that picks passages and builds pairs.
"""

import contextlib
import hashlib
import json
import marshal
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
import xxhash
from datasets import Dataset, Features, IterableDataset, Value
from datasets import List as ListOf
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock

from perce.config.schema import DataConfig, LossConfig
from perce.data.documents import DocumentBuilder
from perce.data.pairing import PERCE, Builder, PairSource, make_builder
from perce.data.pairs import PairBuilder
from perce.data.rows import Document, Examples, Reading, Record
from perce.data.sharing import UnitKind
from perce.data.workers import tables
from perce.errors import UserError, in_one_line
from perce.files.integrity import difference, sizes_and_digests
from perce.reading.sources import Source

PAIRS_VERSION = 10
"""The version of the code that makes pairs from examples; a test fails if the pairs change and this number does not."""

PAIRS = "pairs.arrow"
DIGESTS = "digests.json"  # next to cached pairs: the digest of their file, written when they are complete

_COMMON = {
    "input_ids": ListOf(Value("int32")),
    "response_length": Value("int32"),
    "personal": ListOf(Value("bool")),
    "data_weight": Value("float64"),
    "example": Value("int32"),
}
_PERSONA = {
    "persona_span": ListOf(Value("int32")),
    "passages": ListOf(Value("int32")),
    "dropped_passages": Value("int32"),
    "conversation": Value("int64"),
    "persona": Value("int64"),
    "copied": Value("bool"),
}
FEATURES = {
    PairBuilder: Features(_COMMON | _PERSONA),
    DocumentBuilder: Features({**_COMMON, "windows": ListOf(ListOf(Value("int32")))}),
}


def pair_dataset(examples: Sequence[Record], builder: Builder, *, skip_bad_rows: bool = False) -> Dataset:
    """Pairs of all examples, in order. An example that cannot be built raises UserError, or is left out if
    skip_bad_rows.

    The column `example` is the index into `examples`, so that texts need not be stored again.
    """
    fingerprint = _fingerprint(examples, builder, skip_bad_rows)
    directory = Path(datasets.config.HF_DATASETS_CACHE) / "perce" / fingerprint
    try:
        if (cached := _cached(directory)) is not None:  # no lock: the cache may be read-only for us
            return cached
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):  # one process of a run builds
            if (cached := _cached(directory)) is not None:
                return cached
            if directory.exists():
                shutil.rmtree(directory)
            directory.mkdir()
            written = directory / PAIRS
            _write(written, PairSource(examples, builder, skip_bad_rows))
            (directory / DIGESTS).write_text(json.dumps(sizes_and_digests(directory, [written])), encoding="utf-8")
            return Dataset.from_file(str(written))
    except OSError as error:
        raise UserError(
            f"{datasets.config.HF_DATASETS_CACHE}: token pairs cannot be written to this cache ({in_one_line(error)}). "
            "Make room, or choose another directory with the environment variable HF_DATASETS_CACHE."
        ) from error


def _cached(directory: Path) -> Dataset | None:
    """The cached pairs, if their file is unchanged: a damaged one would be trained on, or end in a traceback."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        written = json.loads((directory / DIGESTS).read_text(encoding="utf-8"))
        if difference(directory, written) is None:
            return Dataset.from_file(str(directory / PAIRS))
    return None


def rows_dataset_pairs(
    dataset: Any, name: str, tokenizer: Any, config: DataConfig, loss: LossConfig = PERCE
) -> Dataset:  # fmt: skip
    """Pairs of a `datasets.Dataset` (or a list) of raw rows in any supported format. UserError for what is neither."""
    other = isinstance(dataset, str | Mapping) or hasattr(dataset, "columns")  # as tables of pandas and polars have
    if other or not (hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")):
        raise UserError(
            f"{name}: expected a Dataset or a list of rows, got {type(dataset).__name__}. datasets.load_dataset and "
            "Dataset.from_pandas make one."
        )
    if isinstance(dataset, Dataset | IterableDataset):
        dataset = dataset.with_format(None)
    source = Source(name, name, lambda: ((f" row {number}", _plain(row)) for number, row in enumerate(dataset, 1)))
    examples = Examples(source, Reading.of(config))
    read = examples.all  # the format is known from here on
    return pair_dataset(
        read, make_builder(tokenizer, config, examples.format, loss), skip_bad_rows=config.skip_bad_rows
    )


def _plain(value: Any) -> Any:
    """A value with lists in place of arrays: pandas and datasets' formats have them, and == compares their elements."""
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _write(file: Path, source: PairSource) -> None:
    with ArrowWriter(path=str(file), features=FEATURES[type(source.builder)]) as writer:
        for table in tables(source, writer.schema):
            writer.write_table(table)
        writer.finalize()


def _fingerprint(examples: Sequence[Record], builder: Builder, skip_bad_rows: bool) -> str:
    """Digest of the texts, the tokenizer, the limits, the retriever with its model, and the version of the code."""
    tokenizer = builder.tokenizer
    parts = [
        PAIRS_VERSION, repr(FEATURES), skip_bad_rows, builder.settings,
        tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.split_special_tokens,
        tokenizer.backend_tokenizer.to_str(),
    ]  # fmt: skip
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\0".encode())
    for example in examples:  # version 0 depends on values only: no references, no interned strings
        digest.update(marshal.dumps(_values(example), 0))
    return digest.hexdigest()[:32]


def _values(example: Record) -> tuple[Any, ...]:
    if isinstance(example, Document):
        return example.text, example.user_id, example.source, example.data_weight
    turns = tuple([(turn.role, turn.content) for turn in example.turns])
    return (
        example.persona, turns, example.response, example.user_id, example.personal_spans, example.source,
        example.data_weight,
    )  # fmt: skip


def pairs_digest(dataset: Any, personal: bool = False) -> str | None:
    """Digest of the training pairs in order, the same on every machine; of which tokens are personal, if weights depend
    on it. None for a stream, whose pairs are not known beforehand."""
    if not isinstance(dataset, Dataset):
        return None
    digest = xxhash.xxh3_128(repr(numbers(dataset, "response_length").tolist()).encode())
    for column in pieces_of(dataset, "input_ids"):
        digest.update(repr(pyarrow.compute.list_value_length(column).to_pylist()).encode())
        digest.update(pyarrow.compute.list_flatten(column).to_numpy(zero_copy_only=False))
    for column in pieces_of(dataset, "personal") if personal else ():
        digest.update(pyarrow.compute.list_flatten(column).to_numpy(zero_copy_only=False))
    weights = numbers(dataset, "data_weight") if "data_weight" in dataset.column_names else np.ones(0)
    if (weights != 1).any():
        digest.update(weights.tobytes())
    return digest.hexdigest()


def listed(pairs: Sequence[Mapping[str, Any]]) -> Dataset:
    """A list of pairs as a dataset. Of fields that pairs do not have, nothing is kept: nothing reads them, and their
    values may have several types, which a column cannot."""
    known = dict.fromkeys(chain.from_iterable(FEATURES.values()))
    given = {name: None for name in known if any(name in pair for pair in pairs)} | {"data_weight": 1.0, "example": -1}
    return Dataset.from_list([{name: pair.get(name, other) for name, other in given.items()} for pair in pairs])


def columns_of(dataset: Any) -> set[str]:
    """The columns of a dataset or list of rows or of pairs; those of its first row if nothing else tells them."""
    names = getattr(dataset, "column_names", None)
    if names is None and isinstance(dataset, list | IterableDataset):
        names = next(iter(dataset), None)
    return {*(names or ())}


def numbers(dataset: Dataset, name: str) -> np.ndarray:
    """(pairs,) a column that has one number per pair."""
    return np.concatenate([piece.to_numpy(zero_copy_only=False) for piece in pieces_of(dataset, name)])


def sequence_lengths(dataset: Any) -> list[int]:
    """The length in tokens of each factual sequence in a dataset of pairs."""
    if not isinstance(dataset, Dataset):
        return [len(pair["input_ids"]) for pair in dataset]
    return [
        n for column in pieces_of(dataset, "input_ids") for n in pyarrow.compute.list_value_length(column).to_pylist()
    ]


def persona_lengths(dataset: Dataset) -> np.ndarray:
    """(pairs,) the length in tokens of each persona, with the words around it; 0 without one."""
    spans = [pyarrow.compute.list_flatten(column).to_numpy(zero_copy_only=False)
             for column in pieces_of(dataset, "persona_span")]  # fmt: skip
    return np.diff(np.concatenate(spans).reshape(-1, 2)).ravel()


def conversations(dataset: Any) -> list[list[int]]:
    """For each conversation the indices of its pairs, in order. A pair without a conversation stands alone."""
    return [indices for persona in personas(dataset, "conversation") for indices in persona]


def personas(dataset: Any, unit: UnitKind = "persona") -> list[list[list[int]]]:
    """For each persona its conversations, each as the indices of its pairs. With unit "conversation", each conversation
    stands alone."""
    together: dict[Any, dict[Any, list[int]]] = {}
    for index, keys in enumerate(zip(*(_keys(dataset, name) for name in (unit, "conversation")), strict=True)):
        persona, conversation = (("alone", index) if key is None else key for key in keys)
        together.setdefault(persona, {}).setdefault(conversation, []).append(index)
    return [list(of_persona.values()) for of_persona in together.values()]


def _keys(dataset: Any, name: str) -> list[int | None]:
    if not isinstance(dataset, Dataset):
        return [pair.get(name) for pair in dataset]
    return numbers(dataset, name).tolist() if name in dataset.column_names else [None] * len(dataset)


def pieces_of(dataset: Dataset, name: str) -> Iterator[Any]:
    """A column of the selected rows, in pieces. (`dataset.data` also has the rows that are not selected.)"""
    for table in dataset.with_format("arrow", columns=[name]).iter(batch_size=1000):
        yield table[name]
