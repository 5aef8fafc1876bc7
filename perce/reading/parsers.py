"""The parsers of rows: row -> a `Reply` for each example. A `BadRow` names the field.

formats.py says which format has which parser; fields.py checks the values.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from perce.reading.fields import (
    TEXT_FIELDS,
    Turn,
    exchanges,
    list_of,
    parse_messages,
    parse_persona,
    passage_text,
    rating_of,
    said_in,
    same_words,
    show,
    text_of,
)  # fmt: skip
from perce.reading.joins import LINKS, Row
from perce.reading.literals import parse_list
from perce.reading.readers import BadRow, parse_json

SILENCE = "__ SILENCE __"  # Persona-Chat's placeholder where nobody has said anything yet
SPEAKERS = {"Speaker 1": "1", "Speaker 2": "2"}  # of MSC
PARTS = {"user": "user", "assistant": "assistant", "system": "system"}
USERS = {"User 1": "1", "User 2": "2"}  # of Synthetic-Persona-Chat
UNSAID = ("", "EMPTY STRING", "Prefer not to say")  # answers of PRISM's survey that say nothing
SURVEYED = (  # (label in the persona, field of the survey)
    ("", "self_description"), ("Wants of an assistant: ", "system_string"), ("Age: ", "age"), ("Gender: ", "gender"),
    ("Education: ", "education"), ("Employment: ", "employment_status"), ("Lives in: ", "reside_country"),
)  # fmt: skip


class Reply(NamedTuple):
    """The parts of a row that make one example."""

    persona: tuple[str, ...]  # best first; a history: the latest first
    turns: tuple[Turn, ...]
    response: str  # "" if the row asks for a response and has none
    weight: float = 1.0


def _replies(
    persona: tuple[str, ...], turns: tuple[Turn, ...], weights: Iterable[float] | None = None
) -> Iterator[Reply]:  # fmt: skip
    """Each assistant turn except an opening one, which answers nothing."""
    opening = 1 if turns[0].role == "system" else 0
    for i, (turn, weight) in enumerate(zip(turns, weights or [1.0] * len(turns), strict=True)):
        if turn.role == "assistant" and i > opening:
            yield Reply(persona, turns[:i], turn.content, weight)


def _user(row: Row, field: str) -> tuple[Turn, ...]:
    return (Turn("user", text_of(row[field], field)),)


def parse_perce(row: Row) -> Iterator[Reply]:
    persona = parse_persona(row["persona"], "persona")
    if "query" in row and "messages" in row:
        raise BadRow("query", "either 'query' or 'messages'", "both")
    if "query" in row:
        yield Reply(persona, _user(row, "query"), text_of(row["response"], "response"))
        return
    turns, weights = parse_messages(row["messages"], "messages")
    if ("response" in row) != (turns[-1].role == "user"):
        expected = "'messages' that end with a user turn, and a 'response', or that end with an assistant turn"
        got = f"a last {turns[-1].role} turn {'and' if 'response' in row else 'without'} a 'response'"
        raise BadRow("messages", expected, got)
    if "response" in row:
        yield Reply(persona, turns, text_of(row["response"], "response"))
    else:
        yield from _replies(persona, turns, weights)


def parse_sharegpt(row: Row) -> Iterator[Reply]:
    persona = parse_persona(row["persona"], "persona")
    turns, weights = parse_messages(row["conversations"], "conversations")
    if "chosen" not in row:
        yield from _replies(persona, turns, weights)
        return
    (chosen, *_), (weight, *_) = parse_messages([row["chosen"]], "chosen")  # LLaMA-Factory's preference pairs
    if chosen.role != "assistant":
        raise BadRow("chosen", "an assistant message", show(row["chosen"]))
    if turns[-1].role != "user":
        raise BadRow("conversations", "a user turn at the end, which 'chosen' answers", "an assistant turn")
    yield Reply(persona, turns, chosen.content, weight)


def _maybe(row: Row, field: str) -> list[Any]:
    """The list in a field that may be absent or empty."""
    return list_of(row.get(field, []), field, "entries", may_be_empty=True)


def parse_alpaca(row: Row) -> Iterator[Reply]:
    if "persona" in row and "profile" in row:
        raise BadRow("profile", "either 'persona' or 'profile'", "both")
    known = "persona" if "persona" in row else "profile"
    turns, persona = list[Turn](), parse_persona(row[known], known)
    for i, pair in enumerate(_maybe(row, "history")):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"history[{i}]", "a list of an instruction and its response", show(pair))
        for j, role in enumerate(("user", "assistant")):
            turns.append(Turn(role, text_of(pair[j], f"history[{i}][{j}]")))
    request = text_of(row["instruction"], "instruction")
    if row.get("input", "") != "":
        request += "\n" + text_of(row["input"], "input")
    yield Reply(persona, (*turns, Turn("user", request)), text_of(row["output"], "output"))


def _from_history(history: Any, field: str, request: tuple[Turn, ...], response: str) -> Reply:
    """A reply whose persona is the history, the newest entry first, because entries are dropped from the end; the files
    have the oldest entry first. An empty history is no persona."""
    entries = list_of(history, field, "objects", may_be_empty=True)
    if not entries:
        return Reply((), request, response)
    passages = []
    for i, entry in reversed(list(enumerate(entries))):
        texts = [entry.get(name) for name in TEXT_FIELDS] if isinstance(entry, dict) else [entry]
        if response and any(isinstance(text, str) and same_words(text, response) for text in texts):
            continue  # this is the target: with it in the prompt the model would only learn to copy
        if passage := passage_text(entry, f"{field}[{i}]"):
            passages.append(passage)
    if not passages:
        raise BadRow(field, "at least one entry with text other than the row's own output", show(entries))
    return Reply(tuple(passages), request, response)


def parse_lamp(row: Row) -> Iterator[Reply]:
    """LongLaMP and LaMP."""
    yield _from_history(row["profile"], "profile", _user(row, "input"), text_of(row["output"], "output"))


def _given(row: Row, *fields: str) -> str:
    """The response, or "" if the row has none: these data sets have none, or only in some of their files."""
    return next((text_of(row[name], name) for name in ("response", *fields) if name in row), "")


def parse_lamp_qa(row: Row) -> Iterator[Reply]:
    """The rubric and the narrative are for judges of an answer, and are not shown to the model."""
    yield _from_history(row["profile"], "profile", _user(row, "question"), _given(row))


def parse_amazon(row: Row) -> Iterator[Reply]:
    """One review as the response, with the user's other reviews as the persona."""
    rating, title, said = rating_of(row["rating"]), text_of(row["title"], "title"), text_of(row["text"], "text")
    history = tuple(passage for text, passage in row["history"] if not same_words(text, said))
    if not history:
        raise BadRow("user_id", "a user with at least one other review", show(row["user_id"]))
    request = f'Write a review with the rating {rating} and the title "{title}".'
    yield Reply(history, (Turn("user", request),), said)


