"""Runs the stages of a command, one after the other, each in a process of its own under a time limit.

The processes of the next stage start, and import what they need, while the current one runs: on a new machine, the
imports of torch and transformers in every stage would take a fifth of the time.

If a process crashes, or prints nothing for `patience` seconds, the line that it had begun gets the reason, and another
process continues without that line. A stage ends at the latest `until` seconds after the command's start; the next
stage gets the time that it does not need. Stages of one row run at the same time.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.gpu.child import Request
from benchmarks.gpu.results import NO_TIME, Line, Results

ROOT = Path(__file__).parents[2]
ATTEMPTS = 6  # processes per stage
GRACE = 5.0  # seconds between the time limit that a process is given and the time at which it is stopped


@dataclass
class Stage:
    """A stage's module, which runs in one process or several in sequence, and its limits."""

    name: str
    module: str
    """Run as `python -m MODULE - DEVICE`, with the request on standard input."""
    until: float
    """Seconds after the command's start."""
    patience: float = 30.0
    grace: float = GRACE
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def environment(device: str) -> dict[str, str]:
    """The environment of the processes; Triton's interpreter is on only for a CPU."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return variables if device == "cuda" else variables | {"TRITON_INTERPRET": "1"}


class Process:
    """One process of a stage. It can be started early: it imports what it needs and waits for its request."""

    alive: ClassVar["set[Process]"] = set()

    def __init__(self, stage: Stage, device: str):
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the process
        self.popen = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", stage.module, "-", device], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.stderr, text=True, encoding="utf-8", start_new_session=True,
            env=environment(device) | stage.environment,
        )  # fmt: skip
        self.heard: queue.Queue[str | None] = queue.Queue()
        self.alive.add(self)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.heard.put(line)
        self.heard.put(None)

    def ask(self, request: Request) -> None:
        assert self.popen.stdin is not None
        with suppress(BrokenPipeError):  # it ended already; run_once reads why
            self.popen.stdin.write(request.as_argument())
            self.popen.stdin.close()

    def said(self) -> str:
        """All that it wrote to standard error."""
        self.stderr.seek(0)
        return self.stderr.read().decode(errors="replace")

    def last_words(self) -> str:
        lines = [line.strip() for line in self.said().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "without a word"

    def stop(self) -> None:
        """Ends this process and those that it started."""
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.popen.kill()
        self.popen.wait()
        self.alive.discard(self)


@dataclass
class Ending:
    """How one process ended."""

    begun: str | None = None
    """The key of the line that it had begun and not finished."""
    reason: str | None = None
    """Why it ended early; None if it completed."""
    first_line: float | None = None
    """When its first line arrived."""


def says_less(line: Line, known: Line | None) -> bool:
    """Whether a line has less than what an earlier process measured: it had no time, or has fewer rounds."""
    if known is None or "reason" in known:
        return False
    return line.get("reason") == NO_TIME or len(line.get("rounds", [])) < len(known.get("rounds", []))


def run_once(stage: Stage, process: Process, request: Request, results: Results, deadline: float) -> Ending:
    """Reads one process to its end. Its lines go to the results, their keys to `request.finished`."""
    ending = Ending()
    process.ask(request)
    try:
        while True:
            left = deadline - time.monotonic()
            try:
                text = process.heard.get(timeout=max(0.1, min(stage.patience, left)))
            except queue.Empty:
                late = time.monotonic() >= deadline
                ending.reason = NO_TIME if late else f"nothing heard for {stage.patience:.0f} s"
                return ending
            if text is None:
                ending.reason = f"the process ended with {process.popen.wait()}: {process.last_words()}"
                return ending
            try:
                event = json.loads(text)
            except ValueError:  # printed by a library while it was imported
                results.note(text)
                continue
            if "done" in event:
                ending.begun = None
                return ending
            if "begin" in event:
                ending.begun = event["begin"]
            elif "machine" in event:
                results.take_machine(event["machine"])
            else:
                key, partial = event.pop("line"), event.pop("partial", False)
                if not says_less(event, results.lines.get(key)):
                    results.put(key, **event)
                ending.first_line = ending.first_line or time.monotonic()
                if not partial:
                    request.finished.append(key)
                ending.begun = None
    finally:
        process.stop()
        results.note(process.said())


def run_stage(stage: Stage, process: Process, results: Results, device: str) -> None:
    """Runs a stage until it is done or its time is over, even if lines fail, with at most ATTEMPTS processes."""
    deadline, began, heard = results.started + stage.until, time.monotonic(), None
    request = Request(stage.name, 0.0, device, not results.tree["machine"], options=stage.options)
    for attempt in range(ATTEMPTS):
        request.seconds = deadline - stage.grace - time.monotonic()
        if request.seconds <= 0:
            if attempt == 0:
                results.put(f"{stage.name}/process", reason=NO_TIME)
            break
        ending = run_once(stage, process if attempt == 0 else Process(stage, device), request, results, deadline)
        heard = heard or ending.first_line
        if ending.reason is None:
            break
        key = ending.begun or f"{stage.name}/process"
        if ending.reason == NO_TIME:  # an earlier measurement under this key is kept
            if key not in results.lines:
                results.put(key, reason=NO_TIME)
            break
        results.put(key, reason=ending.reason)
        if ending.begun is None and not request.finished:
            if attempt:
                break  # it fails at every start
            continue  # its first process was started early, when another one may have held the GPU's memory
        request.lost[key] = ending.reason
    process.stop()
    spent = {"seconds": time.monotonic() - began} | ({"until_first_line": heard - began} if heard else {})
    results.put(f"stages/{stage.name}", **{name: round(seconds, 2) for name, seconds in spent.items()})


def run(rows: list[list[Stage]], results: Results, device: str = "cuda") -> None:
    """Runs all stages, row after row, those of a row at the same time. Processes start together with the row before."""
    waiting = [Process(stage, device) for stage in rows[0]] if rows else []
    try:
        for row, following in zip(rows, [*rows[1:], []], strict=True):
            now, waiting = waiting, [Process(stage, device) for stage in following]
            threads = [
                threading.Thread(target=run_stage, args=(stage, process, results, device))
                for stage, process in zip(row, now, strict=True)
            ]
            for thread in threads:
                thread.daemon = True
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        for process in list(Process.alive):
            process.stop()
