"""What a row means: the seven formats, how each is recognised by its fields, and the parser of each.

`|` means "one of"; what stands in brackets is optional; fields not named here are ignored:

    format             fields                                                     examples a row
    perce              persona, query|messages, response|messages                 1, or one an assistant turn
                       [user_id, personal_spans]
    longlamp           name|reviewerId|author, input, output, profile             1
    lamp               input, output, profile [user_id|id]                        1
    convai2            personality, dialogue: [{partner, self}, ...]              one a `self` line
    spc                user 1 personas, user 2 personas, conversation             one an utterance but the first
    prompt_completion  persona, prompt, completion (TRL; strings or messages)     1
    text               text [user_id]                                             1 document, without a persona

A parser checks what it reads and yields (persona, turns, response) of each example; a `BadRow` names the field. A row
that fits another format too is no document.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from perce.data.readers import BadRow, not_utf8
from perce.visible import listed, shortened

FORMATS: dict[str, tuple[str, ...]] = {  # the fields a row must have
    "perce": ("persona", "query|messages", "response|messages"),
    "longlamp": ("name|reviewerId|author", "input", "output", "profile"),
    "lamp": ("input", "output", "profile"),
    "convai2": ("personality", "dialogue"),
    "spc": ("user 1 personas", "user 2 personas", "conversation|Best Generated Conversation"),
    "prompt_completion": ("persona", "prompt", "completion"),
    "text": ("text",),
}
# Fields that may be lists of texts, objects or numbers; a query or a response that begins with "[" stays a text.
LISTS = (
    "persona", "profile", "messages", "personal_spans", "personality", "dialogue", "conversation", "user 1 personas",
    "user 2 personas",
)  # fmt: skip
OPTIONAL = ("user_id", "personal_spans", "id")
FIELDS = frozenset([*OPTIONAL, *(name for needs in FORMATS.values() for need in needs for name in need.split("|"))])
# How a profile entry becomes a passage: (the field that tells its kind, ((label, field), ..., the text)); first match
# wins. A passage of one field is that text alone (LaMP-7's tweets). Fields not named here (ids, dates) are left out.
PASSAGES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "reviewText",
        (("Rating", "overall"), ("Product", "description"), ("Summary", "summary"), ("Review", "reviewText")),
    ),
    ("content", (("Summary", "summary"), ("Content", "content"))),  # LongLaMP topic writing
    ("abstract", (("Title", "title"), ("Abstract", "abstract"))),  # LongLaMP abstracts, LaMP-1, LaMP-5
    ("tag", (("Tag", "tag"), ("Description", "description"))),  # LaMP-2, films
    ("score", (("Rating", "score"), ("Review", "text"))),  # LaMP-3
    ("text", (("Category", "category"), ("Title", "title"), ("Text", "text"))),  # LaMP-2N, -4, -6, -7
)
# Fields that are the target in some LaMP or LongLaMP task: an entry that holds this row's target there gives it away.
TARGET_FIELDS = ("abstract", "content", "reviewText", "text", "title")


@dataclass(frozen=True, slots=True)
class Turn:
    role: str  # "user" | "assistant", and at the beginning "system"
    content: str


# --- values of fields ---------------------------------------------------------------------------------------------


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def show(value: object) -> str:
    """What a value is, in a few words, however large it is and however deep."""
    text = _SHORT.repr(value[:80] if isinstance(value, str) else value)
    return f"{type(value).__name__} {shortened(text)}"


def _text(value: object, field: str) -> str:
    """A string with something in it, which a tokenizer can encode."""
    if not isinstance(value, str) or not value.strip():
        raise BadRow(field, "a non-empty string", show(value))
    return value if value.isascii() else encodable(value, field)


def encodable(value: str, field: str) -> str:
    """The text; BadRow where it is none of Unicode's: "\\ud83d" alone in JSON, a byte of a file that is not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        wrong, place = ord(value[error.start]), f"at character {error.start}"
        got = not_utf8(wrong - 0xDC00, place) if 0xDC80 <= wrong <= 0xDCFF else f"{value[error.start]!r} {place}"
        raise BadRow(field, "UTF-8 text", got) from None
    return value


