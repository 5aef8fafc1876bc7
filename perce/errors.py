"""UserError, the exception for mistakes that the user can correct: commands print it as a paragraph and exit with code
2. Also the advice what to install if a library is missing."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# The packages of `pip install 'perce[train]'` that perce imports; without it only torch is installed.
OF_TRAINING = frozenset(
    "accelerate bm25s datasets filelock gguf huggingface_hub jinja2 matplotlib numpy peft psutil pyarrow rich "
    "safetensors tokenizers tqdm transformers xxhash yaml".split()
)
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
