"""Where rows come from: a file, a directory, a `save_to_disk` directory or the Hub -> (place, row) pairs.

Nothing here knows what a row means (`rows.py` does). A reader never stops at a row it cannot decode: it hands over a
`BadRow` in its place, so that one policy, in `rows.Examples`, decides between stopping and counting.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from perce.errors import UserError, first_line

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
BOM = b"\xef\xbb\xbf"
Read = Callable[[], Iterator[tuple[str, Any]]]  # the place of a row (":17" or " row 17") and the row, or a BadRow


class BadRow(Exception):
    """Why a row cannot be used; `rows.Examples` adds where it is and what to do."""

    def __init__(self, field: str | None, expected: str, got: str):
        where = f"field '{field}': " if field else ""
        super().__init__(f"{where}expected {expected}, got {got}")


@dataclass(frozen=True)
class Source:
    """The rows of one split."""

    origin: str  # for error messages: a path as the user wrote it, or "HUB_ID[split]"
    name: str  # for Example.source: the file's name alone
    read: Read | None  # None: the split does not exist, and need not (the data is one file)


def open_data(data: str, streaming: bool = False) -> dict[str, Source]:
    """The splits of `data`, in the order train, validation, test; UserError when there is nothing of the kind."""
    path = Path(data).expanduser()
    if path.is_file():
        return _only_train(_file(path))
    if path.is_dir():
        saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        return _saved(path, streaming) if saved else _directory(path) or _hub(data, streaming)
    # A mistyped path must not wait for the Hub's retries (23 s without a network). Hub ids are "name" or "owner/name".
    local = path.is_absolute() or data.startswith((".", "~")) or path.suffix in SUFFIXES or data.count("/") > 1
    if local or (path.parent != Path(".") and path.parent.exists()):
        note = "" if local else f" (for a Hub id, run where there is no directory {path.parent})"
        raise UserError(
            f"No such file or directory: {data} (looked in {Path.cwd()}). Check the path after --data{note}."
        )
    return _hub(data, streaming)


def _only_train(source: Source) -> dict[str, Source]:
    """One file or one Dataset is training data; whoever needs a validation split holds some of it out."""
    return {"train": source, **{split: Source(source.origin, source.name, None) for split in ("validation", "test")}}


def _in_order(found: Mapping[str, str]) -> dict[str, str]:
    """{our split: its name in the data} from the names in the data, which vary ("val", "dev")."""
    return {split: name for split, aliases in SPLITS.items() for name in found if name in aliases}


# --- files ----------------------------------------------------------------------------------------------------------


def _file(path: Path) -> Source:
    readers = {".jsonl": _json_lines, ".json": _json_file, ".parquet": _parquet, ".csv": _csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path}: cannot tell what kind of file this is; expected a name ending in {', '.join(SUFFIXES)}."
        )
    return Source(str(path), path.name, partial(reader, path))


def _directory(path: Path) -> dict[str, Source]:
    """train/validation/test files, or LaMP's pairs of `*_questions.json` and `*_outputs.json`."""
    found: dict[str, Source] = {}
    for split, stems in SPLITS.items():
        files = [path / (stem + suffix) for stem in stems for suffix in SUFFIXES if (path / (stem + suffix)).is_file()]
        pairs = [path / f"{stem}_questions.json" for stem in stems if (path / f"{stem}_questions.json").is_file()]
        if len(files) + len(pairs) > 1:
            names = ", ".join(file.name for file in files + pairs)
            raise UserError(
                f"{path}: {names} are all the {split} split; leave one of them, or give that file to --data."
            )
        for file in files:
            found[split] = _file(file)
        for questions in pairs:
            outputs = questions.with_name(questions.name.replace("_questions", "_outputs"))
            if outputs.is_file():  # LaMP publishes its test questions without outputs: no split to learn or score
                found[split] = Source(str(questions), questions.name, partial(_lamp_pair, questions, outputs))
    return found


def _decode_json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(None, "UTF-8 text", f"the byte 0x{raw[error.start]:02x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        text = error.doc.strip()
        got = f"{error.msg} at column {error.colno}: {text if len(text) <= 60 else text[:57] + '...'}"
        return BadRow(None, "one JSON object a line", got)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    # Lines are split as bytes, at \n only: str.splitlines would also cut at the U+2028 that JSON strings may hold.
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            raw = (raw.removeprefix(BOM) if number == 1 else raw).strip()
            if raw:
                yield f":{number}", _decode_json(raw)


def _json_array(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().removeprefix(BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: expected UTF-8 text, got the byte 0x{error.object[error.start]:02x}. "
                        "Save the file as UTF-8.") from None  # fmt: skip
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}. Correct the file."
        ) from None


