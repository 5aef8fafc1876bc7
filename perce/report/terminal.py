"""Tables in the terminal: plain, wide enough for whatever they hold, and no text in them is rich's markup."""

from collections.abc import Iterable
from typing import Any

import rich.console
import rich.table
from rich.console import RenderableType
from rich.text import Text

from perce.visible import visible


class Console(rich.console.Console):
    """Rich's, but that a reader who has gone ends the command as any other print does, not with exit code 1."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that it is called for


class Table(rich.table.Table):
    """Rich's, with cells that are shown as they are."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(plain, cells), **options)


def plain(text: str, style: str = "") -> Text:
    """Text as it is: brackets are brackets, and characters that act on a terminal are shown."""
    return Text(visible(text), style)


def show(*parts: RenderableType) -> None:
    """Below each other; paths are not cut."""
    shown = (plain(part) if isinstance(part, str) else part for part in parts)
    Console(highlight=False, soft_wrap=True).print(*shown, sep="\n")


def table(*header: str, numbers: bool = False) -> Table:
    """Without lines; `numbers`: all columns but the first are aligned on the right."""
    made = Table(box=None, pad_edge=False, padding=(0, 2 if numbers else 3, 0, 0))
    for index, column in enumerate(header):
        made.add_column(column, justify="right" if numbers and index else "left", no_wrap=numbers)
    return made


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """A label and a value a row."""
    made = Table(box=None, show_header=False, show_edge=False, pad_edge=False, padding=(0, 3, 0, 0))
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made
