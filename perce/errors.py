"""What a user can put right: the one exception for it, which commands print as a paragraph and exit with code 2; and
what to install where a library is missing."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# What perce imports of `pip install 'perce[train]'`: torch alone is there without it.
OF_TRAINING = frozenset(
    "accelerate bm25s datasets filelock gguf huggingface_hub jinja2 matplotlib numpy peft psutil pyarrow rich "
    "safetensors tokenizers tqdm transformers xxhash yaml".split()
)
TRANSFORMERS = "5.16"  # the oldest; pip does not see to it where perce was installed without [train]


class UserError(ValueError):
    """A mistake in the input, the command line or the environment; the message says what, where and the remedy.

    Args:
        message: a paragraph; a line break in it is of what it quotes.
        lines: of their own, below it.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


def what_to_install(error: ImportError) -> str | None:
    """The remedy for a library that is not there, or is too old; None where one that is there is broken."""
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
    """Around imports of what `pip install 'perce[extra]'` brings: an ImportError that says so."""
    try:
        yield
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        advice = (
            what_to_install(error) or f"{in_one_line(error)}. pip install 'perce[{extra}]' installs what is needed."
        )
        if name not in OF_TRAINING | {extra}:
            raise
        raise ImportError(advice, name=error.name) from error


def in_one_line(error: Exception) -> str:
    """What an error of a library says, for the end of a sentence of ours."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: Exception) -> str:
    """The first line of what it says, where the rest is advice for others."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
