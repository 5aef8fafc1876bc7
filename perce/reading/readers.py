"""Files of rows → (place, row) pairs: JSON Lines, JSON arrays, Arrow tables such as Parquet; for CSV see csv_file.py.

A reader does not stop at a row that it cannot decode: it yields a `BadRow` in its place, and `data.rows.Examples` alone
decides whether to stop or to count it. UserError is for mistakes of the file as a whole. Only a few rows are in memory
at a time, and the size of a row is limited, so that a file without line breaks is an error and cannot fill the memory.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from perce.errors import UserError, in_one_line
from perce.visible import shortened

ROW_LIMIT = 64 * 2**20  # the most bytes or characters of a row, and of a CSV cell
PIECE = 2**20  # characters of a JSON array that are read at a time
BATCH = 256  # rows of a table that are converted to Python objects at a time
Placed = Iterator[tuple[str, Any]]  # the place of a row (":17" or " row 17") and the row, or a BadRow


class BadRow(Exception):
    """Why a row cannot be used, and what to do; `data.rows.Examples` adds where the row is.

    It may also stand in place of a cell that cannot be read, and is raised only if the cell's field is used.
    """

    remedy = " Correct the row, or pass --skip_bad_rows to leave such rows out (they are counted)."
    lines: tuple[str, ...] = ()  # further lines of the error message, below the first

    def __init__(self, field: str | None, expected: str, got: str):
        where = f"field '{shortened(field)}': " if field else ""
        super().__init__(f"{where}expected {expected}, got {got}")


def too_long() -> BadRow:
    return BadRow(None, f"a row of at most {ROW_LIMIT / 2**20:.4g} MiB", "a longer one")


def not_utf8(byte: int, where: str) -> str:
    """Describes a byte that is not UTF-8. Most such files come from Windows, many from Excel."""
    there = bytes([byte]).decode("cp1252", errors="replace")
    return f"the byte 0x{byte:02x} {where} (in WINDOWS-1252 it is {there!r}; convert: iconv -f WINDOWS-1252 -t UTF-8)"


# --- kinds of files ---------------------------------------------------------------------------------------------------

_KINDS = (  # (first bytes of a file, what it is)
    (b"PK\x03\x04", "a spreadsheet or zip archive. Save it as CSV UTF-8, or unpack it"),
    (b"\xd0\xcf\x11\xe0", "an old spreadsheet. Save it as CSV UTF-8"),
    (b"\x1f\x8b", "a compressed file. Unpack it (gunzip)"),
    (b"\x28\xb5\x2f\xfd", "a compressed file. Unpack it (unzstd)"),
    (b"PAR1", "Parquet. Give the file a name that ends in .parquet"),
)


def check_is_text(path: Path) -> None:
    """UserError for a file whose first bytes show that it is no UTF-8 text: UTF-16, archives, Parquet."""
    with path.open("rb") as file:
        head = file.read(64)
    for mark, kind in _KINDS:
        if head.startswith(mark):
            raise UserError(f"{path}: expected text, got {kind}.")
    wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or (len(head) > 3 and 0 in head[:2])
    if wide:
        raise UserError(f"{path}: expected UTF-8 text, got UTF-16. Convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW.")


# --- JSON -------------------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; BadRow if it has a field twice, of which Python's json would silently take the last."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRow(twice, "it once per object", f"it {'twice' if names.count(twice) == 2 else 'more than twice'}")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _unholdable(error: RecursionError | ValueError) -> BadRow:
    """The error for JSON that is well formed but that Python cannot hold."""
    if isinstance(error, RecursionError):
        return BadRow(None, "values nested less deeply", "more levels than Python can read")
    return BadRow(None, "a number of at most 4,300 digits", "a longer one")


def parse_json(text: str) -> Any:
    """json.loads, with ValueError also for an object that has a field twice and for JSON that Python cannot hold."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError:
        raise
    except (BadRow, RecursionError, ValueError) as error:
        raise ValueError(str(error if isinstance(error, BadRow) else _unholdable(error))) from None


