"""Output files, claimed before anything expensive happens."""

from collections.abc import Iterable
from pathlib import Path

from perce.errors import UserError


def claim_files(paths: Iterable[str | None]) -> None:
    """UserError for a file that could not be written; directories on the way are made."""
    for path in filter(None, paths):
        try:
            Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
            with Path(path).expanduser().open("a"):
                pass
        except OSError as error:
            raise UserError(f"{path}: cannot be written to ({error.strerror}). Choose another file.") from error
