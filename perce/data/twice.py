"""Rows that a trainer of others tokenises: told twice, with the persona and without, and put together again.

{"persona", "messages" | "prompt", "completion" | "text"}   →   tell   →   two such rows, the second without persona
their `input_ids` and `labels`, by the trainer              →   join   →   one row, as data/marked.py has them
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, IterableDataset

from perce.data.fields import parse_persona
from perce.data.marked import IGNORED, PERSONA, persona_span
from perce.data.prompt import PERSONA_FOOTERS, PromptStyle, tell
from perce.data.readers import BadRow
from perce.errors import UserError
from perce.visible import say

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Twice:
    """How rows are told, and how long they may be. Methods with columns are for Dataset.map(batched=True)."""

    name: str
    """Of the dataset, in errors."""
    tokenizer: Any
    style: PromptStyle
    has_system_role: bool
    text_field: str
    max_length: int | None

    def prepared(self, dataset: Any, columns: Sequence[str], prepare: Callable[[Any], Any]) -> Any:
        """Rows with these columns → `input_ids` and `labels`. dataset: a Dataset or an IterableDataset; prepare: gives
        each row its ids and labels, in their order, and leaves other columns.

        UserError for a row that cannot be used, and where no row has a token left to learn.
        """
        footers = PERSONA_FOOTERS if self.style.footer is None else (self.style.footer,)
        ways = [replace(self, style=replace(self.style, footer=footer)) for footer in footers]
        failures: list[UserError] = []
        for way in ways:
            try:
                [*way._joined(dataset.take(1), columns, prepare)]
                break
            except UserError as error:
                failures.append(error)
        else:
            raise failures[0]
        rows = way._joined(dataset, columns, prepare)
        if isinstance(rows, Dataset):
            if not len(rows):
                raise UserError(
                    f"{self.name} dataset: no row has a token to learn within max_length {self.max_length}."
                )
            entries, ends = sum(rows["left_out"]), sum(rows["is_cut"])
            if entries or ends:
                limit = f"to fit max_length {self.max_length}"
                say(f"{self.name}: {entries:,} persona entries left out, and {ends:,} rows cut at their end, {limit}")
        return rows.remove_columns(["left_out", "is_cut"])

    def _joined(self, rows: Any, columns: Sequence[str], prepare: Callable[[Any], Any]) -> Any:
        both = prepare(rows.map(self.tell, batched=True, with_indices=True, remove_columns=[*columns]))
        names = [*next(iter(both))] if isinstance(both, IterableDataset) else both.column_names
        return both.map(self.join, batched=True, remove_columns=names)

    def _block(self, entries: Sequence[str]) -> str:
        return self.style.block(entries, self.style.footer or "")

    def tell(self, rows: Columns, numbers: Sequence[int]) -> dict[str, list[Any]]:
        """Two rows of each; `persona` is a list of entries, `number` the row's. UserError for one without a persona."""
        told: list[dict[str, Any]] = []
        for i, number in enumerate(numbers):
            row = {name: column[i] for name, column in rows.items()}
            place = next((name for name in ("prompt", "messages", self.text_field) if name in row), None)
            try:
                if place is None:
                    raise UserError(f"expected prompt, messages or {self.text_field}, got {', '.join(row)}.")
                entries = parse_persona(row["persona"], "persona")
                for block in (self._block(entries), ""):
                    prompt = row[place]
                    is_text = isinstance(prompt, str)
                    told_one = block + prompt if is_text else tell(prompt, block, self.style, self.has_system_role)
                    told.append(row | {place: told_one, "persona": entries, "number": number})
            except (BadRow, UserError, TypeError, KeyError, IndexError) as error:
                raise UserError(f"{self.name} row {number + 1}: {error}") from None
        return {name: [row[name] for row in told] for name in told[0]}

    def join(self, rows: Columns) -> dict[str, list[Any]]:
        """`input_ids` and `labels` of each two rows; beside them how many entries were left out, and whether the end of
        the row is cut off to fit max_length. Rows of which no token is left to learn are left out."""
        joined = []
        for i in range(0, len(rows["input_ids"]), 2):
            (ids, ids_cf), (labels, labels_cf) = (list(rows[name][i : i + 2]) for name in ("input_ids", "labels"))
            span = persona_span(ids, ids_cf)
            if span is None or labels[: span[0]] + labels[span[1] :] != labels_cf:
                raise UserError(
                    f"{self.name} row {rows['number'][i] + 1}: without its persona it has other tokens than with it, "
                    "so that the two passes could not be aligned. Give it a prompt that begins with a word, or the "
                    "tokenizer another chat template."
                )
            ids, left_out = self._fitting(ids, ids_cf, span, rows["persona"][i])
            end = len(ids) - len(ids_cf) + span[0]
            marked = (labels_cf[: span[0]] + [PERSONA] * (end - span[0]) + labels_cf[span[0] :])[: self.max_length]
            if any(label not in (IGNORED, PERSONA) for label in marked):
                row = {"input_ids": ids[: self.max_length], "labels": marked, "left_out": left_out}
                joined.append(row | {"is_cut": len(ids) > len(marked)})
        return {name: [row[name] for row in joined] for name in ("input_ids", "labels", "left_out", "is_cut")}

    def _fitting(
        self, ids: list[int], ids_cf: list[int], span: tuple[int, int], entries: Sequence[str]
    ) -> tuple[list[int], int]:
        """The ids with as many entries as fit max_length, but one at least, and how many entries they lack; all, where
        this tokenizer gives a persona by itself other ids than within its prompt."""

        def block(count: int) -> list[int]:
            return self.tokenizer(self._block(entries[:count]), add_special_tokens=False)["input_ids"]

        if self.max_length is None or len(ids) <= self.max_length or block(len(entries)) != ids[slice(*span)]:
            return ids, 0
        room = self.max_length - len(ids_cf)
        kept = max(1, bisect_right(range(1, len(entries) + 1), room, key=lambda count: len(block(count))))
        return ids_cf[: span[0]] + block(kept) + ids_cf[span[0] :], len(entries) - kept