def parse_convai2(row: Row) -> Iterator[Reply]:
    turns = []
    for i, pair in enumerate(list_of(row["dialogue"], "dialogue", "{'partner', 'self'} objects")):
        if not isinstance(pair, dict):
            raise BadRow(f"dialogue[{i}]", "an object with 'partner' and 'self'", show(pair))
        for role, name in (("user", "partner"), ("assistant", "self")):
            turns.append(Turn(role, text_of(pair.get(name), f"dialogue[{i}].{name}")))
    yield from _replies(parse_persona(row["personality"], "personality"), tuple(turns))


def parse_personachat(row: Row) -> Iterator[Reply]:
    """The last candidate of each utterance is what the person with the persona said."""
    persona = parse_persona(row["personality"], "personality")
    utterances = [("", row)]
    if "utterances" in row:
        listed = list_of(row["utterances"], "utterances", "{'history', 'candidates'} objects")
        utterances = [(f"utterances[{i}]", utterance) for i, utterance in enumerate(listed)]
    for where, utterance in utterances:
        if not isinstance(utterance, Mapping):
            raise BadRow(where, "an object with 'history' and 'candidates'", show(utterance))
        history, candidates = (f"{where}.{name}".lstrip(".") for name in ("history", "candidates"))
        lines = list_of(utterance.get("history"), history, "texts", may_be_empty=True)
        said = [text_of(line, f"{history}[{i}]") for i, line in enumerate(lines) if line != SILENCE]
        gold = text_of(list_of(utterance.get("candidates"), candidates, "texts")[-1], f"{candidates}[-1]")
        roles = ["assistant" if (len(said) - i) % 2 == 0 else "user" for i in range(len(said))]
        if said:
            yield Reply(persona, tuple(map(Turn, roles, said)), gold)


def _utterances(value: object, field: str) -> Iterator[tuple[str, str]]:
    """(speaker "1" or "2", text) of a conversation: {speaker, text} objects, or SPC's "User 1: ..." lines."""
    if isinstance(value, str):  # a line without a speaker continues the utterance before it
        parts = re.split(r"^[ \t]*user ([12])[ \t]*:", value, flags=re.IGNORECASE | re.MULTILINE)
        if parts[0].strip() or len(parts) < 3:
            raise BadRow(field, "lines that start with 'User 1:' or 'User 2:'", show(value))
        yield from ((who, " ".join(said.split())) for who, said in zip(parts[1::2], parts[2::2], strict=True))
    else:
        yield from ((who, text) for who, text, _ in said_in(value, field, "speaker", "text", USERS))


