"""Where a command runs: its input and output paths, files that are written in one move, other processes, the Hub, and
libraries that are told to be silent."""

import contextlib
import functools
import importlib.metadata
import os
import shutil
import socket
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatch
from itertools import combinations, islice, product
from pathlib import Path
from typing import Any

from perce.errors import UserError, first_line, in_one_line
from perce.visible import shortened

PATIENCE = 3.0  # seconds before a progress bar appears

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

# Each is at the beginning of files of one kind that commands write, and may write again.
MARKS_OF_PERCE = (
    b'<meta name="generator" content="perce">',
    b'"kind": "perce.',
    b'"assistant", "content": {"token_ids":',
    b'{\n  "command": "score",',
    b'{\n  "command": "evaluate",',
)
BEGINNING = 300  # bytes in which it is

HUB_SECONDS = 10


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


def check_outputs(outputs: Mapping[str, str | None], inputs: Mapping[str, str | None]) -> None:
    """UserError for an output that is also an input or another output, or a file that belongs to an input directory.

    Both map options, as an error is to name them, to paths; None: not given. The paths need not exist.
    """
    written, read = ({option: path for option, path in files.items() if path} for files in (outputs, inputs))
    for (one, path), (other, its) in combinations(written.items(), 2):
        if _same(path, its):
            raise UserError(f"{one} {path}, {other} {its}: both name the same file. Change one of them.")
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


def is_first_process() -> bool:
    """Whether this process is the first of those that were launched together, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@functools.cache
def hub_failure() -> str | None:
    """Why the Hub cannot be reached, tried once; None if it can. The Hub's own library tries half a minute per file."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # of whichever network library it uses
        return first_line(error)
    return None


def let_umask_decide(directory: Path) -> None:
    """Give the weights in a directory the permissions of the umask: safetensors lets only their owner read them."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in directory.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # a file system without modes
            file.chmod(0o666 & ~umask)


def version() -> str:
    """The installed version of perce."""
    try:
        return importlib.metadata.version("perce")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed, run from its source)"


def prepare(*outputs: str | None) -> None:
    """Silence libraries, and raise UserError for an output file that cannot be written, or would replace a file that is
    not perce's; its directories are made."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    # PEFT still asks transformers 5.23 for an attribute under its old name.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    for path in filter(None, outputs):
        file = Path(path).expanduser()
        with written(path):
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                file.open("a").close()
            check_own(file)
            if not _is_special(file):
                file = Path(os.path.realpath(file))
                with tempfile.TemporaryDirectory(dir=file.parent) as directory:
                    Path(directory, file.name).touch()  # the name may be too long for this file system


def check_own(path: Path) -> None:
    """UserError for a file that has a content, and not that of a file of perce's."""
    if path.is_file():
        with path.open("rb") as file:
            beginning = file.read(BEGINNING)
        if beginning and not any(mark in beginning for mark in MARKS_OF_PERCE):
            raise UserError(f"{path}: exists already, and was not written by perce. Choose another file.")


@contextlib.contextmanager
def written(path: str | Path) -> Iterator[None]:
    """Put around code that writes this file: a UserError for a full disk, or whatever else the system refuses."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or in_one_line(error)
        raise UserError(f"{path}: cannot be written to ({reason}). Make room, or choose another file.") from error


@contextlib.contextmanager
def in_one_move(path: Path) -> Iterator[Path]:
    """A path to write the new content of this file to, which then replaces the file: it is never half written."""
    if _is_special(path):
        yield path
        return
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    try:
        yield unfinished
        if path.exists():
            shutil.copymode(path, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    """A path in the file's directory for this process only; files that killed processes left there are deleted."""
    import psutil

    # The process ids are only valid on this machine, and another one may write to the same disk.
    of_file = f"{zlib.crc32(f'{socket.gethostname()} {path.name}'.encode(errors='replace')):08x}"
    for left in path.parent.glob(f".*.unfinished-{of_file}-*"):
        if not psutil.pid_exists(int(left.name.rpartition("-")[2])):
            left.unlink(missing_ok=True)
    # The parts that may differ come after the last dot, because torch writes the name before it into the file.
    return path.with_name(f".{path.name[:40]}.unfinished-{of_file}-{os.getpid()}")


def _is_special(path: Path) -> bool:
    """Whether the path is /dev/stdout, a pipe or the like, which is written to directly."""
    return path.exists() and not path.is_file()


def progress(what: str, unit: str, over: Iterable[Any] | None = None, total: int | None = None) -> Any:
    """tqdm's bar, over an iterable or to be updated. It shows on terminals only, and after PATIENCE seconds."""
    from tqdm import tqdm

    return tqdm(over, desc=what, unit=unit, total=total, leave=False, delay=PATIENCE, disable=None)
