"""Checkpoints are either whole or skipped: a run continues from the newest whole one, however it was stopped.

complete.json, written last and in one move, lists every file of a checkpoint with its size and a digest of its content.
A directory without it, or with files that are not as listed, was being written or deleted when something stopped the
process, or has been damaged since. Older checkpoints are deleted only after the list of the new one is there. All that
this machine wrote is flushed to the disk before the list, and the list before anything is deleted, so that a power cut
leaves the old checkpoint or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perce.errors import UserError, in_one_line
from perce.files.integrity import LIST, difference, read_object, sizes_and_digests
from perce.files.outputs import in_one_move
from perce.visible import say

if TYPE_CHECKING:
    from transformers import Trainer

CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # from network file systems, mostly for directories


WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors")
SAVED = (
    *WEIGHTS, "model.safetensors.index.json", "README.md", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
"""The files that a model, an adapter and a tokenizer are saved as, and the card: only these are uploaded. Other files
of a run hold rows of its data, names of users and paths. adapter_config.json may hold the path of the base model, and a
checkpoint that is uploaded whole (--hub_strategy checkpoint) the paths of the run."""


class SaveError(UserError):
    """A checkpoint that could not be written; earlier ones are untouched."""


def model_files(directory: Path) -> list[str]:
    """Those of SAVED that a directory has."""
    return [path.relative_to(directory).as_posix() for name in SAVED for path in directory.glob(name)]


def seal(directory: Path, files: Iterable[Path] | None = None) -> None:
    """Declare a checkpoint whole, once every process has written its files. `files`: list these files only."""
    listed = sorted(path for path in directory.rglob("*") if path.is_file()) if files is None else sorted(files)
    for path in (*listed, *(path for path in directory.rglob("*") if path.is_dir() and files is None)):
        _flush(path)
    found = sizes_and_digests(directory, (path for path in listed if path.name != LIST))
    write_in_one_move(directory / LIST, json.dumps(found, indent=1))
    for flushed in (directory, directory.parent):
        _flush(flushed)


def write_in_one_move(path: Path, text: str) -> None:
    """Write a file to the disk such that it always has the old text or the new one, never a part."""
    with in_one_move(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
        _flush(unfinished)


def _flush(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise
    finally:
        os.close(handle)


def damage(directory: Path, contents: bool = True) -> str | None:
    """What differs from the directory's list; None if nothing does. `contents`: read every file, not only its size."""
    try:
        return difference(directory, read_object(directory / LIST), contents)
    except FileNotFoundError:
        return f"it has no {LIST}, which is written last"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its {LIST} cannot be read ({in_one_line(error)})"


def flaw(checkpoint: Path) -> str | None:
    """Why a run cannot be resumed from a checkpoint; None if it can."""
    if reason := damage(checkpoint):
        return reason
    names = list(read_object(checkpoint / LIST))
    by_deepspeed = any(name.startswith("global_step") for name in names)  # which includes optimiser and schedule
    parts = {
        "trainer_state.json": "trainer_state.json" in names,
        "optimizer.pt": any("optim" in name for name in names),
        "scheduler.pt": "scheduler.pt" in names or by_deepspeed,
        "rng_state.pth": any(name.startswith("rng_state") for name in names),
    }
    lacking = next((name for name, present in parts.items() if not present), None)
    return lacking and f"it was saved without {lacking}, which a resume needs"