def _from_each_side(personas: Mapping[str, tuple[str, ...]], said: Iterable[tuple[str, str]]) -> Iterator[Reply]:
    """Each utterance that answers another, from its speaker's side: the speaker is the assistant with the persona."""
    merged: list[tuple[str, str]] = []
    for who, text in said:
        merged.append((who, f"{merged.pop()[1]} {text}" if merged and merged[-1][0] == who else text))
    views = {me: tuple(Turn("assistant" if who == me else "user", text) for who, text in merged) for me in personas}
    for i, (who, text) in enumerate(merged[1:], 1):
        yield Reply(personas[who], views[who][:i], text)


def parse_spc(row: Row) -> Iterator[Reply]:
    personas = {}
    for who in "12":
        facts, field = row[f"user {who} personas"], f"user {who} personas"
        if isinstance(facts, str):  # the original CSV has one string with one fact per line
            facts = facts.splitlines() or facts
        personas[who] = parse_persona(facts, field)
    field = "conversation" if "conversation" in row else "Best Generated Conversation"
    yield from _from_each_side(personas, ((who, text_of(text, field)) for who, text in _utterances(row[field], field)))


def parse_document(row: Row) -> Iterator[Reply]:
    """A text by itself: no persona, no turns."""
    yield Reply((), (), text_of(row["text"], "text"))


def _of_trl(answer: str) -> Callable[[Row], Iterator[Reply]]:
    """The parser of TRL's rows, whose prompt and reply (in the field `answer`) are strings or messages."""

    def parse(row: Row) -> Iterator[Reply]:
        said, weight = row[answer], 1.0
        turns = _user(row, "prompt") if isinstance(row["prompt"], str) else parse_messages(row["prompt"], "prompt")[0]
        if turns[-1].role != "user":
            raise BadRow("prompt", "a user turn at the end", "an assistant turn")
        if isinstance(said, str):
            # TRL appends a string completion to the prompt as it is: its leading space belongs to neither text.
            response = text_of(said, answer).lstrip()
        else:
            (only, *more), (weight, *_) = parse_messages(said, answer)
            if more or only.role != "assistant":
                raise BadRow(answer, "a string or one assistant message", show(said))
            response = only.content
        yield Reply(parse_persona(row["persona"], "persona"), turns, response, weight)

    return parse


parse_prompt_completion, parse_preference = _of_trl("completion"), _of_trl("chosen")


def parse_msc(row: Row) -> Iterator[Reply]:
    """Each speaker's replies. The persona is the earlier sessions, the latest first, and then the facts about the
    speaker, so that the facts stand first if the whole is shown, oldest first. An entry of an earlier session may not
    name its speaker: Speaker 1 begins, and they alternate."""
    facts = list_of(row["personas"], "personas", "two lists of facts")
    if len(facts) != 2:
        raise BadRow("personas", "two lists of facts, one per speaker", show(facts))
    earlier = []
    for i, session in enumerate(_maybe(row, "previous_dialogs")):
        field = f"previous_dialogs[{i}].dialog"
        said = list_of(session.get("dialog") if isinstance(session, dict) else session, field, "{'id', 'text'} objects")
        known = [one | {"id": one.get("id") or [*SPEAKERS][j % 2]} if isinstance(one, dict) else one
                 for j, one in enumerate(said)]  # fmt: skip
        earlier.append([(who, text) for who, text, _ in said_in(known, field, "id", "text", SPEAKERS)])
    personas = {}
    for me, known in zip("12", facts, strict=True):
        views = ([("assistant" if who == me else "user", text) for who, text in said] for said in reversed(earlier))
        told = parse_persona(known, f"personas[{int(me) - 1}]")
        personas[me] = (*chain.from_iterable(map(exchanges, views)), *reversed(told))
    said_now = said_in(row["dialog"], "dialog", "id", "text", SPEAKERS)
    yield from _from_each_side(personas, ((who, text) for who, text, _ in said_now))


def _history(messages: object, field: str) -> tuple[str, ...]:
    return exchanges((role, text) for role, text, _ in said_in(messages, field, "role", "content", PARTS))


