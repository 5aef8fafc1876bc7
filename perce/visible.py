r"""Makes text that others wrote safe to print and write: no character in it acts on a terminal, a page or a file.

The characters that act are control characters (C0, DEL, C1), marks that change the direction of the text after them,
Unicode's separators of lines and paragraphs, and halves of surrogate pairs, which cannot be encoded and occur in file
names that are not UTF-8. They are shown as Python writes them: \x1b, \u202e.

`say` is what prints, and `progress` shows how far long work is.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

ACTING = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")

NAMED = 4  # weights or layers that a message names
LISTED = 12  # names of fields that a message lists

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")

PATIENCE = 3.0  # seconds before a progress bar appears


def visible(text: str, keep: str = "") -> str:
    """The text with every character that acts, except those in `keep`, replaced by its escape sequence."""
    return ACTING.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def shortened(text: str, most: int = 60) -> str:
    """The text, or its beginning followed by dots: at most `most` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def listed(names: Iterable[Any]) -> str:
    """Names, or the first of them, in one short line. Those from a list that Python wrote need not be texts."""
    names = [*names]
    return ", ".join(shortened(str(name), 40) for name in names[:LISTED]) + ", …" * (len(names) > LISTED)


def in_short(names: Sequence[str]) -> str:
    """The first few of many names of weights or layers."""
    return ", ".join(names[:NAMED]) + f" and {len(names) - NAMED} more" * (len(names) > NAMED)


def say(*lines: str, error: bool = False) -> None:
    """Print lines; each stays one line, whatever names and rows it quotes. error: print on stderr.

    An access token of the Hub in a line, such as one quoted from a misplaced argument, is not printed."""
    for line in lines:
        print(TOKEN.sub("hf_…", visible(line)), file=sys.stderr if error else None, flush=error)


def progress(what: str, unit: str, over: Iterable[Any] | None = None, total: int | None = None) -> Any:
    """tqdm's bar, over an iterable or to be updated. It shows on terminals only, and after PATIENCE seconds."""
    from tqdm import tqdm

    return tqdm(over, desc=what, unit=unit, total=total, leave=False, delay=PATIENCE, disable=None)


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON that people can read in a terminal: letters of all alphabets are kept, and characters that act become
    \\uXXXX, which every reader of JSON decodes."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return ACTING.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)