def _json_file(path: Path) -> Iterator[tuple[str, Any]]:
    """A .json file holds an array of rows, or is JSON lines by another name; its first character tells."""
    with path.open("rb") as file:
        is_array = file.read(4096).removeprefix(BOM).lstrip().startswith(b"[")
    if not is_array:
        yield from _json_lines(path)
        return
    for number, row in enumerate(_json_array(path), 1):
        yield f" row {number}", row


def _lamp_pair(questions: Path, outputs: Path) -> Iterator[tuple[str, Any]]:
    """LaMP's distribution: the gold outputs are joined to their questions by id."""
    golds = _json_array(outputs)
    golds = golds.get("golds") if isinstance(golds, dict) else golds
    if not isinstance(golds, list) or not all(
        isinstance(gold, dict) and {"id", "output"} <= gold.keys() for gold in golds
    ):
        raise UserError(
            f'{outputs}: expected LaMP\'s {{"task": ..., "golds": [{{"id", "output"}}, ...]}}. Correct the file.'
        )
    by_id = {str(gold["id"]): gold["output"] for gold in golds}
    for place, row in _json_file(questions):
        if isinstance(row, dict) and (key := str(row.get("id"))) not in by_id:
            row = BadRow("output", f"an output in {outputs.name} for this question's id", f"none for id {key!r}")
        yield place, {**row, "output": by_id[str(row.get("id"))]} if isinstance(row, dict) else row


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB a cell is less than a long profile
    # A byte that is not UTF-8 is carried along as a surrogate, which `rows` reports in the row and field it is in.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            line = reader.line_num
            for row in reader:
                start, line = line + 1, reader.line_num  # a quoted cell may hold line breaks
                if row:
                    yield f":{start}", _csv_row(header, row)
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not CSV: {error}. Correct the file.") from None


def _csv_row(header: list[str], row: list[str]) -> dict[str, Any] | BadRow:
    if len(row) != len(header):
        return BadRow(None, f"{len(header)} cells, as in the header", f"{len(row)}")
    return {name: cell for name, cell in zip(header, row, strict=True) if cell}  # empty: absent


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(path).iter_batches(batch_size=256)
        yield from _numbered(row for batch in batches for row in batch.to_pylist())
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from None


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f" row {number}", row) for number, row in enumerate(rows, 1))


# --- the datasets library -------------------------------------------------------------------------------------------


def _saved(path: Path, streaming: bool) -> dict[str, Source]:
    """A directory written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} looks like a directory written by save_to_disk but cannot be read: {error}") from error

    def source(dataset: Any, split: str) -> Source:
        rows = dataset.to_iterable_dataset() if streaming else dataset
        return Source(f"{path}{split}", f"{path.name}{split}", partial(_numbered, rows))

    if not isinstance(loaded, datasets.DatasetDict):
        return _only_train(source(loaded, ""))
    return {split: source(loaded[name], f"[{name}]") for split, name in _in_order(dict.fromkeys(loaded, "")).items()}


def _hub(data: str, streaming: bool) -> dict[str, Source]:
    """A Hub id, "owner/name" or "owner/name:config"; also a local directory laid out like a Hub repository."""
    import datasets

    is_directory = Path(data).expanduser().is_dir()
    name, config = (data, "") if is_directory or ":" not in data else data.split(":", 1)

    def attempt(call: Callable[..., Any], **options: Any) -> Any:
        try:
            return call(name, config or None, **options)
        except Exception as error:  # whatever the network, the Hub's client or a dataset's own files raise
            what = "holds no train, validation or test file" if is_directory else "is not a file or directory here"
            raise UserError(
                f"{data} {what}, and datasets.load_dataset could not get it either: {first_line(error)}. Give --data a "
                f"file ({', '.join(SUFFIXES)}), a directory of train/validation/test files, or a Hub id that can be "
                'reached from here ("owner/name", or "owner/name:config" where it has several configurations).'
            ) from error

    def read(split: str) -> Iterator[tuple[str, Any]]:
        return _numbered(attempt(datasets.load_dataset, split=split, streaming=streaming))

    splits = _in_order(dict.fromkeys(attempt(datasets.get_dataset_split_names), ""))
    return {
        ours: Source(f"{data}[{theirs}]", f"{data}[{theirs}]", partial(read, theirs)) for ours, theirs in splits.items()
    }
