"""Reads CSV strictly by RFC 4180: commas between cells, quotes only around a whole cell, and quotes within it doubled.

Python's csv accepts any other quote in some way, and may swallow all rows up to the next quote. Here such a quote makes
its own line a BadRow, and the lines after it are read as usual.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from pathlib import Path
from typing import IO, Any

from perce.errors import UserError
from perce.reading import readers
from perce.reading.readers import BadRow, Placed, check_is_text, check_names, too_long
from perce.visible import shortened

_CELL = re.compile(r'(?:"[^"]*(?:""[^"]*)*"|(?![ \t]*")[^,\r\n]*(?<!"))(,|\r?\n?\Z)')
_NO_VALUE = ("", "NULL", r"\N")  # the last two are what databases write
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}


class _Lines:
    """Lines of a file. Remembers the lines of the current record, and can put back all of them except the first."""

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
    csv.field_size_limit(readers.ROW_LIMIT)  # a long profile exceeds the default of 128 KiB per cell
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
            elif row:  # a row whose cells are all empty counts as an empty line
                yield f":{line}", row
            line += len(lines.record)


def _header(path: Path, line: int, names: list[str]) -> list[str]:
    """The names of the columns; UserError for another separator, spaces around a name, or the same name twice."""
    (only, *others) = names
    if not others and (found := [mark for mark in _SEPARATORS if mark in only]):
        raise UserError(
            f"{path}:{line}: expected commas between the cells, got {_SEPARATORS[found[0]]}, which spreadsheets write "
            "in some languages. Save the file with commas, or convert it with pandas: "
            f"pd.read_csv(OLD, sep={found[0]!r}{_encoding(path)}).to_csv(NEW, index=False)."
        )
    if not others and only.lstrip().startswith("{"):
        raise UserError(f"{path}: expected CSV, got JSON Lines. Give the file a name that ends in .jsonl.")
    if spaced := [name for name in names if name != name.strip()]:
        raise UserError(
            f"{path}:{line}: expected no spaces around the names in the header, got {shortened(spaced[0])!r}. Write "
            "the file without spaces next to its commas: a quote after such a space quotes nothing."
        )
    check_names(names, f"{path}:{line}")
    return names


def _encoding(path: Path) -> str:
    """The argument that pandas needs for a file that is not UTF-8: spreadsheets usually write Windows-1252."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            while file.read(readers.PIECE):
                pass
        except UnicodeDecodeError:
            return ", encoding='cp1252'"
    return ""


def _cells(header: list[str], cells: list[str], record: str) -> dict[str, Any] | BadRow:
    """A row as {name: cell}, empty if all its cells are empty; or a BadRow."""
    if '"' in record and _no_cell(record):
        return _stray_quote(header, record)
    if len(cells) != len(header):
        return BadRow(None, f"{len(header)} cells, as in the header", f"{len(cells)}")
    row = {name: None if cell in _NO_VALUE else cell for name, cell in zip(header, cells, strict=True) if name}
    return row if any(row.values()) else {}


def _no_cell(record: str) -> tuple[int, int] | None:
    """(number, place) of the first cell of a record that is not well formed; None if all are."""
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
        got += ", with a backslash before a quote, which does not escape the quote in CSV"
    expected = 'quotes only around a whole cell, without a space before them, and doubled ("") within the cell'
    return BadRow(header[number] if number < len(header) else None, expected, got)
