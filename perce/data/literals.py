"""Lists that came as a text, as in a CSV: JSON, what Python prints, and what numpy prints.

pandas writes a list as `['a', 'b']`, and datasets, whose columns are numpy arrays there, `['a' 'b']`. Both are exact,
and read here; of an array that numpy has shortened (`...`) the rest is lost.
"""

import ast
import io
import re
import tokenize
from typing import Any

from perce.data.readers import BadRow, parse_json

LONGEST = 2**22  # characters of a Python list: its syntax tree takes a hundred times as much
_LIKE_A_LIST = re.compile(r"\[\s*['\"\[{(]")
_VALUES = (tokenize.STRING, tokenize.NUMBER, tokenize.NAME)


def parse_list(text: str, field: str) -> Any:
    """The list that a text is; the text itself where it only begins or ends like one, such as "[laughs] Hi".

    BadRow for what was a list when it was written, and cannot be read as one.
    """
    bare = text.strip()
    if not (bare.startswith("[") and bare.endswith("]")):
        return text
    try:
        return parse_json(bare)
    except ValueError:
        if not _LIKE_A_LIST.match(bare):
            return text
    expected = "a list as JSON, Python or numpy writes it whole"
    if len(bare) > LONGEST:
        raise BadRow(field, expected, "a Python list of more than 4 MiB, which is to be written as JSON")
    try:
        return ast.literal_eval(_with_commas(bare))
    except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
        shown = repr(bare if len(bare) <= 60 else bare[:57] + "...")
        raise BadRow(field, expected, f"{shown}; JSON lines or Parquet keep lists as they are") from None


def _with_commas(text: str) -> str:
    """With a comma between two values that a space alone divides: Python would make one text of two."""
    written, before = [], None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER):
            continue
        if token.type == tokenize.ERRORTOKEN or token.string == "...":
            raise ValueError("no list of Python's, or one that numpy has shortened")
        begins = token.type in _VALUES or token.string in "[{("
        if before and begins and (before.type in _VALUES or before.string in "]})"):
            written.append(",")
        written.append(token.string)
        before = token
    return " ".join(written)
