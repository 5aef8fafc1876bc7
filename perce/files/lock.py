"""A lock for one process at a time, which names its holder and which the system releases when the holder ends."""

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

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # errors of file systems without locks, mostly on networks


class InUse(UserError):
    """Another process has the lock."""


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold filelock's lock on this file; FILE.holder next to it names the process that has the lock.

    what: the text that an error begins with.

    Raises:
        InUse: another process has the lock; the message names the process, its machine and the time it began.
        UserError: the file system, or the operating system, has no locks.
        OSError: the file cannot be created.
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
    """The content of the holder file; {} if the holder has not written it yet."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _named(path: Path) -> str:
    """A phrase that names the holder."""
    holder = _read(path)
    if not holder:
        time.sleep(0.2)  # it may be about to write
        holder = _read(path)
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
