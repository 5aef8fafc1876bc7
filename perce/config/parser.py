"""argparse as the commands use it: errors are UserErrors, help keeps its lines, an option given twice is told of."""

import argparse
import textwrap
from typing import Any, NoReturn

from perce.errors import UserError
from perce.process import is_first_process
from perce.visible import say


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are UserErrors."""

    def print_help(self, file: Any = None) -> None:
        say(*self.format_help().splitlines())  # argparse itself ignores a broken stdout

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[0].upper()}{message[1:]}. `--help` lists the options.")


class LastOne(argparse.Action):
    """Stores an option's value, the last if it is given several times."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        tell_of_two(self.dest, getattr(namespace, self.dest), values)
        setattr(namespace, self.dest, values)


def tell_of_two(name: str, first: str | None, second: str) -> None:
    """The values are not shown: they may be secrets."""
    if first not in (None, second) and is_first_process():
        say(f"--{name}: given twice; the last value is used", error=True)


class LineByLine(argparse.HelpFormatter):
    """Keeps the lines of a help text apart; the rest of a line that is too long is indented."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        lines, indent = text.splitlines(), "  " if "\n" in text else ""
        return [part for line in lines for part in textwrap.wrap(line, width, subsequent_indent=indent)]