def _decode(raw: bytes) -> Any:
    """The row in a line of JSON Lines, or a BadRow that says why there is none."""
    try:
        row = _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(None, "UTF-8 text", not_utf8(raw[error.start], f"at column {error.start + 1}"))
    except json.JSONDecodeError as error:
        text = error.doc.strip()
        got = f"{error.msg} at column {error.colno}: {shortened(text)}"
        if text in "[{":
            got += " (an object over several lines, or a JSON array, whose file must end in .json and begin with [)"
        return BadRow(None, "one JSON object per line", got)
    except BadRow as bad:
        return bad
    except (RecursionError, ValueError) as error:
        return _unholdable(error)
    if isinstance(row, list) and any(isinstance(entry, dict) for entry in row):
        return BadRow(None, "one JSON object per line", "a list: the name of a JSON array's file must end in .json")
    return row


def json_lines(path: Path) -> Placed:
    # Lines are split as bytes, at \n only: str.splitlines would also cut at the U+2028 that JSON strings may hold.
    check_is_text(path)
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(ROW_LIMIT + 1):
            number += 1
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if len(raw) > ROW_LIMIT and not raw.endswith(b"\n"):
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(PIECE)
                yield f":{number}", too_long()
            elif raw := raw.strip():
                yield f":{number}", _decode(raw)


def json_file(path: Path) -> Placed:
    """The rows of a .json file: an array of rows if its first character is "[", or else JSON Lines."""
    with path.open("rb") as file:
        is_array = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    return json_array(path) if is_array else json_lines(path)


_SPACE = re.compile(r"[ \t\r\n]*")


