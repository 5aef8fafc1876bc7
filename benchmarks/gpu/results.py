"""The results file of a command, which is rewritten after every line, so that no measurement is lost.

    {"schema": 2, "command": …, "machine": {…}, "lines": {KEY: {…}, …}}

A line's key consists of the stage and what is measured, such as "peers/trainable/4096x4096x128256/liger". A later line
with the same key, such as one with more rounds, replaces the earlier one. A line with a "reason" says why there is no
measurement.
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCHEMA = 2
NO_TIME = "not measured: no time left"
Line = dict[str, Any]


class Results:
    """Lines by key, and their file in `directory`, named after the command."""

    def __init__(
        self, command: str, directory: Path, say: Callable[[str], object] | None = None, started: float | None = None
    ):
        self.path = directory / f"{command}.json"
        self.say = say or (lambda line: print(line, flush=True))
        self.log = directory / f"{command}.log"  # standard error of the processes
        self.started = time.monotonic() if started is None else started
        self.lock = threading.Lock()  # stages may run at the same time
        self.tree: dict[str, Any] = {"schema": SCHEMA, "command": command, "machine": {}, "lines": {}}
        directory.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        self._write()

    @property
    def lines(self) -> dict[str, Line]:
        return self.tree["lines"]

    def take_machine(self, machine: dict[str, Any]) -> None:
        with self.lock:
            self.tree["machine"] = machine
            self._write()

    def put(self, key: str, **line: Any) -> None:
        """Writes a line and then prints it, so that every printed line is in the file."""
        with self.lock:
            self.lines[key] = line
            self._write()
            self.say(f"{time.monotonic() - self.started:6.1f} s  {key}: {short(line)}")

    def note(self, text: str) -> None:
        """Appends what a process wrote to standard error."""
        with self.lock, self.log.open("a", encoding="utf-8") as log:
            log.write(text)

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.tree, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def short(line: Line) -> str:
    """A line as it is printed."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, list) and len(value) > 1:
            return f"{len(value)} of them"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{name} {text(x)}" for name, x in value.items()) + "}"
        return str(value)

    return line["reason"] if "reason" in line else ", ".join(f"{name} {text(value)}" for name, value in line.items())