def state_of(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's state that a checkpoint holds."""
    return read_object(checkpoint / "trainer_state.json")


def step_of(checkpoint: Path) -> int:
    """The number of steps that had been made when it was saved."""
    return int(state_of(checkpoint)["global_step"])


def checkpoints(output_dir: Path) -> list[Path]:
    """Every checkpoint-N, whole or not, sorted by N."""
    steps = {path: path.name.partition("-")[2] for path in output_dir.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def newest_whole(output_dir: Path, tell: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest whole checkpoint. `tell` is called with each later one that is skipped, and why."""
    for checkpoint in reversed(checkpoints(output_dir)):
        reason = flaw(checkpoint)
        if reason is None:
            return checkpoint
        tell(f"{checkpoint} is not whole and is skipped: {reason}.")
    return None


def resume_point(output_dir: Path) -> Path:
    """The newest whole checkpoint; those that are skipped are named on stderr. UserError if there is none."""
    found = newest_whole(output_dir, lambda line: say(line, error=True))
    if found is None:
        raise UserError(
            f"--resume: {output_dir} holds no whole checkpoint-N (above: what is wrong with those that are there; "
            "--save_only_model leaves none). Start again with another --output_dir, or delete this one."
        )
    return found


def check_whole(checkpoint: Path) -> None:
    """UserError for a checkpoint that a run cannot be resumed from."""
    if reason := flaw(checkpoint):
        raise UserError(f"{checkpoint}: cannot be resumed from, because {reason}. Give another checkpoint.")


def never_saved(output_dir: Path) -> bool:
    """Whether no checkpoint has ever been finished there, so that its run can begin again without losing anything."""
    return not any((checkpoint / LIST).exists() for checkpoint in checkpoints(output_dir))


def save_whole(trainer: Trainer, checkpoint: Path, *saves: Callable[[], None]) -> None:
    """Run `saves`, which write this process's files of a checkpoint, on all processes; each save begins when all
    processes are done with the one before. Then seal the checkpoint, then delete old ones.

    Raises:
        SaveError: on every process when one could not write; the half-written directory is removed.
    """
    args = trainer.args
    if args.should_save:
        shutil.rmtree(checkpoint, ignore_errors=True)  # what a stopped process left under this name
    trainer.accelerator.wait_for_everyone()
    limit, args.save_total_limit = args.save_total_limit, None  # the Trainer would delete old ones before the seal
    try:
        for save in saves:
            _together(trainer, checkpoint, save)
    finally:
        args.save_total_limit = limit
    _together(trainer, checkpoint, lambda: seal(checkpoint) if args.should_save else None)
    if args.should_save and limit:
        _rotate(checkpoint, limit, trainer.state.best_model_checkpoint)


def _together(trainer: Trainer, checkpoint: Path, write: Callable[[], None]) -> None:
    """Run `write`. If it fails on any process, it fails on all: with SaveError on the others and if the disk was at
    fault, else with the process's own error."""
    import torch

    failure: Exception | None = None
    try:
        write()
    except Exception as error:
        failure = error
    failures = torch.tensor(float(failure is not None), device=trainer.args.device)
    if trainer.accelerator.reduce(failures, "sum").item():
        if trainer.args.should_save:
            shutil.rmtree(checkpoint, ignore_errors=True)
        if failure is not None and not _is_write_failure(failure):
            raise failure
        raise SaveError(_failed(checkpoint, failure)) from failure


def _rotate(newest: Path, limit: int, best: str | None) -> None:
    """Delete checkpoints that are not whole, then the oldest, until `limit` remain; never the newest or the best."""
    kept = {newest} | ({Path(best)} if best else set())
    others = [path for path in checkpoints(newest.parent) if path not in kept]
    torn = [path for path in others if damage(path, contents=False)]
    whole = [path for path in others if path not in torn]
    for path in torn + whole[: max(len(whole) + len(kept) - limit, 0)]:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(output_dir: Path) -> Iterator[None]:
    """Turn the error of a full or failing disk into a UserError."""
    try:
        yield
    except Exception as error:
        if not _is_write_failure(error):
            raise
        raise UserError(_failed(output_dir, error)) from error


def _failed(path: Path, error: Exception | None) -> str:
    standing = newest_whole(path.parent if path.name.startswith("checkpoint-") else path)
    remedy = "No checkpoint was saved before. Make room, or choose another --output_dir."
    if standing is not None:
        remedy = f"{standing.name} is whole: make room, and --resume continues from it."
    return f"{path}: could not be written ({_reason(error)}). {remedy}"


def _reason(error: Exception | None) -> str:
    if error is None:
        return "another process could not write"
    if isinstance(error, RuntimeError):  # it names positions in the file, not the system's error
        return "torch wrote only a part of a file; is the disk full?"
    return in_one_line(error)


def _is_write_failure(error: Exception) -> bool:
    """Whether the system refused a write, which Python, safetensors, tokenizers and torch (twice) raise differently."""
    from safetensors import SafetensorError

    of_torch = ("inline_container", "StreamWriter", "basic_ios")
    torn = isinstance(error, RuntimeError) and any(part in str(error) for part in of_torch)
    return isinstance(error, OSError | SafetensorError) or type(error) is Exception or torn
