"""Checks that files are as they were written, by their sizes and digests of their contents; those of JSON, by what
they hold."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from perce.visible import listed, shortened

LIST = "complete.json"  # sizes and digests of the files of a checkpoint, or of the weights of a finished run


def read_object(path: Path, *fields: str) -> dict[str, Any]:
    """The JSON object in a file, with at least these fields.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else; the message, of one line, says what was expected.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {shortened(repr(content))}")
    for name in fields:
        if name not in content:
            raise ValueError(f"expected a field {name}, got {listed(content) or 'none'}")
    return content


def digest(path: Path) -> str:
    """The digest of a file's contents, at the speed of reading memory. It finds damage, not malice."""
    import xxhash  # imported here, so that --help works without the packages that training needs

    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def sizes_and_digests(directory: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and digest of each file, by its name in the directory, for `difference`; JSON values."""
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": digest(path)}
        for path in sorted(files)
    }


def difference(directory: Path, written: Mapping[str, Mapping[str, Any]], contents: bool = True) -> str | None:
    """A sentence on the first file that is not as it was written; None if all are. `contents`: read them, instead of
    comparing sizes only.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, OSError: `written` is not what sizes_and_digests returned.
    """
    if not written:
        raise ValueError("it lists no file")
    for name, fact in written.items():
        path, size, expected = directory / name, fact["bytes"], fact["xxh3_128"]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
        if contents and digest(path) != expected:
            return f"{name} is not what was written: its contents have changed"
    return None
