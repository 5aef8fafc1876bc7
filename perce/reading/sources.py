"""Where rows come from: a file, a directory, a `save_to_disk` directory or the Hub -> (place, row) pairs.

readers.py reads each kind of file, and formats.py says what a row means.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from os.path import splitext
from pathlib import Path
from typing import Any

from perce.errors import UserError, first_line, in_one_line
from perce.files.network import hub_failure
from perce.files.paths import check_path, did_you_mean
from perce.reading.csv_file import csv_rows
from perce.reading.readers import (
    BATCH,
    BadRow,
    Placed,
    arrow_rows,
    json_file,
    json_lines,
    json_splits,
    parquet_rows,
    whole_json,
)  # fmt: skip
from perce.visible import listed, shortened

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
NAMES = "; ".join(", ".join(aliases) for aliases in SPLITS.values())
_SPLIT = re.compile(rf'\s*\{{\s*"({"|".join(chain(*SPLITS.values()))})"\s*:\s*\[')
READERS = {".jsonl": json_lines, ".json": json_file, ".parquet": parquet_rows, ".csv": csv_rows}
SUFFIXES = tuple(READERS)
REFERRED_TO = ("shared_contexts", "survey.")  # what the names of files that rows refer to begin with; see joins.py
ABOUT = ("dataset_info", "metadata.")  # likewise, of files that describe the data
# Other kinds of file that users have, and how to get rows from them.
OTHER_FILES = {
    ".tsv": "its cells are separated by tabs. Write it with commas, as .csv",
    ".txt": "a text has no rows. If it has one JSON object per line, as Multi-Session Chat has, rename it to .jsonl",
    ".gz": "it is compressed. Unpack it (gunzip)",
    ".zst": "it is compressed. Unpack it (unzstd)",
    ".bz2": "it is compressed. Unpack it (bunzip2)",
    ".zip": "it is an archive. Unpack it",
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "it is a spreadsheet. Save it as CSV UTF-8, with commas"),
    ".arrow": "give the directory that save_to_disk wrote",
}


@dataclass(frozen=True)
class Source:
    """The rows of one split."""

    origin: str  # for error messages: a path as the user wrote it, or "HUB_ID[split]"
    name: str  # for Example.source: the file's name alone
    read: Callable[[], Placed] | None  # None: there is no such split, and need not be, because the data is one file
    path: Path | None = None  # of the file that has the rows; None: the rows come from the datasets library
    unread: tuple[str, ...] = ()  # names in the data, of files or parts, that are of no split, so they are not read

    def rows(self) -> Placed:
        """(place, row or BadRow) pairs; UserError if the data cannot be read any further."""
        try:
            yield from self.read() if self.read else ()
        except OSError as error:
            raise UserError(f"{self.origin}: cannot be read ({error.strerror or in_one_line(error)}).") from error


def _unread(names: Iterable[str], read: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({*names} - {*read}))


def open_data(data: str, streaming: bool = False) -> dict[str, Source]:
    """The splits of `data`, in the order train, validation, test; UserError if the data does not exist."""
    check_path("--data", data)
    path = Path(data).expanduser()
    if path.is_file():
        return _splits(path) if path.suffix.lower() == ".json" and _has_splits(path) else _only_train(_file(path))
    if path.is_dir():
        saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        return _saved(path, streaming) if saved else _directory(path) or _hub(data, streaming)
    # A mistyped path must not wait for the Hub's retries (23 s without a network). Hub ids are "name" or "owner/name".
    local = path.is_absolute() or data.startswith((".", "~")) or path.suffix.lower() in SUFFIXES or data.count("/") > 1
    if local or (path.parent != Path(".") and path.parent.exists()):
        note = "" if local else f" (for a Hub id: run the command in a directory without a {path.parent} in it)"
        raise UserError(
            f"No such file or directory: {data} (looked in {Path.cwd()}).{did_you_mean(data)} Check the path after "
            f"--data{note}."
        )
    return _hub(data, streaming)


def _has_splits(path: Path) -> bool:
    """Whether a .json file begins like an object of splits, {"train": [rows], "valid": [rows]}."""
    try:
        with path.open("rb") as file:
            return bool(_SPLIT.match(file.read(4096).removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="replace")))
    except OSError:  # reported when it is read
        return False


def _only_train(source: Source) -> dict[str, Source]:
    """The splits of a single file or Dataset: all of it is training data, of which callers may hold some out."""
    return {"train": source, **{split: Source(source.origin, source.name, None) for split in ("validation", "test")}}


def _in_order(origin: object, names: Collection[str], first: bool = False) -> dict[str, str]:
    """{our split: its name in the data} from the names in the data, which vary ("val", "dev"). UserError for names that
    are of no split, and for several of one, unless the first counts."""
    found = {split: [alias for alias in aliases if alias in names] for split, aliases in SPLITS.items()}
    if names and not any(found.values()):
        raise UserError(f"{origin}: expected a split named {NAMES}, got {listed(names)}.")
    for split, several in found.items():
        if len(several) > 1 and not first:
            raise UserError(f"{origin}: {', '.join(several)} are all names of the {split} split; keep one of them.")
    return {split: several[0] for split, several in found.items() if several}


# --- files ----------------------------------------------------------------------------------------------------------


def _file(path: Path) -> Source:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        other = OTHER_FILES.get(path.suffix.lower())
        what = f"cannot be read: {other}" if other else "cannot tell what kind of file this is"
        raise UserError(f"{path}: {what}; expected a name ending in {', '.join(SUFFIXES)}.")
    return Source(str(path), path.name, partial(reader, path), path)


def _splits(path: Path) -> dict[str, Source]:
    """The splits of a .json file that has several, such as Hugging Face's Persona-Chat."""
    state = path.stat()
    names = _split_names(path, state.st_mtime_ns, state.st_size)

    def rows(name: str) -> Placed:
        return ((place, row) for split, place, row in json_splits(path) if split == name)

    found = _in_order(path, names)
    unread = _unread(names, found.values())
    return {ours: Source(str(path), path.name, partial(rows, name), path, unread) for ours, name in found.items()}


