"""UserError, the exception for mistakes that the user can correct: commands print it as a paragraph and exit with code
2. Also the advice what to install if a library is missing, and what a command does if its stdout is closed."""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from perce.visible import say

# The packages of `pip install 'perce[train]'` that perce imports; without it only torch is installed.
OF_TRAINING = frozenset(
    "accelerate bm25s datasets filelock gguf huggingface_hub jinja2 matplotlib numpy peft psutil pyarrow rich "
    "safetensors tokenizers tqdm transformers xxhash yaml".split()
)
BROKEN_PIPE = 13  # SIGPIPE, which Windows does not have
TRANSFORMERS = "5.16"  # the oldest version that works; pip does not check it if perce is installed without [train]


class UserError(ValueError):
    """A mistake in the input, the command line or the environment; the message says what and where, and the remedy.

    Args:
        message: one paragraph; line breaks in it come from text that it quotes.
        lines: further lines, printed below it.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


def what_to_install(error: ImportError) -> str | None:
    """The remedy for a library that is missing or too old; None if an installed library is broken."""
    name = error.name or ""
    advice = "pip install 'perce[train]' installs what training and the commands need."
    if isinstance(error, ModuleNotFoundError) and name in OF_TRAINING:
        return f"{name} is not installed. {advice}"
    found = getattr(sys.modules.get("transformers"), "__version__", TRANSFORMERS)
    numbers = [tuple(map(int, version.split(".")[:2])) for version in (found, TRANSFORMERS)]
    if name.partition(".")[0] == "transformers" and numbers[0] < numbers[1]:
        return f"transformers {found} is installed, and perce needs {TRANSFORMERS} or newer. {advice}"
    return None


@contextmanager
def installed(extra: str) -> Iterator[None]:
    """Put around imports of packages from `pip install 'perce[extra]'`: if one is missing, the ImportError says so."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in OF_TRAINING | {extra}:
            raise
        advice = f"{in_one_line(error)}. pip install 'perce[{extra}]' installs what is needed."
        raise ImportError(what_to_install(error) or advice, name=error.name) from error


def in_one_line(error: Exception) -> str:
    """The message of a library's error in one line, to end a sentence of ours with."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: Exception) -> str:
    """The first line of the error's message, for libraries whose other lines are advice that does not fit here."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def guarded(run: Callable[[], object]) -> int:
    """Run a command and return its exit code: 0; 2 after one paragraph on stderr about a mistake that the user can
    correct; 130 after Ctrl-C; 141 when the reader of stdout has closed it (`| head`)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack characters, such as an arrow
        sys.stdout.reconfigure(errors="replace")
    code = 0
    try:
        try:
            run()
        except UserError as error:
            message, *lines = error.args
            say(f"error: {message}", *lines, error=True)
            code = 2
        except ImportError as error:
            if (advice := what_to_install(error)) is None:
                raise
            say(f"error: {advice}", error=True)
            code = 2
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        say("Interrupted.", error=True)
        return 128 + signal.SIGINT
    except OSError:
        if (failure := _failure_of_stdout()) is None:
            raise
        if isinstance(failure, BrokenPipeError):
            return code or 128 + BROKEN_PIPE
        with suppress(OSError):
            say(f"error: stdout: cannot be written to ({failure.strerror}).", error=True)
        return 2
    return code


def _failure_of_stdout() -> OSError | None:
    """The error if stdout can no longer be written to, else None. What is still buffered then is discarded."""
    try:
        print(flush=True)
    except OSError as error:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None