class _Array:
    """A JSON text that is read in pieces. `text` is the part in memory, and `at` the place of the next value in it."""

    def __init__(self, path: Path, file: IO[str]):
        self.path, self.file, self.text, self.at, self.lines = path, file, "", 0, 0
        self.ended = False

    def more(self) -> None:
        """Reads on. The amount in memory doubles, so that a value of many pieces is not parsed again too often."""
        self.lines += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :], 0
        piece = self.file.read(max(PIECE, len(self.text)))
        self.text += piece
        self.ended = not piece

    def next(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches anything
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def value(self) -> Any:
        """The next value. JSONDecodeError, RecursionError, ValueError or BadRow if there is no usable one."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if end - self.at > ROW_LIMIT:
                    raise too_long()
                if end < len(self.text) or self.ended:  # otherwise a number might continue
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                # The error of a string that is cut off is at its beginning; that of any other cut value, near the end.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 10
                if self.ended or not cut:
                    raise
            if len(self.text) - self.at > ROW_LIMIT:
                raise too_long()
            self.more()

    def checked(self, what: str) -> Any:
        """The next value; UserError if there is no usable one."""
        try:
            return self.value()
        except json.JSONDecodeError as error:
            raise self.wrong(error.msg, error.pos) from None
        except (BadRow, RecursionError, ValueError) as error:
            bad = error if isinstance(error, BadRow) else _unholdable(error)
            raise UserError(
                f"{self.path} {what}: {bad}. Correct the file: the rows after it cannot be found."
            ) from None

    def wrong(self, what: str, at: int) -> UserError:
        line = self.lines + self.text.count("\n", 0, at) + 1
        column = at - self.text.rfind("\n", 0, at)
        return UserError(f"{self.path}:{line}: not JSON: {what} at column {column}. Correct the file.")


def json_array(path: Path) -> Placed:
    """Reads row by row. A byte that is not UTF-8 becomes a surrogate, which is reported if its field is used."""
    with _opened(path) as array:
        for number, row in _elements(array, "row"):
            yield f" row {number}", row
        if array.next():
            raise array.wrong("more text after the array", array.at)


def json_splits(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(split, place, row) for all splits of such a file."""
    with _opened(path) as array:
        separator, seen = "{", set[str]()
        while array.next() == separator:
            array.at += 1
            array.next()
            at, split = array.at, array.checked("a split's name")
            if not isinstance(split, str) or split in seen:
                raise array.wrong(f"expected the name of a split, and no split twice, got {shortened(repr(split))}", at)
            seen.add(split)
            for mark in ":[":
                if array.next() != mark:
                    raise array.wrong(f"expected {mark!r} before the rows of a split", array.at)
                array.at += mark == ":"
            for number, row in _elements(array, f"{split} row"):
                yield split, f" {split} row {number}", row
            separator = ","
        if array.next() != "}":
            raise array.wrong("expected ',' or '}'", array.at)
        array.at += 1
        if array.next():
            raise array.wrong("more text after the object", array.at)


@contextmanager
def _opened(path: Path) -> Iterator[_Array]:
    check_is_text(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        yield _Array(path, file)


def _elements(array: _Array, what: str) -> Iterator[tuple[int, Any]]:
    """The numbered rows of a JSON array that begins at the current place; moves to the place after it."""
    number = 0
    array.next()
    array.at += 1
    while (mark := array.next()) != "]":
        if number:
            if mark != ",":
                raise array.wrong("expected ',' or ']'", array.at)
            array.at += 1
            array.next()
        number += 1
        yield number, array.checked(f"{what} {number}")
    array.at += 1


def whole_json(path: Path) -> Any:
    """The value of a file that holds a single one."""
    check_is_text(path)
    try:
        return _DECODER.decode(path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: expected UTF-8 text, got {not_utf8(error.object[error.start], '')}.") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}. Correct the file."
        ) from None
    except (BadRow, RecursionError, ValueError) as error:
        bad = error if isinstance(error, BadRow) else _unholdable(error)
        raise UserError(f"{path}: {bad}. Correct the file.") from None


# --- Parquet and other tables -----------------------------------------------------------------------------------------


def check_names(names: list[str], where: str) -> None:
    """UserError for two columns of the same name, one of which would be lost."""
    for name in names:
        if name and names.count(name) > 1:
            first, second = [number for number, other in enumerate(names, 1) if other == name][:2]
            raise UserError(
                f"{where}: the field {shortened(name)!r} is there twice, in columns {first} and {second}. Rename or "
                "remove one."
            )


def parquet_rows(path: Path) -> Placed:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            check_names(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=BATCH):
                for row in arrow_rows(batch):
                    number += 1
                    yield f" row {number}", row
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:  # an error of the system, not of the file
            raise
        raise UserError(
            f"{path}: damaged, or not a Parquet file, after row {number}: {in_one_line(error)}. Write it again."
        ) from None


def arrow_rows(table: Any) -> Iterator[Any]:
    """Rows of a pyarrow Table or RecordBatch. A BadRow replaces a cell that Python cannot hold, such as a date after
    the year 9999 or a text that is not UTF-8, and a row that is too long."""
    as_json = {field.name: field.type for field in table.schema if "arrow.json" in str(field.type)}
    for row in _python_rows(table):
        for name, kind in as_json.items() if isinstance(row, dict) else ():
            try:
                row[name] = _parsed(row[name], kind)
            except ValueError as error:
                row[name] = BadRow(name, "a value that can be read", in_one_line(error))
        yield row


def _python_rows(table: Any) -> Iterator[Any]:
    if table.nbytes <= ROW_LIMIT:
        try:
            yield from table.to_pylist()
            return
        except _unreadable():
            pass
    for number in range(table.num_rows):
        row = table.slice(number, 1)
        yield (
            too_long()
            if row.nbytes > ROW_LIMIT
            else {name: _cell(name, column) for name, column in zip(row.schema.names, row.columns, strict=True)}
        )


def _parsed(value: Any, kind: Any) -> Any:
    """A value of an Arrow type with the JSON in it parsed, as which `datasets` stores values of more than one type."""
    if getattr(kind, "extension_name", "") == "arrow.json" and isinstance(value, str):
        return parse_json(value)
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_parsed(entry, kind.value_type) for entry in value]
    if isinstance(value, dict):
        return {name: _parsed(entry, kind.field(name).type) for name, entry in value.items()}
    return value


def _cell(name: str, column: Any) -> Any:
    try:
        return column[0].as_py()
    except _unreadable() as error:
        return BadRow(name, "a value that can be read", in_one_line(error))


def _unreadable() -> tuple[type[Exception], ...]:
    import pyarrow as pa

    return (pa.ArrowException, ValueError, OverflowError, OSError, ImportError, TypeError)
