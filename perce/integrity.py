"""Whether files are what was written: their sizes, and digests of their contents."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LIST = "complete.json"  # of the files of a checkpoint, or of a finished run's weights: what facts_of says of them


def digest(path: Path) -> str:
    """Of a file's contents: finds damage, not malice, at the speed that memory is read."""
    import xxhash  # late: --help answers without what training needs

    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def facts_of(directory: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What `difference` compares, by name in the directory; JSON values."""
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": digest(path)}
        for path in sorted(files)
    }


def difference(directory: Path, facts: Mapping[str, Mapping[str, Any]], contents: bool = True) -> str | None:
    """Which file is not what was written, in words; None if all are. `contents`: read them, not their sizes alone.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, OSError: `facts` is not such a mapping.
    """
    if not facts:
        raise ValueError("it lists no file")
    for name, fact in facts.items():
        path, size, expected = directory / name, fact["bytes"], fact["xxh3_128"]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
        if contents and digest(path) != expected:
            return f"{name} is not what was written: its contents have changed"
    return None
