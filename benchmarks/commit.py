"""The commit that is measured."""

import os
import subprocess
from pathlib import Path

VARIABLE = "PERCE_COMMIT"


def commit() -> str | None:
    """Of $PERCE_COMMIT, which a working tree that came without its repository needs, or of git; "-dirty" if changed."""
    if given := os.environ.get(VARIABLE):
        return given
    command = ("git", "describe", "--always", "--dirty", "--abbrev=12")
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
