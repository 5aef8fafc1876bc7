"""Finds what a row refers to: files in its directory, and the other rows of its user.

    format          file of the rows        what is looked up
    personamem      questions_32k.csv       shared_contexts_32k.jsonl, one {context id: messages} per line; if the rows'
                                            file has another name: shared_contexts.jsonl
    personamem_v2   benchmark.csv           the file of messages that a row names
    prism           conversations.jsonl     survey.jsonl, one row per user
    amazon          reviews.jsonl           all reviews of a user

A file is read when the first row needs it, and held in memory.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from perce.errors import UserError, in_one_line
from perce.reading.fields import passage_text, rating_of, show, text_of
from perce.reading.readers import BadRow, json_file, whole_json
from perce.visible import shortened

Row = Mapping[str, Any]
Made = TypeVar("Made")
KEPT = 64  # how many of the latest files that rows name are held in memory
ABOVE = 4  # how many directories above the rows' own are searched for a file that a row names
LINKS = ("chat_history_32k_link", "chat_history_128k_link")  # of PersonaMem v2


class Lookup:
    """Finds what the rows of one source refer to.

    Args:
        path: the rows' file; None if the rows come from the datasets library and have no other files next to them.
        rows: reads all rows.
    """

    def __init__(self, path: Path | None, rows: Callable[[], Iterator[Row]]):
        self.path, self.rows = path, rows
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, made at the first call with this key."""
        if key not in self._made:
            try:
                self._made[key] = make()
            except OSError as error:
                raise UserError(f"{key}: cannot be read ({error.strerror or in_one_line(error)}).") from error
            if len(self._made) > KEPT:
                del self._made[next(iter(self._made))]
        return self._made[key]

    def file(self, name: str, field: str, above: int = 0) -> Path:
        """The file of this name in the rows' directory or one of `above` directories above; BadRow if none has it."""
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BadRow(field, "a path relative to the data's directory, without '..'", show(name))
        folders = [self.path.resolve().parent, *self.path.resolve().parents[1 : above + 1]] if self.path else []
        for folder in folders:
            with contextlib.suppress(OSError):  # a name that the system refuses names no file
                if (folder / name).is_file():
                    return folder / name
        got = f"none in {folders[0]}" if folders else "rows of the datasets library, which have no file next to them"
        bad = BadRow(field, f"the file {shortened(name)} in the data's directory", got)
        bad.remedy = " Download that file too, and give --data the file of the rows."
        raise bad

    def entry(self, row: Row, field: str, name: str, items: Callable[[Row], Iterable[tuple[str, Any]]]) -> Any:
        """The value whose id a row's field holds, from the file of this name; `items` gives the (id, value) pairs of an
        object in that file. BadRow if the file has no such id."""
        path = self.file(name, field)
        found = self.once(path, lambda: _by_id(path, items))
        if str(row[field]) not in found:
            raise BadRow(field, f"an id that {path.name} has", show(row[field]))
        return found[str(row[field])]


def _by_id(path: Path, items: Callable[[Row], Iterable[tuple[str, Any]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place, row in json_file(path):
        if not isinstance(row, dict):
            got = row if isinstance(row, BadRow) else f"expected an object, got {show(row)}"
            raise UserError(f"{path}{place}: {got}. Correct that file.")
        for key, value in items(row):
            if key in found:
                raise UserError(f"{path}{place}: the id {shortened(key)!r} is there twice. Correct that file.")
            found[key] = value
    return found


def shared_contexts(lookup: Lookup, row: Row) -> Row:
    """PersonaMem: adds the conversation after which the question is asked."""
    size = (lookup.path.stem if lookup.path else "questions_32k").partition("questions")[2]
    context = lookup.entry(row, "shared_context_id", f"shared_contexts{size}.jsonl", lambda line: line.items())
    return {**row, "context": context}


def linked_history(lookup: Lookup, row: Row) -> Row:
    """PersonaMem v2: adds the conversation from the file that the row names, in the data set's directory."""
    field = next(name for name in LINKS if name in row)
    path = lookup.file(text_of(row[field], field), field, ABOVE)
    history = lookup.once(path, lambda: whole_json(path))
    return {**row, "context": history.get("chat_history") if isinstance(history, dict) else history}


def survey_of_user(lookup: Lookup, row: Row) -> Row:
    """PRISM: adds the user's answers to the survey, which were given before the conversations."""
    answers = lookup.entry(
        row, "user_id", "survey.jsonl", lambda line: [(str(line["user_id"]), line)] if "user_id" in line else []
    )
    return {**row, "survey": answers}


def reviews_of_user(lookup: Lookup, row: Row) -> Row:
    """Amazon: adds (text, passage) of each usable review of the user, the latest first."""

    def by_user() -> dict[str, list[tuple[str, str]]]:
        dated: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
        for review in lookup.rows():
            with contextlib.suppress(BadRow):  # a bad review is reported when its own row is read
                text, _ = (text_of(review.get(name), name) for name in ("text", "title"))
                rating_of(review.get("rating"))
                date = str(review.get("timestamp")).zfill(20)
                dated[str(review.get("user_id"))].append((date, text, passage_text(review, "")))
        return {
            user: [(text, passage) for _, text, passage in sorted(reviews, key=lambda review: review[0])[::-1]]
            for user, reviews in dated.items()
        }

    return {**row, "history": lookup.once("reviews", by_user).get(str(row["user_id"]), [])}