def _list(value: object, field: str, of: str) -> list[Any]:
    """A non-empty list; `datasets` may hand out a list of structs as one struct of lists, which is turned back."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise BadRow(field, "columns of one length", show({key: len(column) for key, column in value.items()}))
        value = [dict(zip(value, entry, strict=True)) for entry in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value:
        raise BadRow(field, f"a non-empty list of {of}", show(value))
    return value


def passage_text(entry: object, field: str) -> str:
    """A profile entry as readable text (table `PASSAGES`); "" for an entry without text, which says nothing."""
    if isinstance(entry, str):
        return _text(entry, field) if entry.strip() else ""
    if not isinstance(entry, dict):
        raise BadRow(field, "a string or an object", show(entry))
    for kind, parts in PASSAGES:
        if kind in entry:
            main = parts[-1][1]
            if entry.get(main) is None or not str(entry[main]).strip():
                return ""
            shown = [(label, str(entry[name])) for label, name in parts if entry.get(name) not in (None, "")]
            return _text("\n".join(f"{a}: {b}" for a, b in shown) if len(shown) > 1 else shown[0][1], field)
    raise BadRow(field, f"an entry with one of {', '.join(kind for kind, _ in PASSAGES)}", f"fields {listed(entry)}")


def parse_persona(value: object, field: str) -> tuple[str, ...]:
    """A string is one passage; a list keeps its order, without blank entries."""
    if isinstance(value, str):
        return (_text(value, field),)
    entries = _list(value, field, "strings")
    passages = tuple(filter(None, (passage_text(entry, f"{field}[{i}]") for i, entry in enumerate(entries))))
    if not passages:
        raise BadRow(field, "at least one entry with text", show(value))
    return passages


def parse_turns(value: object, field: str) -> tuple[Turn, ...]:
    """Alternating turns of user and assistant, perhaps behind a system message."""
    turns: list[Turn] = []
    for i, message in enumerate(_list(value, field, "{'role', 'content'} objects")):
        here = f"{field}[{i}]"
        if not isinstance(message, dict):
            raise BadRow(here, "an object with 'role' and 'content'", show(message))
        role = message.get("role")
        if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
            expected = "a conversation without tools, whose calls and results are not trained on"
            raise BadRow(here, expected, show(message))
        if role not in ("user", "assistant", "system"):
            raise BadRow(f"{here}.role", "'user' or 'assistant', or 'system' at the beginning", show(role))
        if role == "system" and turns:
            raise BadRow(f"{here}.role", "a system message only at the beginning", f"one after {len(turns)} messages")
        if turns and turns[-1].role == role:
            raise BadRow(f"{here}.role", "alternating user and assistant turns", f"a second {role} turn in a row")
        turns.append(Turn(role, _text(message.get("content"), f"{here}.content")))
    if turns[-1].role == "system":
        raise BadRow(field, "a turn after the system message", "none")
    return tuple(turns)


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


# --- one parser a format: row -> (persona, turns, response) of each example ---------------------------------------

Parsed = tuple[tuple[str, ...], tuple[Turn, ...], str]


def _replies(persona: tuple[str, ...], turns: tuple[Turn, ...]) -> Iterator[Parsed]:
    """Each assistant turn but an opening one, which answers nothing."""
    opening = 1 if turns[0].role == "system" else 0
    for i, turn in enumerate(turns):
        if turn.role == "assistant" and i > opening:
            yield persona, turns[:i], turn.content


def _parse_perce(row: Mapping[str, Any]) -> Iterator[Parsed]:
    persona = parse_persona(row["persona"], "persona")
    if "query" in row and "messages" in row:
        raise BadRow("query", "either 'query' or 'messages'", "both")
    if "query" in row:
        yield persona, (Turn("user", _text(row["query"], "query")),), _text(row["response"], "response")
        return
    turns = parse_turns(row["messages"], "messages")
    if ("response" in row) != (turns[-1].role == "user"):
        expected = "'messages' that end with a user turn and a 'response', or an assistant turn and none"
        raise BadRow(
            "messages", expected, f"a last {turns[-1].role} turn {'and' if 'response' in row else 'without'} a response"
        )
    if "response" in row:
        yield persona, turns, _text(row["response"], "response")
    else:
        yield from _replies(persona, turns)


def _same_words(one: str, other: str) -> bool:
    """Equal but for case, space and punctuation (LaMP-7 has the target again as "- TARGET"); ends at the first word
    that differs, so it is cheap for long texts."""
    return all(
        a and b and a[0].casefold() == b[0].casefold()
        for a, b in zip_longest(re.finditer(r"\w+", one), re.finditer(r"\w+", other))
    )


def _parse_profile(row: Mapping[str, Any]) -> Iterator[Parsed]:
    """LongLaMP and LaMP. The files hold the oldest entry first; reversed, the most recent is kept longest."""
    response = _text(row["output"], "output")
    passages = []
    for i, entry in reversed(list(enumerate(_list(row["profile"], "profile", "objects")))):
        texts = [entry.get(name) for name in TARGET_FIELDS] if isinstance(entry, dict) else [entry]
        if any(isinstance(text, str) and _same_words(text, response) for text in texts):
            continue  # the target itself: with it in the prompt the model would only learn to copy
        if passage := passage_text(entry, f"profile[{i}]"):
            passages.append(passage)
    if not passages:
        raise BadRow("profile", "at least one entry with text other than the row's own output", show(row["profile"]))
    yield tuple(passages), (Turn("user", _text(row["input"], "input")),), response


def _parse_convai2(row: Mapping[str, Any]) -> Iterator[Parsed]:
    turns = []
    for i, pair in enumerate(_list(row["dialogue"], "dialogue", "{'partner', 'self'} objects")):
        if not isinstance(pair, dict):
            raise BadRow(f"dialogue[{i}]", "an object with 'partner' and 'self'", show(pair))
        for role, name in (("user", "partner"), ("assistant", "self")):
            turns.append(Turn(role, _text(pair.get(name), f"dialogue[{i}].{name}")))
    yield from _replies(parse_persona(row["personality"], "personality"), tuple(turns))


def _utterances(value: object, field: str) -> Iterator[tuple[str, str]]:
    """(speaker "1" or "2", text) of a conversation: {speaker, text} objects, or SPC's "User 1: ..." lines."""
    if isinstance(value, str):  # a line without a speaker goes on with the utterance before it
        parts = re.split(r"^[ \t]*user ([12])[ \t]*:", value, flags=re.IGNORECASE | re.MULTILINE)
        if parts[0].strip() or len(parts) < 3:
            raise BadRow(field, "lines that start with 'User 1:' or 'User 2:'", show(value))
        yield from ((who, " ".join(said.split())) for who, said in zip(parts[1::2], parts[2::2], strict=True))
        return
    for i, said in enumerate(_list(value, field, "{'speaker', 'text'} objects")):
        if not isinstance(said, dict):
            raise BadRow(f"{field}[{i}]", "an object with 'speaker' and 'text'", show(said))
        speaker = " ".join(str(said.get("speaker")).split()).casefold()
        if speaker not in ("user 1", "user 2"):
            raise BadRow(f"{field}[{i}].speaker", "'User 1' or 'User 2'", show(said.get("speaker")))
        yield speaker[-1], _text(said.get("text"), f"{field}[{i}].text")


