"""Files that commands write: whether they may be written, found before anything is computed; each is written in one
move, and has the permissions of the umask."""

import contextlib
import os
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from perce.errors import UserError, in_one_line
from perce.visible import as_json

# Each is at the beginning of files of one kind that commands write, and may write again.
MARKS_OF_PERCE = (
    b'<meta name="generator" content="perce">',
    b'"kind": "perce.',
    b'"assistant", "content": {"token_ids":',
    b'{\n  "command": "score",',
    b'{\n  "command": "evaluate",',
)
BEGINNING = 300  # bytes in which it is


def check_writable(*outputs: str | None) -> None:
    """UserError for an output file that cannot be written, or would replace a file that is not perce's; its directories
    are made."""
    for path in filter(None, outputs):
        file = Path(path).expanduser()
        with written(path):
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                file.open("a").close()
            check_own(file)
            if not _is_special(file):
                file = Path(os.path.realpath(file))
                with tempfile.TemporaryDirectory(dir=file.parent) as directory:
                    Path(directory, file.name).touch()  # the name may be too long for this file system


def check_own(path: Path) -> None:
    """UserError for a file that has a content, and not that of a file of perce's."""
    if path.is_file():
        with path.open("rb") as file:
            beginning = file.read(BEGINNING)
        if beginning and not any(mark in beginning for mark in MARKS_OF_PERCE):
            raise UserError(f"{path}: exists already, and was not written by perce. Choose another file.")


@contextlib.contextmanager
def written(path: str | Path) -> Iterator[None]:
    """Put around code that writes this file: a UserError for a full disk, or whatever else the system refuses."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or in_one_line(error)
        raise UserError(f"{path}: cannot be written to ({reason}). Make room, or choose another file.") from error


@contextlib.contextmanager
def in_one_move(path: Path) -> Iterator[Path]:
    """A path to write the new content of this file to, which then replaces the file: it is never half written."""
    if _is_special(path):
        yield path
        return
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    try:
        yield unfinished
        if path.exists():
            shutil.copymode(path, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Write a result. UserError for a file that cannot be written."""
    file = Path(path).expanduser()
    with written(path), in_one_move(file) as unfinished:
        unfinished.write_text(as_json(content, indent=1) + "\n", encoding="utf-8")


def _unfinished(path: Path) -> Path:
    """A path in the file's directory for this process only; files that killed processes left there are deleted."""
    import psutil

    # The process ids are only valid on this machine, and another one may write to the same disk.
    of_file = f"{zlib.crc32(f'{socket.gethostname()} {path.name}'.encode(errors='replace')):08x}"
    for left in path.parent.glob(f".*.unfinished-{of_file}-*"):
        if not psutil.pid_exists(int(left.name.rpartition("-")[2])):
            left.unlink(missing_ok=True)
    # The parts that may differ come after the last dot, because torch writes the name before it into the file.
    return path.with_name(f".{path.name[:40]}.unfinished-{of_file}-{os.getpid()}")


def _is_special(path: Path) -> bool:
    """Whether the path is /dev/stdout, a pipe or the like, which is written to directly."""
    return path.exists() and not path.is_file()


def let_umask_decide(directory: Path) -> None:
    """Give the weights in a directory the permissions of the umask: safetensors lets only their owner read them."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in directory.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # a file system without modes
            file.chmod(0o666 & ~umask)
