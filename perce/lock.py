"""One process at a time: a lock that names its holder and that the system takes back when the holder ends."""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from perce.errors import UserError, in_one_line

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of file systems on a network, as a rule


class InUse(UserError):
    """Another process has the lock."""


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of this file, which is filelock's own; beside it FILE.holder names the process that has it.

    what: how the error begins.

    Raises:
        InUse: another process has it; the message names the process, its machine and since when.
        UserError: the file system, or the system, has no locks.
        OSError: there can be no such file.
    """
    lock, holder = FileLock(path), path.with_name(f"{path.name}.holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InUse(f"{what}: in use by {_named(holder)}. Wait for it, stop it, or choose another.") from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in WITHOUT_LOCKS:
            raise
        reason = getattr(error, "strerror", None) or in_one_line(error)
        raise UserError(f"{what}: {path} cannot be locked ({reason}). Choose a place on a local disk.") from error
    try:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        with contextlib.suppress(OSError):  # a full disk
            holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}) + "\n")
        yield
    finally:
        with contextlib.suppress(OSError):  # a directory that is gone
            holder.unlink()
        lock.release()


def _read(path: Path) -> dict[str, object]:
    """What the holder says of itself; {} where it has not done so yet."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _named(path: Path) -> str:
    """The holder, in words."""
    holder = _read(path)
    if not holder:
        time.sleep(0.2)  # it may be about to write
        holder = _read(path)
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
