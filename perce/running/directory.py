"""The directory of a run: claimed by one process at a time, and resumed only as the run that it holds.

.lock            held by the process that writes here now, until it ends; .lock.holder names it
run.json         facts about the run besides its options: a digest of its training pairs, what a step is
config.yaml      its options; a directory with it and run.json holds a run
checkpoint-N/    see training/checkpoints.py
complete.json    written last: the weights of a finished run as they were saved
"""

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perce.config.commands import TRAIN, TrainOptions
from perce.config.options import number
from perce.config.yaml_file import dump_yaml, read_yaml
from perce.errors import UserError, in_one_line
from perce.files.integrity import read_object
from perce.files.lock import InUse, locked
from perce.files.runs import BASE_NAME, CONFIG_NAME, HELD_OUT_NAME, MERGED, lacking
from perce.files.runs import FACTS_NAME as FACTS
from perce.training.checkpoints import (
    LIST,
    SAVED,
    WEIGHTS,
    checkpoints,
    damage,
    never_saved,
    resume_point,
    seal,
    step_of,
    write_in_one_move,
)
from perce.visible import in_short

LOCK = ".lock"
MAY_CHANGE = frozenset(
    (
        "resume", "output_dir", "eval_steps", "save_steps", "logging_steps", "report_examples", "merge_adapter",
        # The length of training: from then on the schedule is that of the new length.
        "max_steps", "num_train_epochs",
        # How a step is divided and computed: the result is the same up to rounding. What a step is, is in FACTS.
        "per_device_train_batch_size", "gradient_accumulation_steps", "packing", "precision", "attn_implementation",
        "backend", "activation_checkpointing", "activation_offload", "mlp_tile", "share",
        "branches_per_forward",
    )
)  # fmt: skip
"""Options that may change when a run is resumed: they do not change what is trained, on which data, in which order."""
MAY_CHANGE_OF_TRAINER = (
    "log", "save_", "report_to", "run_name", "project", "trackio", "hub_", "push_to_hub", "disable_tqdm", "use_cpu",
    "eval_on_start", "dataloader_num_workers", "dataloader_p", "ddp_", "torch_compile", "tf32", "skip_memory_metrics",
)  # fmt: skip
"""Beginnings of the names of TrainingArguments fields that may change likewise."""

WRITTEN = (
    *SAVED, *(f"{MERGED}/{name}" for name in SAVED), CONFIG_NAME, FACTS, HELD_OUT_NAME, BASE_NAME, LIST,
    "trainer_state.json", "training_args.bin", "before.pt", "curves.png", "report.html",
)  # fmt: skip
"""The files that a run writes, besides checkpoints."""


@dataclass(frozen=True)
class Claim:
    """A directory that is this process's until it ends, and what is to be done there."""

    output_dir: Path
    checkpoint: Path | None = None
    """The checkpoint to resume from; None: training starts from the beginning."""
    note: str = ""
    """What the user is told about it."""
    finished: bool = False


def would_replace(path: Path) -> list[str]:
    """Files in a directory that a run would replace. Those that a stopped attempt at a run left do not count."""
    with contextlib.suppress(OSError):
        if lacking(path) == CONFIG_NAME and b'"training_pairs"' in (path / FACTS).read_bytes():
            return []
    return sorted({str(file.relative_to(path)) for name in WRITTEN for file in path.glob(name) if file.is_file()})


def numbered(name: str) -> Iterator[Path]:
    """runs/NAME, runs/NAME-2, …"""
    yield Path("runs") / name
    yield from (Path("runs") / f"{name}-{number}" for number in itertools.count(2))


def free_directory(name: str) -> Path:
    """The first of the numbered directories that holds neither a run nor files that one would replace."""
    return next(path for path in numbered(name) if not would_replace(path))


@contextlib.contextmanager
def claimed(config: TrainOptions, name: str | None = None) -> Iterator[Claim]:
    """The run directory, locked, writable and not another run's; checked before anything expensive happens.

    name: use the first free directory of this name instead of config.run.output_dir.

    Raises:
        UserError: another process writes to the directory, or it holds another run than the one asked for.
    """
    from perce.training.parallel import found_by_first  # imports torch

    with contextlib.ExitStack() as stack:
        yield found_by_first(lambda: _claim(config, name, stack))


