"""Checks the values of a row's fields: texts, personas, passages of a history, turns. A `BadRow` names the field."""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from perce.errors import UserError
from perce.reading.readers import BadRow, not_utf8
from perce.visible import listed, shortened

# How a profile entry becomes a passage: (the field that tells its kind, ((label, field), ..., the text)). The first
# kind of which an entry has that field and the text is used. A passage of one field is that text alone (LaMP-7's
# tweets). Other fields (ids, dates) are left out.
PASSAGES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "reviewText",
        (("Rating", "overall"), ("Product", "description"), ("Summary", "summary"), ("Review", "reviewText")),
    ),
    ("content", (("Summary", "summary"), ("Content", "content"))),  # LongLaMP topic writing
    ("abstract", (("Title", "title"), ("Abstract", "abstract"))),  # LongLaMP abstracts, LaMP-1, LaMP-5
    ("rating", (("Rating", "rating"), ("Title", "title"), ("Review", "text"))),  # Amazon Reviews 2023
    ("tag", (("Tag", "tag"), ("Description", "description"))),  # LaMP-2, films
    ("score", (("Rating", "score"), ("Review", "text"))),  # LaMP-3
    ("text", (("Category", "category"), ("Title", "title"), ("Text", "text"))),  # LaMP-2N, -4, -6, -7
)
LABELS = ("Category", "Rating", "Tag")  # what says nothing about an entry's subject, and what many entries have alike
SHOWN = {name for _, parts in PASSAGES for _, name in parts}
# The texts of entries: any may be a task's target, and an entry with this row's target there would give it away.
TEXT_FIELDS = {name for _, parts in PASSAGES for label, name in parts if label not in LABELS}
ENTRY = f"a text, or an object with one of the fields {', '.join(kind for kind, _ in PASSAGES)}"
HEAVIEST = 1e6  # the largest weight of a row: far below where fp32 overflows


@dataclass(frozen=True, slots=True)
class Turn:
    role: str  # "user" | "assistant", and at the beginning "system"
    content: str


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def show(value: object) -> str:
    """The type of a value and its shortened text, however large or deeply nested it is."""
    text = _SHORT.repr(value[:80] if isinstance(value, str) else value)
    return f"{type(value).__name__} {shortened(text)}"


def text_of(value: object, field: str) -> str:
    """The value; BadRow unless it is a non-empty string that a tokenizer can encode."""
    if not isinstance(value, str) or not value.strip():
        raise BadRow(field, "a non-empty string", show(value))
    return value if value.isascii() else encodable(value, field)


def encodable(value: str, field: str) -> str:
    """The text; BadRow if it is not valid Unicode: "\\ud83d" alone in JSON, or a byte of a file that is not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        wrong, place = ord(value[error.start]), f"at character {error.start}"
        got = not_utf8(wrong - 0xDC00, place) if 0xDC80 <= wrong <= 0xDCFF else f"{value[error.start]!r} {place}"
        raise BadRow(field, "UTF-8 text", got) from None
    return value


def list_of(value: object, field: str, of: str, also: str = "", may_be_empty: bool = False) -> list[Any]:
    """The value as a list, by default a non-empty one; `also` is what else it may be, in the error. `datasets` may
    return one struct of lists instead, which is converted back."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise BadRow(field, "columns of equal length", show({key: len(column) for key, column in value.items()}))
        value = [dict(zip(value, entry, strict=True)) for entry in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not (value or may_be_empty):
        raise BadRow(field, f"{also}a{'' if may_be_empty else ' non-empty'} list of {of}", show(value))
    return value


def passage_text(entry: object, field: str) -> str:
    """A profile entry as readable text (table `PASSAGES`); "" for an entry without text."""
    if isinstance(entry, str):
        return text_of(entry, field) if entry.strip() else ""
    if not isinstance(entry, dict):
        raise BadRow(field, ENTRY, show(entry))
    # Tables have all fields in all entries, so null and a missing field mean the same.
    told = {name: str(entry[name]) for name in SHOWN & entry.keys() if entry[name] is not None}
    given = {name: text for name, text in told.items() if text.strip()}
    for kind, parts in PASSAGES:
        if kind in given and parts[-1][1] in given:
            shown = [(label, given[name]) for label, name in parts if name in given]
            return text_of("\n".join(f"{a}: {b}" for a, b in shown) if len(shown) > 1 else shown[0][1], field)
    if any(kind in entry for kind, _ in PASSAGES):
        return ""
    raise BadRow(field, ENTRY, f"one with the fields {listed(entry)}")


def parse_persona(value: object, field: str) -> tuple[str, ...]:
    """The passages of a persona: a string is one passage; a list keeps its order and loses blank entries. Only an empty
    list says that there is no persona: a missing one, or one without text, may be a mistake."""
    if isinstance(value, str):
        return (text_of(value, field),)
    entries = list_of(value, field, "texts", also="a text, [] for no persona, or ", may_be_empty=True)
    if not entries:
        return ()
    passages = tuple(filter(None, (passage_text(entry, f"{field}[{i}]") for i, entry in enumerate(entries))))
    if not passages:
        raise BadRow(field, "at least one entry with text", show(value))
    return passages


def given_persona(value: Any, name: str) -> tuple[str, ...]:
    """A persona that a caller gives as argument `name`. UserError for what training would refuse."""
    try:  # list() would make the keys of a mapping a persona, and give a set another order in every process
        return parse_persona(value if isinstance(value, str | Mapping | Set) else list(value), name)
    except BadRow as bad:
        raise UserError(f"{bad}.") from None
    except TypeError:
        raise UserError(f"{name}: expected a text or a list of texts, got {value!r}.") from None


ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("user", "assistant", "system")}
_TOOLS = ("tool", "function", "observation", "function_call")


