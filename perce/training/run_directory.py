"""The directory of a run: found free or claimed before anything expensive happens, and resumed from."""

import os
import tempfile
from pathlib import Path

from perce.config.commands import TrainOptions
from perce.config.options import read_yaml
from perce.config.schema import CONFIG_NAME
from perce.errors import UserError
from perce.training.checkpoints import resume_point


def free_directory(name: str) -> Path:
    """runs/NAME, or runs/NAME-2 … where runs are."""
    number, path = 1, Path("runs") / name
    while (path / CONFIG_NAME).exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path


def claim_directory(config: TrainOptions) -> Path:
    """The run directory, made, writable and not another run's: found out before anything expensive happens."""
    path = Path(config.run.output_dir or "")
    holds_run = (path / CONFIG_NAME).exists()
    if int(os.environ.get("RANK", 0)) == 0 and not config.run.resume and holds_run:
        raise UserError(
            f"--output_dir {path}: holds a run already. Continue it with --resume, or choose another directory."
        )
    if config.run.resume and not holds_run:
        raise UserError(f"--resume: {path} holds no run ({CONFIG_NAME} is missing). Was --output_dir mistyped?")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"--output_dir {path}: cannot be written to ({error.strerror}). Choose a directory you can write to."
        ) from error
    return path


def last_checkpoint(config: TrainOptions, output_dir: Path) -> str:
    """The latest whole checkpoint; UserError if there is none, or it is of another model than is asked for now."""
    saved = read_yaml(str(output_dir / CONFIG_NAME))
    for name, now in vars(config.model).items():
        if saved.get(name, now) != now and name not in ("precision", "attn_implementation", "backend"):
            raise UserError(
                f"--resume: {name} is {now!r} now and was {saved[name]!r} when the run began. Leave it as it was, or "
                "start a new run."
            )
    return resume_point(output_dir)
