"""The formats of rows, each an entry of FORMATS.

A row is recognised by the fields that an entry needs; docs/DATA.md shows a row of each. Fields that an entry does not
name are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from perce.reading import joins, parsers
from perce.reading.fields import list_of, names_in, show
from perce.reading.joins import Lookup
from perce.reading.parsers import Reply, Row
from perce.reading.readers import BadRow
from perce.visible import shortened


@dataclass(frozen=True)
class Format:
    """One format.

    title: whose rows these are.
    needs: fields that a row must have; "a|b": one of them. A row that fits two formats is of the one that needs more.
    parse: makes the examples of a row. gives: how many, in words.
    may_have: other fields that are read. lists: fields that hold lists, which a CSV has as texts. users: fields that
        name the user, the first that a row has counts; "a.b": b within a. A list of texts is replaced by its digest.
    history: whether the persona is a history from which passages are retrieved: always ("passages"), or only if the
        whole does not fit ("conversation").
    documents: whether its examples are documents, which have no persona.
    join: adds to a row what other rows or files know of it; see joins.py.
    """

    title: str
    needs: tuple[str, ...]
    parse: Callable[[Row], Iterator[Reply]]
    gives: str = "one"
    may_have: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    users: tuple[str, ...] = ("user_id",)
    history: Literal["none", "passages", "conversation"] = "none"
    documents: bool = False
    join: Callable[[Lookup, Row], Row] | None = None


A_MESSAGE = "one per assistant message that answers another message"
EACH_SIDE = "one per turn except the first, from its speaker's side"
FORMATS: dict[str, Format] = {
    "perce": Format(
        "your own rows; chat logs", ("persona", "query|messages", "response|messages"), parsers.parse_perce,
        f"one, or {A_MESSAGE}", may_have=("system", "personal_spans"), lists=("persona", "messages", "personal_spans"),
    ),
    "prompt_completion": Format(
        "TRL, prompt and completion", ("persona", "prompt", "completion"), parsers.parse_prompt_completion,
        may_have=("system",),
    ),
    "preference": Format(
        "TRL, preference pairs", ("persona", "prompt", "chosen", "rejected"), parsers.parse_preference,
        "one: the chosen reply", may_have=("system",),
    ),
    "sharegpt": Format(
        "ShareGPT", ("persona", "conversations"), parsers.parse_sharegpt, A_MESSAGE, may_have=("system", "chosen"),
        lists=("conversations",),
    ),
    "alpaca": Format(
        "Alpaca, LLaMA-Factory", ("persona|profile", "instruction", "output"), parsers.parse_alpaca,
        may_have=("input", "system", "history"), lists=("history",),
    ),
    "longlamp": Format(
        "LongLaMP", ("name|reviewerId|author", "input", "output", "profile"), parsers.parse_lamp, lists=("profile",),
        users=("user_id", "name", "reviewerId", "author"), history="passages",
    ),
    "lamp": Format(
        "LaMP", ("input", "output", "profile"), parsers.parse_lamp, users=("user_id", "id"), history="passages"
    ),
    "lamp_qa": Format(
        "LaMP-QA", ("id", "question", "profile", "rubric_aspects", "narrative"), parsers.parse_lamp_qa,
        may_have=("response",), users=("user_id", "id"), history="passages",
    ),
    "amazon": Format(
        "Amazon Reviews 2023", ("rating", "title", "text", "user_id"), parsers.parse_amazon,
        history="passages", join=joins.reviews_of_user,
    ),
    "convai2": Format(
        "ConvAI2, one dialogue per row", ("personality", "dialogue"), parsers.parse_convai2, "one per `self` line",
        lists=("personality", "dialogue"),
    ),
    "personachat": Format(
        "Persona-Chat of Hugging Face", ("personality", "utterances|candidates"), parsers.parse_personachat,
        "one per utterance: its last candidate", may_have=("history",), lists=("utterances", "candidates"),
        users=("user_id", "personality"),
    ),
    "spc": Format(
        "Synthetic-Persona-Chat",
        ("user 1 personas", "user 2 personas", "conversation|Best Generated Conversation"), parsers.parse_spc,
        EACH_SIDE, lists=("user 1 personas", "user 2 personas", "conversation"),
    ),
    "msc": Format(
        "Multi-Session Chat", ("personas", "dialog", "previous_dialogs"), parsers.parse_msc, EACH_SIDE,
        lists=("personas", "dialog", "previous_dialogs"), users=("user_id", "metadata.initial_data_id"),
        history="conversation",
    ),
    "personamem": Format(
        "PersonaMem v1",
        (
            "persona_id", "user_question_or_message", "all_options", "correct_answer", "shared_context_id",
            "end_index_in_shared_context",
        ),
        parsers.parse_personamem, lists=("all_options",), users=("user_id", "persona_id"),
        history="conversation", join=joins.shared_contexts,
    ),
    "personamem_v2": Format(
        "PersonaMem v2", ("persona_id", "user_query", "correct_answer", "|".join(joins.LINKS)),
        parsers.parse_personamem_v2, users=("user_id", "persona_id"),
        history="conversation", join=joins.linked_history,
    ),
    "prefeval": Format(
        "PrefEval", ("preference", "question"), parsers.parse_prefeval, may_have=("response", "response_to_q")
    ),
    "aloe": Format(
        "ALOE", ("profile", "conversations"), parsers.parse_aloe, "one per turn: the preferred reply",
        may_have=("personality",),
    ),
    "prism": Format(
        "PRISM", ("user_id", "conversation_history"), parsers.parse_prism, "one per turn: the chosen reply",
        lists=("conversation_history",), join=joins.survey_of_user,
    ),
    "text": Format("documents", ("text",), parsers.parse_document, "one document, without a persona", documents=True),
}  # fmt: skip
NEEDED = frozenset(name for entry in FORMATS.values() for need in entry.needs for name in need.split("|"))
_READ = {name.partition(".")[0] for entry in FORMATS.values() for name in (*entry.users, *entry.may_have)}
OPTIONAL = ({"weight", *_READ} - NEEDED) | {"user_id", "id"}
FIELDS = NEEDED | OPTIONAL
# Fields that may be lists of texts, objects or numbers. A query or a response that begins with "[" remains a text.
LISTS = tuple(dict.fromkeys(name for entry in FORMATS.values() for name in entry.lists))


def system_message(row: Row) -> tuple[str, object] | None:
    """(name of its field, text) of a row's system message; None if the row has none."""
    if row.get("system") not in (None, ""):
        return "system", row["system"]
    for field in ("messages", "conversations", "prompt"):
        if isinstance(messages := row.get(field), list | dict) and messages:
            first = list_of(messages, field, "messages")[0]
            if isinstance(first, dict) and first.get(names_in(first)[0]) == "system":
                return field, first.get(names_in(first)[1])
    return None


