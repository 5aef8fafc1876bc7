"""Paths that users give: what no path can be, outputs that would be written over inputs, and what a mistyped path may
mean."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatch
from itertools import combinations, islice, product
from pathlib import Path

from perce.errors import UserError, in_one_line
from perce.visible import shortened

# Names of files that belong to a directory of data, and to that of a model or run.
OF_DATA = (
    "train.*", "valid*.*", "val.*", "dev.*", "test.*", "*_questions.json", "*_outputs.json", "dataset_*.json",
    "state.json",
)  # fmt: skip
OF_MODELS = (
    "config.*", "*_config.json", "*.safetensors", "*.index.json", "*.bin", "tokenizer.*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*", "trainer_state.json", "held_out.json", "base.json",
    "run.json", "complete.json", "README.md", "report.html", "curves.png", "*.pt", "*.pth",
)  # fmt: skip


def check_path(option: str, path: str, is_file: bool = False) -> None:
    """UserError for a text that cannot be a path, or a path that the system refuses to look at. It need not exist.

    is_file: the path must name a file.
    """
    shown = shortened(path, 80)
    if not path.strip():
        raise UserError(f"{option}: expected a path, got {path!r}. Is a variable of the shell empty?")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{option} {shown}: there is no user of this name. For a file that begins with ~ write ./~.")
    try:
        os.stat(expanded)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or in_one_line(error)
        raise UserError(f"{option} {shown}: cannot be looked at ({reason}). Check the path.") from None
    if is_file and Path(path).name in ("", ".."):
        raise UserError(f"{option} {shown}: expected the name of a file, got a directory.")


def check_different(files: Iterable[tuple[str, str]]) -> None:
    """UserError if two of these paths, each with the option that names it, are the same file."""
    for (one, path), (other, its) in combinations(files, 2):
        if _same(path, its):
            raise UserError(f"{one} {path}, {other} {its}: both name the same file. Change one of them.")


def check_outputs(outputs: Mapping[str, str | None], inputs: Mapping[str, str | None]) -> None:
    """UserError for an output that is also an input or another output, or a file that belongs to an input directory.

    Both map options, as an error is to name them, to paths; None: not given. The paths need not exist.
    """
    written, read = ({option: path for option, path in files.items() if path} for files in (outputs, inputs))
    check_different(written.items())
    for (option, path), (other, its) in product(written.items(), read.items()):
        if _same(path, its):
            raise UserError(f"{option} {path}: would overwrite {other} {its}. Choose another path.")
        names = OF_DATA if other == "--data" else OF_MODELS
        name = Path(path).name
        if _same(str(Path(path).parent), its) and any(fnmatch(name, pattern) for pattern in names):
            raise UserError(
                f"{option} {path}: is in the directory of {other} {its}, which has, or may have, a {name} of its own. "
                "Choose another name, or another directory."
            )


def _same(one: str, other: str) -> bool:
    """Whether two paths name the same file, or will once it is written."""
    here, there = (os.path.realpath(os.path.expanduser(path)) for path in (one, other))
    return here == there or (os.path.exists(here) and os.path.exists(there) and os.path.samefile(here, there))


def near_paths(path: str) -> list[str]:
    """Up to two existing paths that may be meant by one that does not exist: in the same directory, or in a directory
    of almost the same name; for a name without a directory, in runs/ too."""
    wanted = Path(path).expanduser()
    if not wanted.name:
        return []
    beside = [wanted.parent] if wanted.parent.is_dir() else [Path(near) for near in near_paths(str(wanted.parent))]
    names: dict[str, str] = {}
    for directory in [*beside, Path("runs")] if wanted.name == path else beside:
        with contextlib.suppress(OSError):
            entries = (entry.name for entry in islice(directory.iterdir(), 1000) if not entry.name.startswith("."))
            names = {name: str(directory / name) for name in entries} | names
    begun = [name for name in names if name.startswith(wanted.name)]
    return [names[name] for name in dict.fromkeys([*get_close_matches(wanted.name, names), *sorted(begun)])][:2]


def did_you_mean(path: str) -> str:
    """A question to put behind a sentence that says that a path cannot be read; "" if it exists, or none is similar."""
    near = [] if os.path.exists(os.path.expanduser(path)) else near_paths(path)
    return f" Did you mean {' or '.join(near)}?" if near else ""
