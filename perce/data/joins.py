"""What a row refers to: files in its directory, and the other rows of its user.

    personamem      questions_32k.csv       shared_contexts_32k.jsonl, {context id: messages} a line; beside a file of
                                            another name shared_contexts.jsonl
    personamem_v2   benchmark.csv           the file of messages that a row names
    prism           conversations.jsonl     survey.jsonl, a row a user
    amazon          reviews.jsonl           all reviews of a user

Each is read when its first row is met, and held in memory.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from perce.data.fields import passage_text, rating_of, show, text_of
from perce.data.readers import BadRow, json_file, whole_json
from perce.errors import UserError, in_one_line
from perce.visible import shortened

Row = Mapping[str, Any]
Made = TypeVar("Made")
KEPT = 64  # files that rows name: the latest are held
ABOVE = 4  # directories above the rows' own in which a file that a row names is looked for
LINKS = ("chat_history_32k_link", "chat_history_128k_link")  # of PersonaMem v2


class Lookup:
    """Finds what the rows of one source refer to.

    Args:
        path: their file; None where they are of a data set of the datasets library, which has no files beside it.
        rows: reads all of them.
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
        """The file of this name in the rows' directory, or so many above it; BadRow, naming the field, if none is."""
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BadRow(field, "a path below the data's directory", show(name))
        folders = [self.path.resolve().parent, *self.path.resolve().parents[1 : above + 1]] if self.path else []
        for folder in folders:
            with contextlib.suppress(OSError):  # a name that the system refuses is none of a file
                if (folder / name).is_file():
                    return folder / name
        got = f"none in {folders[0]}" if folders else "rows of the datasets library, which has no files beside them"
        bad = BadRow(field, f"the file {shortened(name)} beside the data", got)
        bad.remedy = " Download it too, and give --data the file of the rows."
        raise bad

    def entry(self, row: Row, field: str, name: str, items: Callable[[Row], Iterable[tuple[str, Any]]]) -> Any:
        """What stands under a row's field in the file of this name, whose objects have these (id, value) items; BadRow
        where nothing does."""
        path = self.file(name, field)
        found = self.once(path, lambda: _by_id(path, items))
        if str(row[field]) not in found:
            raise BadRow(field, f"one of {path.name}", show(row[field]))
        return found[str(row[field])]


def _by_id(path: Path, items: Callable[[Row], Iterable[tuple[str, Any]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place, row in json_file(path):
        if not isinstance(row, dict):
            got = row if isinstance(row, BadRow) else f"expected an object, got {show(row)}"
            raise UserError(f"{path}{place}: {got}. Correct the file.")
        for key, value in items(row):
            if key in found:
                raise UserError(f"{path}{place}: {shortened(key)!r} is there twice. Correct the file.")
            found[key] = value
    return found


def shared_contexts(lookup: Lookup, row: Row) -> Row:
    """PersonaMem: the conversation that a question is asked after."""
    size = (lookup.path.stem if lookup.path else "questions_32k").partition("questions")[2]
    context = lookup.entry(row, "shared_context_id", f"shared_contexts{size}.jsonl", lambda line: line.items())
    return {**row, "context": context}


def linked_history(lookup: Lookup, row: Row) -> Row:
    """PersonaMem v2: the conversation of the file that a row names, from the data set's own directory."""
    field = next(name for name in LINKS if name in row)
    path = lookup.file(text_of(row[field], field), field, ABOVE)
    history = lookup.once(path, lambda: whole_json(path))
    return {**row, "context": history.get("chat_history") if isinstance(history, dict) else history}


def survey_of_user(lookup: Lookup, row: Row) -> Row:
    """PRISM: what the user has answered before the conversations."""
    answers = lookup.entry(
        row, "user_id", "survey.jsonl", lambda line: [(str(line["user_id"]), line)] if "user_id" in line else []
    )
    return {**row, "survey": answers}


def reviews_of_user(lookup: Lookup, row: Row) -> Row:
    """Amazon: (text, passage) of each review of the user that can be used, the latest first."""

    def by_user() -> dict[str, list[tuple[str, str]]]:
        dated: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
        for review in lookup.rows():
            with contextlib.suppress(BadRow):  # of which its own row is told
                text, _ = (text_of(review.get(name), name) for name in ("text", "title"))
                rating_of(review.get("rating"))
                date = str(review.get("timestamp")).zfill(20)
                dated[str(review.get("user_id"))].append((date, text, passage_text(review, "")))
        return {
            user: [(text, passage) for _, text, passage in sorted(reviews, key=lambda review: review[0])[::-1]]
            for user, reviews in dated.items()
        }

    return {**row, "history": lookup.once("reviews", by_user).get(str(row["user_id"]), [])}
