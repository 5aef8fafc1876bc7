"""Parses lists that are stored as text, for example in a CSV cell: as JSON, or as Python or numpy print them.

pandas writes a list as `['a', 'b']`; datasets writes `['a' 'b']`, because it exports numpy arrays. Both are complete
and are read here. An array that numpy has shortened (`...`) has lost its other entries, and is a BadRow.
"""

import ast
import io
import re
import tokenize
from typing import Any

from perce.reading.readers import BadRow, parse_json
from perce.visible import shortened

LONGEST = 2**22  # characters of a Python list: its syntax tree takes a hundred times as much memory
_BEGINS = re.compile(r"\[\s*(['\"\[{(]|[bru]+['\"]|None\b|nan\b|np\.|array\()|[({]\s*['\"]|array\(")
_SEPARATED = re.compile(r"['\"]\s*,")  # a quoted text that ends as an entry of a list does
_VALUES, _OPEN, _CLOSE = (tokenize.STRING, tokenize.NUMBER), tuple("[{("), tuple("]})")


def parse_list(text: str, field: str) -> Any:
    """The list that a text spells; the text itself if it spells none, such as "[laughs] Hi" or a JSON object.

    BadRow if the text was written as a list but cannot be read as one.
    """
    bare = text.strip()
    if bare.startswith("[") and bare.endswith("]"):
        try:
            return parse_json(bare)
        except ValueError:
            pass
    if not (_BEGINS.match(bare) and bare.endswith(("]", ")", "}"))):
        return text
    expected = "a complete list as JSON, Python or numpy writes it"
    if len(bare) > LONGEST:
        raise BadRow(field, expected, "a Python list of more than 4 MiB, which must be written as JSON")
    lost = BadRow(field, expected, f"{shortened(bare)!r}; JSON Lines or Parquet files keep lists as they are")
    if (tokens := _with_commas(bare)) is None:
        if _SEPARATED.search(bare) and bare.endswith(("']", '"]')):  # ['I don't ski', 'I run']
            raise lost
        return text
    try:
        value = ast.literal_eval(" ".join(tokens))
        if isinstance(value, str | dict):
            return text
        if isinstance(value, set):  # as it is written: a set has another order in every process
            value = ast.literal_eval(" ".join(["[", *tokens[1:-1], "]"]))
        if isinstance(value, list | tuple) and "..." not in tokens:
            return list(value)
    except SyntaxError:
        if "..." not in tokens and (bare.startswith("(") or not _SEPARATED.search(bare)):  # ["Bee" to friends]
            return text
    except (ValueError, TypeError, RecursionError, MemoryError):  # TypeError: a list as a name or in a set
        pass
    raise lost


def _with_commas(text: str) -> list[str] | None:
    """The tokens of the text, with a comma between values that only a space separates, which Python would join into one
    text. None if the text only begins and ends like an expression in brackets, and is not a single one."""
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
    return written
