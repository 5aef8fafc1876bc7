"""CSV by RFC 4180, strictly: commas, and quotes around a whole cell, doubled within it.

csv reads a quote that is neither in one way or another, and may swallow all rows up to the next one. Here it is a
BadRow of its own line, and the lines behind it are read as what they are.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from pathlib import Path
from typing import IO, Any

from perce.data import readers
from perce.data.readers import BadRow, Placed, check_is_text, check_names, too_long
from perce.errors import UserError
from perce.visible import shortened

_CELL = re.compile(r'(?:"[^"]*(?:""[^"]*)*"|(?![ \t]*")[^,\r\n]*(?<!"))(,|\r?\n?\Z)')
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


class _Lines:
    """Lines of a file with those of the record that is being read, which can be put back but for the first."""

    def __init__(self, file: IO[str]):
        self._file, self._ahead, self.record = file, deque[str](), list[str]()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else self._file.readline(readers.ROW_LIMIT + 1)
        if not line:
            raise StopIteration
        if len(line) > readers.ROW_LIMIT:
            while line and not line.endswith("\n"):
                line = self._file.readline(readers.PIECE)
            self.record.append("\n")
            raise too_long()
        self.record.append(line)
        return line

    def put_back(self) -> None:
        self._ahead.extendleft(reversed(self.record[1:]))
        del self.record[1:]


def csv_rows(path: Path) -> Placed:
    check_is_text(path)
    csv.field_size_limit(readers.ROW_LIMIT)  # the default of 128 KiB a cell is less than a long profile
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines, line, header = _Lines(file), 1, list[str]()
        reader = csv.reader(lines, strict=True)
        row: Any
        while True:
            lines.record.clear()
            try:
                row = next(reader, None)
            except BadRow as bad:
                row = bad
            except csv.Error as error:
                alone = "field limit" in str(error) and len(lines.record) == 1
                row = too_long() if alone else _stray_quote(header, lines.record[0])
            if isinstance(row, BadRow):
                lines.put_back()
            if row and not isinstance(row, BadRow):
                row = _cells(header, row, "".join(lines.record)) if header else _header(path, line, row)
            if row is None:
                return
            if isinstance(row, BadRow) and not header:
                raise UserError(f"{path}:{line}: the header: {row}. Correct the file.")
            if not header:
                header = row
            elif row:  # cells that are all empty are an empty line
                yield f":{line}", row
            line += len(lines.record)


def _header(path: Path, line: int, names: list[str]) -> list[str]:
    """The names of the columns; UserError for another separator, and for what has two meanings."""
    (only, *others) = names
    if not others and (found := [mark for mark in _SEPARATORS if mark in only]):
        raise UserError(
            f"{path}:{line}: expected commas between the cells, got {_SEPARATORS[found[0]]}, as spreadsheets write "
            "them in some languages. Save the file with commas, or convert it by pandas: "
            f"pd.read_csv(OLD, sep={found[0]!r}{_encoding(path)}).to_csv(NEW, index=False)."
        )
    if not others and only.lstrip().startswith("{"):
        raise UserError(f"{path}: expected CSV, got JSON lines. Give the file a name that ends in .jsonl.")
    if spaced := [name for name in names if name != name.strip()]:
        raise UserError(
            f"{path}:{line}: the name {shortened(spaced[0])!r} in the header has a space around it. Write the file "
            "without spaces at its commas: a quote behind one quotes nothing."
        )
    check_names(path, names, f"{path}:{line}")
    return names


def _encoding(path: Path) -> str:
    """What pandas must be told to read it: such files come of spreadsheets, which write Windows-1252 as a rule."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            while file.read(readers.PIECE):
                pass
        except UnicodeDecodeError:
            return ", encoding='cp1252'"
    return ""


def _cells(header: list[str], cells: list[str], record: str) -> dict[str, Any] | BadRow:
    """A row; empty where all cells are."""
    if '"' in record and _no_cell(record):
        return _stray_quote(header, record)
    if len(cells) != len(header):
        return BadRow(None, f"{len(header)} cells, as in the header", f"{len(cells)}")
    row = {name: cell or None for name, cell in zip(header, cells, strict=True) if name}  # empty: absent
    return row if any(row.values()) else {}


def _no_cell(record: str) -> tuple[int, int] | None:
    """(number, place) of the first cell of a record that is none; None where all are."""
    at = number = 0
    while cell := _CELL.match(record, at):
        if cell[1] != ",":
            return None
        at, number = cell.end(), number + 1
    return number, at


def _stray_quote(header: list[str], record: str) -> BadRow:
    record = record.rstrip("\r\n")
    number, at = _no_cell(record) or (len(header), 0)
    got = repr(shortened(record[at:]))
    if '\\"' in record:
        got += ", with a backslash before a quote, which does not escape it in CSV"
    expected = 'a quote only around a whole cell, without a space before it, and doubled ("") within it'
    return BadRow(header[number] if number < len(header) else None, expected, got)
