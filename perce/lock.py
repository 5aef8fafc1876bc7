"""One process at a time: a lock that names its holder and that the system takes back when the holder ends."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from perce.errors import UserError


class InUse(UserError):
    """Another process has the lock."""


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of this file, which stays where it is, empty, when the lock is given back.

    what: how the error begins.

    Raises:
        InUse: another process has it; the message names the process, its machine and since when.
        OSError: there can be no such file.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InUse(f"{what}: in use by {_holder(path)}. Wait for it, stop it, or choose another.") from None
    try:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        with contextlib.suppress(OSError):  # a full disk
            path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}) + "\n")
        yield
    finally:
        with contextlib.suppress(OSError):  # a directory that is gone
            path.write_text("")
        lock.release()


def _read(path: Path) -> dict[str, object]:
    """What the holder says of itself; {} where it has not done so yet."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _holder(path: Path) -> str:
    holder = _read(path)
    if not holder:
        time.sleep(0.2)  # it may be about to write
        holder = _read(path)
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
