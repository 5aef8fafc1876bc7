"""Checkpoints that are whole, or passed over: a run goes on from the newest whole one, however it was stopped.

complete.json, written last and in one move, lists every file of a checkpoint with its size. A directory without it, or
with files that are not as listed, was being written or deleted when something stopped the process. Older checkpoints
are deleted only after the list of the new one is there. All that this machine wrote is flushed to the disk before the
list, and the list before anything is deleted, so that a power cut spares the one or the other.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from perce.errors import UserError, in_one_line

if TYPE_CHECKING:
    from transformers import Trainer

LIST = "complete.json"
CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # of file systems on a network, for directories mostly


class SaveError(UserError):
    """A checkpoint that could not be written; earlier ones are untouched."""


def seal(checkpoint: Path) -> None:
    """Declare a checkpoint whole, once every process has written its files."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for path in (*files, *(path for path in checkpoint.rglob("*") if path.is_dir())):
        _flush(path)
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_in_one_move(checkpoint / LIST, json.dumps(sizes, indent=1))
    for directory in (checkpoint, checkpoint.parent):
        _flush(directory)


def write_in_one_move(path: Path, text: str) -> None:
    """The file as it was or as it is to be, never half of it."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    _flush(unfinished)
    os.replace(unfinished, path)


def _flush(path: Path) -> None:
    """Onto the disk, directories too. Windows flushes only what is opened for writing, and no directory."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise
    finally:
        os.close(handle)


def flaw(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole; None if it is."""
    try:
        sizes = json.loads((checkpoint / LIST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {LIST}, which is written last"
    except (OSError, ValueError) as error:
        return f"its {LIST} cannot be read ({error})"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """Every checkpoint-N, whole or not, by N."""
    steps = {path: path.name.partition("-")[2] for path in output_dir.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def newest_whole(output_dir: Path, tell: Callable[[str], None] = lambda _: None) -> Path | None:
    """The last whole checkpoint; `tell` hears of each later one that is passed over, and why."""
    for checkpoint in reversed(checkpoints(output_dir)):
        reason = flaw(checkpoint)
        if reason is None:
            return checkpoint
        tell(f"{checkpoint} is not whole and passed over: {reason}.")
    return None


def resume_point(output_dir: Path) -> str:
    """The newest whole checkpoint, with those that are passed over named on stderr; UserError if there is none."""
    main_process = int(os.environ.get("RANK", 0)) == 0
    found = newest_whole(output_dir, lambda line: print(line, file=sys.stderr) if main_process else None)
    if found is None:
        raise UserError(
            f"--resume: {output_dir} holds no whole checkpoint-N: nothing was saved before it stopped (--save_steps). "
            "Start again with another --output_dir, or delete this one."
        )
    return str(found)


def save_whole(trainer: Trainer, checkpoint: Path, save: Callable[[], None]) -> None:
    """Run `save`, which writes this process's files of a checkpoint, on all processes; then seal it, then rotate.

    Raises:
        SaveError: on every process when one could not write; the half-written directory is removed.
    """
    args = trainer.args
    if args.should_save:
        shutil.rmtree(checkpoint, ignore_errors=True)  # what a stopped process left under this name
    trainer.accelerator.wait_for_everyone()
    limit, args.save_total_limit = args.save_total_limit, None  # the Trainer would delete before the seal
    try:
        _together(trainer, checkpoint, save)
    finally:
        args.save_total_limit = limit
    _together(trainer, checkpoint, lambda: seal(checkpoint) if args.should_save else None)
    if args.should_save and limit:
        _rotate(checkpoint, limit, trainer.state.best_model_checkpoint)


def _together(trainer: Trainer, checkpoint: Path, write: Callable[[], None]) -> None:
    """`write`, and SaveError on all processes if it failed on any."""
    import torch

    failure: Exception | None = None
    try:
        write()
    except Exception as error:
        if not _is_write_failure(error):
            raise
        failure = error
    failures = torch.tensor(float(failure is not None), device=trainer.args.device)
    if trainer.accelerator.reduce(failures, "sum").item():
        if trainer.args.should_save:
            shutil.rmtree(checkpoint, ignore_errors=True)
        raise SaveError(_failed(checkpoint, failure)) from failure


def _rotate(newest: Path, limit: int, best: str | None) -> None:
    """Delete what is not whole, then the oldest, until `limit` remain; never the newest or the best."""
    kept = {newest} | ({Path(best)} if best else set())
    others = [path for path in checkpoints(newest.parent) if path not in kept]
    torn = [path for path in others if flaw(path)]
    whole = sorted((path for path in others if path not in torn), key=lambda path: path.stat().st_mtime)
    for path in torn + whole[: max(len(whole) + len(kept) - limit, 0)]:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(output_dir: Path) -> Iterator[None]:
    """A full or failing disk as one paragraph."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _is_write_failure(error):
            raise
        raise UserError(_failed(output_dir, error)) from error


def _failed(path: Path, error: Exception | None) -> str:
    standing = newest_whole(path.parent if path.name.startswith("checkpoint-") else path)
    remedy = "No checkpoint was saved before. Make room, or choose another --output_dir."
    if standing is not None:
        remedy = f"{standing.name} stands: make room, and --resume goes on from it."
    return f"{path}: could not be written ({_reason(error)}). {remedy}"


def _reason(error: Exception | None) -> str:
    if error is None:
        return "another process could not write"
    if isinstance(error, RuntimeError):  # of positions in the file, not of what the system said
        return "torch wrote a part of a file only; is the disk full?"
    return in_one_line(error)


def _is_write_failure(error: Exception) -> bool:
    """What the system refuses comes in four shapes: Python's, safetensors', tokenizers' and torch's."""
    from safetensors import SafetensorError

    torn = isinstance(error, RuntimeError) and ("inline_container" in str(error) or "StreamWriter" in str(error))
    return isinstance(error, OSError | SafetensorError) or type(error) is Exception or torn