def parse_messages(value: object, field: str) -> tuple[tuple[Turn, ...], tuple[float, ...]]:
    """Alternating turns of user and assistant, perhaps after a system message, and the weight of each turn.

    A message is {"role", "content"}, or ShareGPT's {"from", "value"}; an assistant's may have a "weight".
    """
    turns: list[Turn] = []
    weights = []
    for i, message in enumerate(list_of(value, field, "{'role', 'content'} objects")):
        here = f"{field}[{i}]"
        if not isinstance(message, dict):
            raise BadRow(here, "an object with 'role' and 'content'", show(message))
        who, what = names_in(message)
        said = message.get(who)
        if said in _TOOLS or message.get("tool_calls") or message.get("function_call"):
            expected = "a conversation without tool calls and tool results, which perce does not train on"
            raise BadRow(here, expected, show(message))
        role = ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            both = "'human' or 'gpt'" if who == "from" else "'user' or 'assistant'"
            raise BadRow(f"{here}.{who}", f"{both}, or 'system' at the beginning", show(said))
        if role == "system" and turns:
            raise BadRow(f"{here}.{who}", "a system message only at the beginning", f"one after {len(turns)} messages")
        if turns and turns[-1].role == role:
            expected = "alternating user and assistant turns (join messages of one side that follow each other)"
            raise BadRow(f"{here}.{who}", expected, f"a second {role} turn in a row")
        turns.append(Turn(role, text_of(message.get(what), f"{here}.{what}")))
        weights.append(weight_of(message.get("weight"), f"{here}.weight") if role == "assistant" else 1.0)
    if turns[-1].role == "system":
        raise BadRow(field, "a turn after the system message", "none")
    return tuple(turns), tuple(weights)


def names_in(message: Mapping[str, Any]) -> tuple[str, str]:
    """The names of a message's fields for its speaker and its text. Tables have both pairs; one of them is null."""
    return ("role", "content") if message.get("from") is None else ("from", "value")


def exchanges(said: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Passages of a conversation of (role, text), the latest first. A passage is a user message with its answer, or a
    system message. A repeated system message is kept once. Equal passages share one string in memory, because the rows
    of a user have the same history."""
    passages: list[str] = []
    before = ""
    for role, text in said:
        if role == "system" and text in passages:
            continue
        label = f"{role.capitalize()}: "
        line = text if role == "system" or text.startswith(label) else label + text
        if role == "assistant" and before == "user":
            line = f"{passages.pop()}\n{line}"
        passages.append(line)
        before = role
    return tuple(sys.intern(passage) for passage in reversed(passages))


def said_in(
    value: object, field: str, who: str, what: str, roles: Mapping[str, str]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(role, text, object) for each object in a list. Its field `who` is a key of `roles`, its field `what` a text."""
    known = {name.casefold(): role for name, role in roles.items()}
    for i, said in enumerate(list_of(value, field, f"{{{who!r}, {what!r}}} objects")):
        if not isinstance(said, dict):
            raise BadRow(f"{field}[{i}]", f"an object with {who!r} and {what!r}", show(said))
        role = known.get(" ".join(str(said.get(who)).split()).casefold())
        if role is None:
            raise BadRow(f"{field}[{i}].{who}", " or ".join(map(repr, roles)), show(said.get(who)))
        yield role, text_of(said.get(what), f"{field}[{i}].{what}"), said


def rating_of(value: object) -> str:
    """The rating of a review: a number, as the row writes it."""
    if isinstance(value, bool) or not re.fullmatch(r"\d+(\.\d+)?", str(value)):
        raise BadRow("rating", "a number", show(value))
    return str(value)


def weight_of(value: object, field: str) -> float:
    """The factor that multiplies the weights of a reply's tokens; 1 if the row has none. In a CSV it is a text."""
    try:
        weight = 1.0 if value is None else float(value) if isinstance(value, str | int | float) else -1.0
    except (ValueError, OverflowError):
        weight = -1.0
    if isinstance(value, bool) or not 0 <= weight <= HEAVIEST:
        raise BadRow(field, f"a number from 0 to {HEAVIEST:g}", show(value))
    return weight


def parse_spans(value: object, response: str) -> tuple[tuple[int, int], ...]:
    expected = f"a list of [start, end] character offsets with 0 <= start < end <= {len(response)}"
    spans = []
    for span in value if isinstance(value, list) else [value]:
        if not isinstance(span, list | tuple) or len(span) != 2 or any(type(offset) is not int for offset in span):
            raise BadRow("personal_spans", expected, show(span))
        if not 0 <= span[0] < span[1] <= len(response):
            raise BadRow("personal_spans", expected, show(list(span)))
        spans.append((span[0], span[1]))
    return tuple(spans)


def same_words(one: str, other: str) -> bool:
    """Whether two texts are equal apart from case, spaces and punctuation (LaMP-7 repeats the target as "- TARGET").
    Texts without a word, such as emoji, are compared as they are. The comparison stops at the first word that differs,
    so it is cheap for long texts."""
    if not re.search(r"\w", one):
        return one.strip() == other.strip()
    return all(
        a and b and a[0].casefold() == b[0].casefold()
        for a, b in zip_longest(re.finditer(r"\w+", one), re.finditer(r"\w+", other))
    )
