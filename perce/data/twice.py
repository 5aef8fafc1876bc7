"""For trainers of other libraries, which tokenise rows themselves: each row is written twice, with its persona and
without, and the two tokenised rows are joined.

{"persona", "messages" | "prompt", "completion" | "text"}   →   tell   →   two such rows, the second without persona
their `input_ids` and `labels`, from the trainer            →   join   →   one row with the labels of data/marked.py
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset

from perce.config.prompt import PERSONA_FOOTERS, PromptStyle
from perce.data.chat import LIKE_CONTROL
from perce.data.marked import IGNORED, NO_PERSONA, PERSONA, persona_span
from perce.data.prompt import tell
from perce.errors import UserError
from perce.process import is_first_process
from perce.reading.fields import parse_persona
from perce.reading.readers import BadRow
from perce.visible import say

Columns = Mapping[str, Sequence[Any]]
LOOKED_AT = 1000  # rows among which one with a persona is looked for


@dataclass(frozen=True)
class Twice:
    """How rows are written, and how long they may be. Methods that take columns are for Dataset.map(batched=True)."""

    name: str
    """The dataset's name in error messages."""
    tokenizer: Any
    style: PromptStyle
    has_system_role: bool
    text_field: str
    max_length: int | None
    version: int = 4
    """The version of this file. Raise it if the same rows give other results, or `datasets` reuses its cached ones."""

    def prepared(self, dataset: Any, columns: Sequence[str], prepare: Callable[[Any], Any]) -> Any:
        """Rows with these columns → `input_ids` and `labels`. dataset: a Dataset or an IterableDataset; prepare: adds
        ids and labels to the rows, in order, and keeps the other columns.

        For a Dataset, prints how many rows have no persona, and what is lost to max_length. UserError for a row that
        cannot be used, and if no row of a Dataset has a token left to learn.
        """
        dataset = dataset.with_format(None)  # others have arrays, which are neither true nor false
        footers = PERSONA_FOOTERS if self.style.footer is None else (self.style.footer,)
        ways = [replace(self, style=replace(self.style, footer=footer)) for footer in footers]
        failures: list[UserError] = []
        some = enumerate(islice(dataset, LOOKED_AT))  # a stream may have no end
        number = next((number for number, row in some if row["persona"]), 0)
        first = dataset.skip(number).take(1)
        for way in ways:
            try:
                [*way._joined(first, columns, prepare)]
                break
            except UserError as error:
                failures.append(error)
        else:
            raise failures[0]
        rows = way._joined(dataset, columns, prepare)
        if isinstance(rows, Dataset):
            if not len(rows):
                raise UserError(
                    f"{self.name} dataset: no row has a token to learn within max_length {self.max_length}. Raise it."
                )
            lost = len(dataset) - len(rows), sum(rows["left_out"]), sum(rows["is_cut"])
            none = sum(persona == [] for persona in dataset["persona"])
            if any(lost) and is_first_process():
                rows_lost, entries, ends = (f"{count:,}" for count in lost)
                what = f"{rows_lost} rows left out, {entries} persona entries, and the end of {ends} rows"
                say(f"{self.name}: {what}, to fit max_length {self.max_length}")
            if none and is_first_process():
                say(f"{self.name}: {none:,} of {len(dataset):,} rows have no persona, so their PIR is 0")
        return rows.remove_columns(["left_out", "is_cut"])

    def _joined(self, rows: Any, columns: Sequence[str], prepare: Callable[[Any], Any]) -> Any:
        both = prepare(rows.map(self.tell, batched=True, with_indices=True, remove_columns=[*columns]))
        names = [*next(iter(both))] if isinstance(both, IterableDataset) else both.column_names
        return both.map(self.join, batched=True, remove_columns=names)

    def tell(self, rows: Columns, numbers: Sequence[int]) -> dict[str, list[Any]]:
        """Two rows for each row; `persona` is its list of entries, `number` its index. UserError if it lacks one."""
        told: list[dict[str, Any]] = []
        for i, number in enumerate(numbers):
            row = {name: column[i] for name, column in rows.items() if name != "labels"}  # they are not of tokens
            place = next((name for name in ("prompt", "messages", self.text_field) if name in row), None)
            try:
                if place is None:
                    raise UserError(f"expected prompt, messages or {self.text_field}, got {', '.join(row)}.")
                entries = parse_persona(row["persona"], "persona")
                self._refuse_control(entries)
                for block in (self._block(entries), ""):
                    prompt = row[place]
                    is_text = isinstance(prompt, str)
                    told_one = block + prompt if is_text else tell(prompt, block, self.style, self.has_system_role)
                    told.append(row | {place: told_one, "persona": entries, "number": number})
            except (BadRow, UserError, TypeError) as error:
                raise UserError(f"{self.name} row {number + 1}: {error}") from None
        return {name: [row[name] for row in told] for name in told[0]}

    def join(self, rows: Columns) -> dict[str, list[Any]]:
        """One row with `input_ids` and `labels` for every two rows; also how many entries were left out and whether the
        end of the row was cut off to fit max_length. Rows without a token to learn after their persona are left out."""
        joined = []
        for i in range(0, len(rows["input_ids"]), 2):
            (ids, ids_cf), (labels, labels_cf) = (list(rows[name][i : i + 2]) for name in ("input_ids", "labels"))
            span = persona_span(ids, ids_cf) if rows["persona"][i] else (0, 0)
            if span is None or labels[: span[0]] + labels[span[1] :] != labels_cf:
                problem = (
                    "the chat template leaves out the message that tells the persona. Give the tokenizer another "
                    'template, or put the persona into the first user turn with prompt={"place": "user"}.'
                    if ids == ids_cf
                    else "the text around the persona has other tokens or labels with the persona than without it, so "
                    "the two passes cannot be aligned. Give the row a prompt that begins with a word, or the tokenizer "
                    "another chat template."
                )
                raise UserError(f"{self.name} row {rows['number'][i] + 1}: {problem}")
            ids, start, left_out = self._fitting(ids, ids_cf, span, rows["persona"][i])
            end = len(ids) - len(ids_cf) + start
            marked = (labels_cf[:start] + [PERSONA] * (end - start) + labels_cf[start:])[: self.max_length]
            marked[:1] = marked[:1] if rows["persona"][i] else [NO_PERSONA]
            if any(label != IGNORED for label in marked[max(end, 1) :]):
                row = {"input_ids": ids[: self.max_length], "labels": marked, "left_out": left_out}
                joined.append(row | {"is_cut": len(ids) > len(marked)})
        return {name: [row[name] for row in joined] for name in ("input_ids", "labels", "left_out", "is_cut")}

    def _fitting(
        self, ids: list[int], ids_cf: list[int], span: tuple[int, int], entries: Sequence[str]
    ) -> tuple[list[int], int, int]:
        """The ids with as many entries as fit max_length, at least one; where the persona begins; and how many entries
        were left out. None is left out if the tokenizer gives the persona alone other ids than in its prompt."""
        (start, end), excess = span, len(ids) - (self.max_length or len(ids))
        for before in ("", "\n") if excess > 0 else ():
            whole = self._ids(entries, before)
            if len(whole) != end - start:
                continue
            # The persona may begin before `span` does, if the text after it begins with the same tokens.
            for place in range(start, max(start - len(whole), -1), -1):
                if ids[place : place + len(whole)] == whole:
                    room = len(whole) - excess
                    counts = range(1, len(entries) + 1)
                    kept = max(1, bisect_right(counts, room, key=lambda count: len(self._ids(entries[:count], before))))
                    return (
                        ids_cf[:place] + self._ids(entries[:kept], before) + ids_cf[place:],
                        place,
                        len(entries) - kept,
                    )
        return ids, start, 0

    def _ids(self, entries: Sequence[str], before: str) -> list[int]:
        """The ids of a persona after the text `before`: some tokenizers add a space, but only at a text's beginning."""
        ids, first = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (before + self._block(entries), before)
        )
        return ids[len(first) :]

    def _block(self, entries: Sequence[str]) -> str:
        return self.style.block(entries, self.style.footer or "")

    def _refuse_control(self, entries: Sequence[str]) -> None:
        """UserError for a persona that spells a control token: the tokenizer would make that token of it."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        control = filter(LIKE_CONTROL.fullmatch, added)
        if found := next((text for text in control for entry in entries if text in entry), None):
            raise UserError(
                f"field 'persona' spells the control token {found!r}, which the tokenizer would make of it. Replace it."
            )
