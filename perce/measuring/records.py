"""Resumable JSON Lines files: one finished example per line, and next to the file a description of its run.

FILE             appended to one batch at a time; when a run is resumed, a half-written last line is cut off
FILE.run.json    the model, data and options; records of another run are never mixed with these
.FILE.lock       the lock of the process that uses the file; .FILE.lock.holder names that process
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from perce.errors import UserError, in_one_line
from perce.files.lock import locked
from perce.files.outputs import check_own, in_one_move, written
from perce.visible import as_json


class RecordFile:
    """The records of a run, beginning with those that an interrupted run left. While this context is entered, no other
    process can use the file.

    Args:
        path: the file, or None: records are not saved, and none are resumed.

    Raises:
        UserError: the file cannot be written or read, another process uses it, or it holds records of another run.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self._held = ExitStack()

    def __enter__(self) -> "RecordFile":
        if self.path is not None:
            self._run_path = self.path.with_name(f"{self.path.name}.run.json")
            with written(self.path):
                if self._has_content() and not self._run_path.is_file():
                    raise UserError(f"{self.path}: exists already, and was not written by perce. Choose another file.")
                if not self._has_content():  # otherwise it is compared with this run
                    check_own(self._run_path)
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._held.enter_context(locked(self.path.with_name(f".{self.path.name}.lock"), str(self.path)))
        return self

    def __exit__(self, *raised: object) -> None:
        with written(self.path or ""):  # closing retries what could not be written to a full disk
            self._held.close()

    def begin(self, run: Mapping[str, Any]) -> None:
        """Read the records of an interrupted run. run: what the records depend on; JSON values."""
        if self.path is None:
            return
        facts: dict[str, Any] = json.loads(json.dumps(run))
        with written(self.path):
            if self._has_content():
                self._check_run(facts)
                self.records = self._read()
            else:
                with in_one_move(self._run_path) as unfinished:
                    unfinished.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            self._file = self._held.enter_context(self.path.open("a", encoding="utf-8"))

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write a batch of records at once: an interruption leaves whole batches and at most one broken line."""
        new = list(records)
        self.records += new
        if self.path is not None:
            with written(self.path):
                self._file.write("".join(as_json(record) + "\n" for record in new))
                self._file.flush()

    def _has_content(self) -> bool:
        return self.path is not None and self.path.exists() and self.path.stat().st_size > 0

    def _check_run(self, run: dict[str, Any]) -> None:
        before = _object(self._run_path.read_bytes(), str(self._run_path), f"delete it and {self.path}")
        for name in dict.fromkeys([*run, *before]):
            if before.get(name) != run.get(name):
                raise UserError(
                    f"{self.path}: holds the records of another run ({name} was {before.get(name)!r} and is "
                    f"{run.get(name)!r} now). Choose another file, or delete it and {self._run_path.name}."
                )

    def _read(self) -> list[dict[str, Any]]:
        assert self.path is not None
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        remedy = f"delete the file and {self._run_path.name}"
        records = []
        for number, line in enumerate(whole.splitlines(), start=1):
            records.append(_object(line, f"{self.path}:{number}", remedy))
            if "example" not in records[-1] or records[-1].keys() != records[0].keys():
                raise UserError(
                    f"{self.path}:{number}: expected a record with the same fields as line 1, got "
                    f"{', '.join(records[-1]) or 'none'}. To begin anew, {remedy}."
                )
        return records


def _object(text: bytes, where: str, remedy: str) -> dict[str, Any]:
    """UserError unless this is a JSON object."""
    try:
        content = json.loads(text)
        reason = f"it is {content!r:.40}"
    except ValueError as error:
        content, reason = None, in_one_line(error)
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a JSON object ({reason}). To begin anew, {remedy}.")
    return content