@lru_cache(8)
def _split_names(path: Path, changed: int, size: int) -> tuple[str, ...]:
    """The names of the splits that have rows; reads the whole file. changed, size: the file's, as keys of the cache."""
    return tuple(dict.fromkeys(split for split, _, _ in json_splits(path)))


def _directory(path: Path) -> dict[str, Source]:
    """train/validation/test files, or LaMP's pairs of `*_questions.json` and `*_outputs.json`."""
    found: dict[str, Source] = {}
    outputs_read: set[str] = set()
    for split, stems in SPLITS.items():
        files = [path / (stem + suffix) for stem in stems for suffix in SUFFIXES if (path / (stem + suffix)).is_file()]
        pairs = [path / f"{stem}_questions.json" for stem in stems if (path / f"{stem}_questions.json").is_file()]
        if len(files) + len(pairs) > 1:
            names = ", ".join(file.name for file in files + pairs)
            raise UserError(
                f"{path}: {names} are all files of the {split} split; keep one of them, or give --data that file."
            )
        for file in files:
            found[split] = _file(file)
        for questions in pairs:
            outputs = questions.with_name(_outputs(questions.name))
            if outputs.is_file():  # otherwise they are no split
                outputs_read.add(outputs.name)
                found[split] = Source(
                    str(questions), questions.name, partial(_lamp_pair, questions, outputs), questions
                )
    present = [file.name for file in path.glob("*") if _may_have_rows(file.name.lower()) and file.is_file()]
    present = [name for name in present if not name.startswith((".", *REFERRED_TO, *ABOUT))]
    # LaMP's published test questions lack the file of their outputs, and not the name of a split.
    unanswered = {name for name in present if name.endswith("_questions.json") and _outputs(name) not in present}
    unread = _unread(present, {source.name for source in found.values()} | outputs_read | unanswered)
    return {split: replace(source, unread=unread) for split, source in found.items()}


def _may_have_rows(name: str) -> bool:
    """Whether a file's name is that of rows, readable or not: train.jsonl, more.jsonl.gz, test.tsv; not README.txt."""
    stem, suffix = splitext(name)
    of_split = stem in chain(*SPLITS.values()) or stem.endswith(SUFFIXES)
    return suffix in SUFFIXES or (suffix in OTHER_FILES and of_split)


def _outputs(questions: str) -> str:
    return questions.replace("_questions", "_outputs")


def _lamp_pair(questions: Path, outputs: Path) -> Placed:
    """The rows of LaMP's two files: each question with its gold output, joined by id."""
    golds = whole_json(outputs)
    golds = golds.get("golds") if isinstance(golds, dict) else golds
    if not isinstance(golds, list) or not all(
        isinstance(gold, dict) and {"id", "output"} <= gold.keys() for gold in golds
    ):
        raise UserError(
            f'{outputs}: expected LaMP\'s {{"task": ..., "golds": [{{"id", "output"}}, ...]}}. Correct the file.'
        )
    by_id = {str(gold["id"]): gold["output"] for gold in golds}
    if len(by_id) < len(golds):
        twice = next(key for key, count in Counter(str(gold["id"]) for gold in golds).items() if count > 1)
        raise UserError(
            f"{outputs}: the id {shortened(twice)!r} is there twice, each time with an output. Correct the file."
        )
    for place, row in json_file(questions):
        if isinstance(row, dict) and (key := str(row.get("id"))) not in by_id:
            row = BadRow(
                "output", f"an output in {outputs.name} for the question's id", f"none for id {shortened(key)!r}"
            )
        yield place, {**row, "output": by_id[str(row.get("id"))]} if isinstance(row, dict) else row