def with_marked_persona(row: dict[str, Any], start: str, end: str) -> dict[str, Any]:
    """The row with a field `persona`: the text between two marks is moved there from the system message.

    An empty `end` means the end of the message. A system message that held nothing else is left out. A row that has the
    field already stays as it is; a marked persona besides would stay in both prompts.
    """
    expected = f"a system message with the persona between {start!r} and {end or 'its end'!r}"
    found = system_message(row)
    if "persona" in row:
        if found and start in str(found[1]):
            raise BadRow("persona", f"either this field or a persona behind {start!r} in the system message", "both")
        return row
    if found is None:
        raise BadRow("persona", f"this field, or {expected}", "no system message")
    field, text = found
    before, opened, behind = str(text).partition(start)
    persona, closed, behind = behind.partition(end) if end else (behind, "-", "")
    if not opened or not closed:
        raise BadRow(field, expected, show(text))
    if start in behind:  # it would stay in both prompts
        raise BadRow(field, f"{expected} once", f"a second {shortened(start)!r} behind it")
    rest, row = f"{before.rstrip()}\n{behind.lstrip()}".strip(), {**row, "persona": persona.strip()}
    if field == "system":
        return {**row, "system": rest}
    first, *others = list_of(row[field], field, "messages")
    return {**row, field: [*([{**first, names_in(first)[1]: rest}] if rest else []), *others]}