def _claim(config: TrainOptions, name: str | None, stack: contextlib.ExitStack) -> Claim:
    if name is None:
        path = Path(config.run.output_dir or "")
        stack.enter_context(_lock(path))
        return _what_to_do(config, path)
    for path in numbered(name):
        with contextlib.suppress(InUse), contextlib.ExitStack() as attempt:
            attempt.enter_context(_lock(path))
            if not would_replace(path):
                stack.enter_context(attempt.pop_all())
                return _what_to_do(config, path)
    raise AssertionError("there is always a number left")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Make the directory if need be and lock it. A directory made here is removed afterwards if it stayed empty."""
    made = list(itertools.takewhile(lambda directory: not directory.exists(), (path, *path.parents)))
    with contextlib.ExitStack() as held:
        held.callback(_remove_empty, made)
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
            held.enter_context(locked(path / LOCK, f"--output_dir {path}"))
            if made:
                held.callback(_unlink_alone, path)
        except OSError as error:
            raise UserError(
                f"--output_dir {path}: cannot be written to ({error.strerror or error}). Choose a directory that you "
                "can write to."
            ) from error
        yield


def _unlink_alone(directory: Path) -> None:
    """Remove the lock file if nothing else is there. The lock is still held, and nobody waits for it, so nobody is left
    with a lock on a removed file."""
    with contextlib.suppress(OSError):
        if all(file.name.startswith(LOCK) for file in directory.iterdir()):
            (directory / LOCK).unlink()


def _remove_empty(directories: list[Path]) -> None:
    with contextlib.suppress(OSError):  # ends at the first that is not empty
        for directory in directories:
            directory.rmdir()


def _what_to_do(config: TrainOptions, path: Path) -> Claim:
    """What is to be done in a locked directory: begin, begin again, resume, or nothing."""
    missing, saved = lacking(path), checkpoints(path)
    if saved and missing:
        raise UserError(
            f"--output_dir {path}: holds {saved[-1].name} of a run whose {missing} is gone. Put that back to "
            "resume it, or choose another directory."
        )
    if missing and (others := would_replace(path)):
        raise UserError(
            f"--output_dir {path}: holds {in_short(others)}, which a run would replace, but no run of perce. Choose "
            "another directory."
        )
    if not missing and not config.run.resume:
        raise UserError(
            f"--output_dir {path}: holds a run already. Continue it with --resume, or choose another directory."
        )
    if missing:
        return Claim(path)
    changes = _changes(path, config)
    note = "".join(f"; {name} {now} ({before} when it began)" for name, (before, now) in changes.items())
    if not changes and damage(path) is None:
        return Claim(path, finished=True, note=f"{path} is finished: {step_of(path)} steps. Nothing is left to do.")
    if (path / LIST).exists() and not saved:
        reason = damage(path) or "an option has changed"
        raise UserError(
            f"--resume: {path} is finished and has no checkpoint to continue from ({reason}). Leave it as it is, or "
            "start a new run with another --output_dir."
        )
    if never_saved(path):
        return Claim(path, note=f"{path} stopped before its first checkpoint and begins again{note}")
    checkpoint = resume_point(path)
    return Claim(path, checkpoint, note=f"{path} is resumed from {checkpoint.name}{note}")


def _changes(path: Path, config: TrainOptions) -> dict[str, tuple[Any, Any]]:
    """{option: (its value when the run began, its value now)}; UserError for a change that makes it another run."""
    try:
        saved = TRAIN.build(read_yaml(str(path / CONFIG_NAME))).to_dict()
    except UserError as error:
        raise UserError(f"{path / CONFIG_NAME}: the options of the run cannot be read: {error}") from error
    now = config.to_dict()
    # An option that is None now, as in a recipe that leaves it to perce, keeps its old value.
    differing = [name for name in {**saved, **now} if number(now.get(name)) not in (None, number(saved.get(name)))]
    for name in differing:
        of_trainer = name in config.extra and name.startswith(MAY_CHANGE_OF_TRAINER)
        order = name == "dataloader_num_workers" and config.data.streaming
        if name == "num_train_epochs" and config.run.max_steps > 0:
            raise UserError(f"--resume: num_train_epochs has no effect with max_steps {config.run.max_steps}.")
        if order or not (name in MAY_CHANGE or of_trainer):
            raise UserError(
                f"--resume: {name} is {now[name]!r} now and was {saved.get(name, 'not given')!r} when the run began. "
                "Leave it as it was, or start a new run."
            )
    shown = [name for name in differing if name not in ("resume", "output_dir")]
    return {name: (saved.get(name, "not given"), now[name]) for name in shown}


def begin(claim: Claim, config: TrainOptions, facts: Mapping[str, Any], kept: Mapping[str, str | None]) -> None:
    """Write the run's options and facts before its first step here. `kept`: texts of other files by name; None: delete
    this file."""
    for name, text in {LIST: None, FACTS: json.dumps(facts, indent=1) + "\n", **kept}.items():
        if text is None:
            (claim.output_dir / name).unlink(missing_ok=True)
        else:
            write_in_one_move(claim.output_dir / name, text)
    recorded = replace(config, run=replace(config.run, resume=False))
    write_in_one_move(claim.output_dir / CONFIG_NAME, dump_yaml(recorded.to_dict()))


def check_facts(claim: Claim, facts: Mapping[str, Any], steps: int) -> None:
    """UserError if a run that is resumed would be trained on other pairs, in other steps, or to an earlier end.

    steps: of the whole run.
    """
    if claim.checkpoint is None:
        return
    path = claim.output_dir / FACTS
    try:
        before = read_object(path, *facts)
    except (OSError, ValueError) as error:
        what = f"--resume: {path} cannot be read ({in_one_line(error)})"
        raise UserError(f"{what}. Put it back, or start a new run.") from error
    differing = {name: (before[name], now) for name, now in facts.items() if before[name] != now}
    for name, (then, now) in differing.items():
        if name in ("step", "steps_an_epoch"):
            what = "a step" if name == "step" else "the number of steps per epoch"
            raise UserError(
                f"--resume: {what} is {now} now, and was {then} when the run began (all processes together; "
                f"{os.environ.get('WORLD_SIZE', 1)} now). Set --gradient_accumulation_steps, "
                "--per_device_train_batch_size and --share so that it is the same."
            )
        device = ", or the device has: without --eval_examples a CPU evaluates fewer" if "validation" in name else ""
        raise UserError(
            f"--resume: the {name.replace('_', ' ')} are not those that the run began with: the rows or the tokenizer "
            f"have changed{device}. Put them back, or start a new run."
        )
    if steps < (step := step_of(claim.checkpoint)):
        raise UserError(
            f"--resume: the run would end after {steps} steps, and has been trained to step {step} already."
        )


def finish(output_dir: Path) -> None:
    """Declare the run finished: everything has been written."""
    weights = [file for name in (*WEIGHTS, "*.bin") for file in output_dir.glob(name)]
    seal(output_dir, [*weights, output_dir / "trainer_state.json"])
