"""What rows are read with that does not stand in them: other files in their directory, and the other rows.

    personamem      questions_32k.csv       shared_contexts_32k.jsonl, {context id: messages} a line; beside a file of
                                            another name shared_contexts.jsonl
    personamem_v2   benchmark.csv           the file of messages that a row names
    prism           conversations.jsonl     survey.jsonl, a row a user
    amazon          reviews.jsonl           all reviews of a user

Each is read when its first row is met, and held in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from perce.data.fields import show, text_of
from perce.data.readers import BadRow, json_file, whole_json
from perce.errors import UserError

Row = Mapping[str, Any]
Made = TypeVar("Made")
KEPT = 64  # files that rows name: the latest are held
ABOVE = 4  # directories above the rows' own in which a file that a row names is looked for
LINKS = ("chat_history_32k_link", "chat_history_128k_link")  # of PersonaMem v2
REVIEW = ("rating", "title", "text", "timestamp")


class Lookup:
    """What stands beside the rows of one source.

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
            self._made[key] = make()
            if len(self._made) > KEPT:
                del self._made[next(iter(self._made))]
        return self._made[key]

    def file(self, name: str, field: str, above: int = 0) -> Path:
        """The file of this name in the rows' directory, or so many above it; BadRow, naming the field, if none is."""
        folders = [self.path.resolve().parent, *self.path.resolve().parents[1 : above + 1]] if self.path else []
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
        got = f"none in {folders[0]}" if folders else "rows of the datasets library, which has no files beside them"
        bad = BadRow(field, f"the file {name} beside the data", got)
        bad.remedy = " Download it too, and give --data the file of the rows."
        raise bad

    def entry(self, row: Row, field: str, name: str, make: Callable[[Iterator[Row]], dict[str, Any]]) -> Any:
        """What `make` has under a row's field, of the objects of the file of this name; BadRow where it has nothing."""
        path = self.file(name, field)
        found = self.once(path, lambda: make(_objects(path)))
        if str(row[field]) not in found:
            raise BadRow(field, f"one of {path.name}", show(row[field]))
        return found[str(row[field])]


def _objects(path: Path) -> Iterator[Row]:
    for place, row in json_file(path):
        if not isinstance(row, dict):
            got = row if isinstance(row, BadRow) else f"expected an object, got {show(row)}"
            raise UserError(f"{path}{place}: {got}. Correct the file.")
        yield row


def _merged(rows: Iterator[Row]) -> dict[str, Any]:
    return {key: value for row in rows for key, value in row.items()}


def shared_contexts(beside: Lookup, row: Row) -> Row:
    """PersonaMem: the conversation that a question is asked after."""
    size = (beside.path.stem if beside.path else "questions_32k").partition("questions")[2]
    name = f"shared_contexts{size}.jsonl"
    return {**row, "context": beside.entry(row, "shared_context_id", name, _merged)}


def linked_history(beside: Lookup, row: Row) -> Row:
    """PersonaMem v2: the conversation of the file that a row names, from the data set's own directory."""
    field = next(name for name in LINKS if name in row)
    path = beside.file(text_of(row[field], field), field, ABOVE)
    history = beside.once(path, lambda: whole_json(path))
    return {**row, "context": history.get("chat_history") if isinstance(history, dict) else history}


def survey_of_user(beside: Lookup, row: Row) -> Row:
    """PRISM: what the user has answered before the conversations."""

    def by_user(rows: Iterator[Row]) -> dict[str, Row]:
        return {str(answers.get("user_id")): answers for answers in rows}

    return {**row, "survey": beside.entry(row, "user_id", "survey.jsonl", by_user)}


def reviews_of_user(beside: Lookup, row: Row) -> Row:
    """Amazon: all reviews of the user, the oldest first."""

    def by_user() -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = defaultdict(list)
        for review in beside.rows():
            found[str(review.get("user_id"))].append({name: review.get(name) for name in REVIEW})
        return found

    reviews = beside.once("reviews", by_user)[str(row["user_id"])]
    return {**row, "history": sorted(reviews, key=lambda review: str(review["timestamp"]).zfill(20))}