def parse_personamem(row: Row) -> Iterator[Reply]:
    """A question after the first messages of a context. The response is the option that `correct_answer` labels."""
    end, context = row["end_index_in_shared_context"], list_of(row["context"], "shared_context_id", "messages")
    if not re.fullmatch(r"\d{1,9}", str(end), re.ASCII) or not 0 < int(end) <= len(context):
        raise BadRow("end_index_in_shared_context", f"a number from 1 to {len(context)}", show(end))
    options = [text_of(x, "all_options").strip() for x in list_of(row["all_options"], "all_options", "texts")]
    label = text_of(row["correct_answer"], "correct_answer").strip()
    texts = [option.removeprefix(label).strip() for option in options if option.startswith(label)]
    if len(texts) != 1:
        raise BadRow("correct_answer", "the label of one of all_options, such as (a)", show(label))
    request, response = _user(row, "user_question_or_message"), text_of(texts[0], "all_options")
    yield Reply(_history(context[: int(end)], "shared_context_id"), request, response)


def parse_personamem_v2(row: Row) -> Iterator[Reply]:
    query = row["user_query"]
    if isinstance(query, str) and query.lstrip().startswith("{"):
        with contextlib.suppress(BadRow):  # a message as Python prints it; or else a plain text
            printed = parse_list(f"[{query.strip()}]", "user_query")
            query = printed[0] if isinstance(printed, list) else query
    said = {"user_query": query.get("content") if isinstance(query, dict) else query}
    context = _history(row["context"], next(name for name in LINKS if name in row))
    yield Reply(context, _user(said, "user_query"), text_of(row["correct_answer"], "correct_answer"))


def parse_prefeval(row: Row) -> Iterator[Reply]:
    """The preference is the persona. Only the files for fine-tuning have an answer to the question."""
    persona = parse_persona(row["preference"], "preference")
    yield Reply(persona, _user(row, "question"), _given(row, "response_to_q").lstrip())


def _unquoted(text: object) -> object:
    """The value of a text that is a JSON string: the published rows hold such strings, copied from a file of them."""
    with contextlib.suppress(ValueError):
        return parse_json(text.strip()) if isinstance(text, str) and text.strip().startswith('"') else text
    return text


def parse_aloe(row: Row) -> Iterator[Reply]:
    """The preferred reply of each turn, after the replies with which the conversation continued."""
    known = [(row[name], name) for name in ("profile", "personality") if name in row]
    persona = tuple(chain.from_iterable(parse_persona(_unquoted(entry), name) for entry, name in known))
    turns: list[Turn] = []
    went_on: tuple[object, str] | None = None  # the reply with which the conversation continued, and its field
    for i, turn in enumerate(list_of(row["conversations"], "conversations", "{'user', 'assistant', 'chosen'} objects")):
        here = f"conversations[{i}]"
        replies = turn.get("assistant") if isinstance(turn, dict) else None
        if not isinstance(replies, dict):
            expected = "an object with 'user' and 'assistant': {'preferred', 'rejected'}"
            if isinstance(turn, dict) and "from" in turn:
                expected += " (for ShareGPT's messages with a persona: --columns persona=profile)"
            raise BadRow(here, expected, show(turn))
        turns += [Turn("assistant", text_of(*went_on))] if went_on else []
        turns.append(Turn("user", text_of(turn.get("user"), f"{here}.user")))
        preferred = text_of(replies.get("preferred"), f"{here}.assistant.preferred")
        yield Reply(persona, tuple(turns), preferred)
        if (chosen := turn.get("chosen") or "preferred") not in ("preferred", "rejected"):
            raise BadRow(f"{here}.chosen", "'preferred' or 'rejected'", show(chosen))
        said = replies.get(chosen)
        went_on = said[0] if isinstance(said, list) and said else said, f"{here}.assistant.{chosen}"


def parse_prism(row: Row) -> Iterator[Reply]:
    """The chosen reply of each turn. The persona is what users said about themselves in the survey."""
    survey, place = row["survey"], row["survey"].get("location")
    survey = {**survey, **place} if isinstance(place, dict) else survey
    answers = ((label, survey.get(name)) for label, name in SURVEYED)
    persona = [label + text.strip() for label, text in answers if isinstance(text, str) and text.strip() not in UNSAID]
    if not persona:
        raise BadRow("user_id", "a user who said something about themselves in the survey", show(row["user_id"]))
    messages: list[dict[str, str]] = []
    names = {"user": "user", "model": "assistant"}
    entries = said_in(row["conversation_history"], "conversation_history", "role", "content", names)
    for i, (role, text, said) in enumerate(entries):
        before, here = messages[-1]["role"] if messages else "", f"conversation_history[{i}]"
        if said.get("if_chosen") not in (None, False, True):
            raise BadRow(f"{here}.if_chosen", "true or false", show(said["if_chosen"]))
        if role == before == "user":
            raise BadRow(f"{here}.role", "a chosen reply before this user message", "a second user message")
        if role == "user" or (said.get("if_chosen") and before == "user"):  # the first if several are chosen
            messages.append({"role": role, "content": text})
    yield from _replies(tuple(persona), parse_messages(messages, "conversation_history")[0])
