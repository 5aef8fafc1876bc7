"""The files of a run directory that are read later, and how such a directory is recognised."""

import re
from pathlib import Path

CONFIG_NAME = "config.yaml"  # the resolved options
FACTS_NAME = "run.json"  # facts of the run that are not options; written before config.yaml
HELD_OUT_NAME = "held_out.json"  # the held-out users, of a run on data without a validation split
BASE_NAME = "base.json"  # the base model, of a run that trains an adapter
MERGED = "merged"  # the model that --merge_adapter saves


def run_directory(model: str | None) -> Path | None:
    """The run directory that holds a model: the model's own, or the one above merged/ or checkpoint-N/; else None."""
    if model is None:
        return None
    path = Path(model).expanduser().resolve()
    return next((run for run in (path, holder_of(path)) if lacking(run) is None), None)


def lacking(directory: Path) -> str | None:
    """The first of the files without which a directory is not that of a run; None for one that is."""
    return next((name for name in (CONFIG_NAME, FACTS_NAME) if not (directory / name).is_file()), None)


def holder_of(path: Path) -> Path:
    """The run directory above merged/ or checkpoint-N/; any other path unchanged."""
    return path.parent if re.fullmatch(rf"{MERGED}|checkpoint-\d+", path.name) else path
