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
from perce.visible import shortened

LONGEST = 2**22  # characters of a Python list: its syntax tree takes a hundred times as much
_BEGINS = re.compile(r"\[\s*(['\"\[{(]|[bru]+['\"]|None\b|nan\b|np\.|array\()|[({]\s*['\"]|array\(")
_VALUES, _OPEN, _CLOSE = (tokenize.STRING, tokenize.NUMBER), tuple("[{("), tuple("]})")


def parse_list(text: str, field: str) -> Any:
    """The list that a text is; the text itself where it is none, such as "[laughs] Hi" or a JSON object.

    BadRow for what was a list when it was written, and cannot be read as one.
    """
    bare = text.strip()
    if bare.startswith("[") and bare.endswith("]"):
        try:
            return parse_json(bare)
        except ValueError:
            pass
    if not (_BEGINS.match(bare) and bare.endswith(("]", ")", "}"))):
        return text
    expected = "a list as JSON, Python or numpy writes it whole"
    if len(bare) > LONGEST:
        raise BadRow(field, expected, "a Python list of more than 4 MiB, which is to be written as JSON")
    if (written := _with_commas(bare)) is None:
        return text
    try:
        value = ast.literal_eval(written)
        if isinstance(value, dict):
            return text
        if isinstance(value, list | tuple | set) and "..." not in written.split():
            return list(value)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # TypeError: a list as a name or in a set
        pass
    raise BadRow(field, expected, f"{shortened(bare)!r}; JSON lines or Parquet keep lists as they are")


def _with_commas(text: str) -> str | None:
    """With a comma between two values that a space alone divides: Python would make one text of two. None for what is
    no single expression in brackets, but a text that begins and ends like one."""
    written: list[str] = []
    depth, before = 0, None
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER):
                continue
            if token.type == tokenize.ERRORTOKEN or (depth == 0 and before and before.string in _CLOSE):
                return None
            begins = token.type in _VALUES or token.string in _OPEN
            if before and begins and (before.type in _VALUES or before.string in _CLOSE):
                written.append(",")
            depth += (token.string in _OPEN) - (token.string in _CLOSE)
            written.append(token.string)
            before = token
    except (tokenize.TokenError, SyntaxError):
        return None
    return " ".join(written)
