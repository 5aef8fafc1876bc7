"""What rows are read with that does not stand in them: other files in their directory, and the other rows.

    personamem      questions_32k.csv       shared_contexts_32k.jsonl, {context id: messages} a line
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

from perce.data.fields import show
from perce.data.readers import BadRow, Placed, json_file, whole_json
from perce.errors import UserError

Made = TypeVar("Made")
KEPT = 64  # files that rows name: the latest are held
ABOVE = 4  # directories above the rows' own in which a file that a row names is looked for


class Beside:
    """What stands beside the rows of one source.

    Args:
        path: their file; None where they are of a data set of the datasets library, which has no files beside it.
        rows: reads all of them, with their places.
    """

    def __init__(self, path: Path | None, rows: Callable[[], Iterator[tuple[str, Mapping[str, Any]]]]):
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


def shared_contexts(beside: Beside, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """PersonaMem: the conversation that a question is asked after."""
    name = beside.path.name if beside.path else "questions_32k.csv"
    path = beside.file(
        Path(name.replace("questions", "shared_contexts")).with_suffix(".jsonl").name, "shared_context_id"
    )
    contexts = beside.once(path, lambda: _merged(path, json_file(path)))
    key = row["shared_context_id"]
    if not isinstance(key, str) or key not in contexts:
        raise BadRow("shared_context_id", f"an id of {path.name}", show(key))
    return {**row, "context": contexts[key]}


def _merged(path: Path, rows: Placed) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f"{path}{place}: {row if isinstance(row, BadRow) else f'expected an object, got {show(row)}'}."
            )
        found |= row
    return found


LINKS = ("chat_history_32k_link", "chat_history_128k_link")


def linked_history(beside: Beside, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """PersonaMem v2: the conversation of the file that a row names, from the data set's own directory."""
    field = next(name for name in LINKS if name in row)
    if not isinstance(row[field], str) or not row[field].strip():
        raise BadRow(field, "a path", show(row[field]))
    path = beside.file(row[field], field, ABOVE)
    history = beside.once(path, lambda: whole_json(path))
    return {**row, "context": history.get("chat_history") if isinstance(history, dict) else history}


def survey_of_user(beside: Beside, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """PRISM: what the user has answered before the conversations."""
    path = beside.file("survey.jsonl", "user_id")
    users = beside.once(
        path,
        lambda: {
            str(said["user_id"]): said for _, said in json_file(path) if isinstance(said, dict) and "user_id" in said
        },
    )
    if str(row["user_id"]) not in users:
        raise BadRow("user_id", f"a user_id of {path.name}", show(row["user_id"]))
    return {**row, "survey": users[str(row["user_id"])]}


def reviews_of_user(beside: Beside, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Amazon: all reviews of the user, the oldest first."""

    def by_user() -> dict[Any, list[dict[str, Any]]]:
        found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for _, review in beside.rows():
            found[str(review.get("user_id"))].append(
                {name: review.get(name) for name in ("rating", "title", "text", "timestamp")}
            )
        return found

    reviews = beside.once("reviews", by_user)[str(row["user_id"])]
    return {**row, "history": sorted(reviews, key=lambda review: str(review["timestamp"]).zfill(20))}