# --- the datasets library -------------------------------------------------------------------------------------------


def _saved(path: Path, streaming: bool) -> dict[str, Source]:
    """A directory written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged files may raise any exception
        why = in_one_line(error)
        raise UserError(f"{path} looks like a directory written by save_to_disk but cannot be read: {why}.") from error

    def source(dataset: Any, split: str, unread: tuple[str, ...] = ()) -> Source:
        load, origin = dataset.to_iterable_dataset if streaming else partial(_checked, dataset), f"{path}{split}"
        return Source(origin, f"{path.name}{split}", partial(_dataset_rows, origin, load), unread=unread)

    if not isinstance(loaded, datasets.DatasetDict):
        return _only_train(source(loaded, ""))
    found = _in_order(path, loaded)
    unread = _unread(loaded, found.values())
    return {split: source(loaded[name], f"[{name}]", unread) for split, name in found.items()}


def _checked(dataset: Any) -> Any:
    """The datasets.Dataset; ArrowInvalid if offsets in its memory-mapped file point outside of the file, because
    reading there would crash the process."""
    import pyarrow as pa

    for chunk in (chunk for column in dataset.data.table.columns for chunk in column.chunks):
        try:
            chunk.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error) or not pa.types.is_string(chunk.type):
                raise
            chunk.view(pa.binary()).validate(full=True)  # a text that is not UTF-8 is a bad row only
    return dataset


def _dataset_rows(origin: str, load: Callable[[], Any]) -> Placed:
    """Rows of a datasets.Dataset or IterableDataset. Any error of its files or the network becomes a UserError."""
    number = 0
    with _told() as told:
        try:
            for table in load().with_format("arrow").iter(batch_size=BATCH):
                for row in arrow_rows(table):
                    number += 1
                    yield f" row {number}", row
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{origin}: cannot be read after row {number}: {_cause(error, told)}. Correct the file."
            ) from error


@contextmanager
def _told() -> Iterator[list[str]]:
    """Collects the errors that datasets logs meanwhile: only these name the file that it was reading."""
    told: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("datasets")
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)


def _cause(error: Exception, told: list[str]) -> str:
    """What went wrong, in one line. datasets wraps the cause in errors that often say only that something failed."""
    if told:
        return " ".join(told[0].split())
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return in_one_line(error)


def _load(failure: str | None, *args: Any, **options: Any) -> Any:
    import datasets

    with _cached_alone(failure is not None):
        return datasets.load_dataset(*args, **options)


@contextmanager
def _cached_alone(wanted: bool) -> Iterator[None]:
    """If `wanted`, only what is already in the cache is read: the retries for a Hub that is out of reach take 25 s."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if wanted:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _hub(data: str, streaming: bool) -> dict[str, Source]:
    """A Hub id, "owner/name" or "owner/name:config"; also a local directory laid out like a Hub repository."""
    import datasets

    path = Path(data).expanduser()
    is_directory = path.is_dir()
    name, _, config = (str(path), "", "") if is_directory else data.partition(":")
    failure = None if is_directory else hub_failure()
    try:
        with _cached_alone(failure is not None):
            names = datasets.get_dataset_split_names(name, config or None)
    except Exception as error:  # the network, the Hub's client or a dataset's files may raise anything
        what = "holds no train, validation or test file" if is_directory else "is not a file or directory here"
        why = f"datasets.load_dataset could not load it either: {first_line(error)}"
        raise UserError(
            f"{data} {what}, and {f'the Hub cannot be reached ({failure})' if failure else why}. Give --data a "
            f"file ({', '.join(SUFFIXES)}), a directory of train/validation/test files, or a Hub id that can be "
            'reached from here ("owner/name", or "owner/name:config" if it has several configurations).'
        ) from error
    found, splits = {}, _in_order(data, names, first=not is_directory)  # who reads from the Hub cannot rename a split
    for ours, theirs in splits.items():
        load = partial(_load, failure, name, config or None, split=theirs, streaming=streaming)
        origin = f"{data}[{theirs}]"
        label = f"{path.resolve().name if is_directory else data}[{theirs}]"
        unread = _unread(names, splits.values())
        found[ours] = Source(origin, label, partial(_dataset_rows, origin, load), unread=unread)
    return found