def _parse_spc(row: Mapping[str, Any]) -> Iterator[Parsed]:
    """Each utterance that answers one, from its speaker's view: the speaker is the assistant and has the persona."""
    personas = {}
    for who in "12":
        facts = row[f"user {who} personas"]  # the original CSV has one string with a fact a line
        personas[who] = parse_persona(facts.splitlines() if isinstance(facts, str) else facts, f"user {who} personas")
    field = "conversation" if "conversation" in row else "Best Generated Conversation"
    merged: list[tuple[str, str]] = []
    for who, said in _utterances(row[field], field):
        _text(said, field)
        if merged and merged[-1][0] == who:
            said = f"{merged.pop()[1]} {said}"
        merged.append((who, said))
    views = {me: tuple(Turn("assistant" if who == me else "user", said) for who, said in merged) for me in "12"}
    for i, (who, said) in enumerate(merged[1:], 1):
        yield personas[who], views[who][:i], said


def _parse_prompt_completion(row: Mapping[str, Any]) -> Iterator[Parsed]:
    prompt, completion = row["prompt"], row["completion"]
    turns = (Turn("user", _text(prompt, "prompt")),) if isinstance(prompt, str) else parse_turns(prompt, "prompt")
    if turns[-1].role != "user":
        raise BadRow("prompt", "a user turn at the end", "an assistant turn")
    if isinstance(completion, str):
        # In TRL's string form the completion is glued to the prompt: its leading space belongs to neither text.
        response = _text(completion, "completion").lstrip()
    else:
        (answer, *more) = parse_turns(completion, "completion")
        if more or answer.role != "assistant":
            raise BadRow("completion", "a string or one assistant message", show(completion))
        response = answer.content
    yield parse_persona(row["persona"], "persona"), turns, response


def parse_document(row: Mapping[str, Any]) -> str:
    """The text of a row of format text."""
    return _text(row["text"], "text")


PARSERS: dict[str, Callable[[Mapping[str, Any]], Iterator[Parsed]]] = {
    "perce": _parse_perce,
    "longlamp": _parse_profile,
    "lamp": _parse_profile,
    "convai2": _parse_convai2,
    "spc": _parse_spc,
    "prompt_completion": _parse_prompt_completion,
}
USER_FIELDS = {"longlamp": ("user_id", "name", "reviewerId", "author"), "lamp": ("user_id", "id")}
