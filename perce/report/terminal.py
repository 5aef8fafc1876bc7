"""Tables in the terminal: plain, wide enough for whatever they hold."""

from collections.abc import Iterable

import rich.console
from rich.console import RenderableType
from rich.table import Table


class Console(rich.console.Console):
    """Rich's, but that a reader who has gone ends the command as any other print does, not with exit code 1."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that it is called for


def show(*parts: RenderableType) -> None:
    """Below each other; paths are not cut."""
    Console(highlight=False, soft_wrap=True).print(*parts, sep="\n")


def table(*header: str, numbers: bool = False) -> Table:
    """Without lines; `numbers`: all columns but the first are aligned on the right."""
    made = Table(box=None, pad_edge=False, padding=(0, 2 if numbers else 3, 0, 0))
    for index, column in enumerate(header):
        made.add_column(column, justify="right" if numbers and index else "left", no_wrap=numbers)
    return made


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """A label and a value a row."""
    made = Table.grid(padding=(0, 3, 0, 0))
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made
