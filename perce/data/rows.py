"""Rows of any supported data set -> `Example(persona, turns, response)`, or `Document(text)` if they have no persona.

    reading/sources     where the rows are (file, directory, save_to_disk, Hub) ->  a reader
    reading/readers     files of each kind, and tables                          ->  (place, row)
    reading/detection   which format a row is of, by the names of its fields
    reading/formats     what a row of a format means                            ->  Reply(persona, turns, response), ...
    reading/fields      what its fields may hold
    reading/joins       what a row needs from other rows or files               ->  the row with it

This module puts them together (Example, Document, Examples, load_examples) and says what happens to a bad row.
A row that cannot be used stops the run with file, line and field: a row that was silently dropped or half understood
would train the model on something that nobody has looked at.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perce.config.schema import DataConfig
from perce.errors import UserError
from perce.reading import formats
from perce.reading.detection import detect_format, missing_fields, nearest_name, renaming_hint
from perce.reading.fields import Turn, encodable, parse_persona, parse_spans, show, text_of, weight_of
from perce.reading.formats import FORMATS
from perce.reading.joins import Lookup
from perce.reading.literals import parse_list
from perce.reading.readers import BadRow
from perce.reading.sources import NAMES, OTHER_FILES, READERS, SPLITS, Source, open_data
from perce.visible import listed, progress

_MESSAGES_AS_TEXT = re.compile(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")
_MAY_BE_MESSAGES = ("prompt", "completion", "chosen")
SURE = 1000  # rows of a stream after which a field of --columns that none of them has is called misspelt
UNANSWERED = (
    " perce.evaluate writes replies to such rows. To train on answers that you have, or to score them, name their "
    "field: --columns response=FIELD."
)
OR_SKIP = " --skip_bad_rows leaves such rows out."  # ends the message of an example that cannot be a pair
KEPT_REASONS = 5  # all skipped rows are counted, and the first few are quoted, which is enough to see the pattern


@dataclass(frozen=True, slots=True)
class Example:
    """One response to learn, with the persona and turns before it. The texts are copied from the data unchanged."""

    persona: tuple[str, ...]  # facts or passages, best first (profiles: the newest first); trimming drops from the end
    turns: tuple[Turn, ...]  # up to the response: alternating, the last is "user" (the first may be "assistant")
    response: str  # "" if the row has none
    user_id: str | None
    personal_spans: tuple[tuple[int, int], ...] | None  # character offsets in response; None if the data marks none
    source: str  # "train.jsonl:17"; shared by all examples of a row, so it groups a dialogue when user_id is None
    data_weight: float = 1.0  # the row's factor for the weights of the response tokens, > 0

    @property
    def conversation(self) -> tuple[str, tuple[str, ...]]:
        """A key that is equal for the examples of one row and persona: their prompts begin with the same text."""
        return self.source, self.persona


@dataclass(frozen=True, slots=True)
class Document:
    """A text whose tokens are all learnt (format text): its earlier tokens are the context of the later ones."""

    text: str
    user_id: str | None
    source: str  # as in Example
    data_weight: float = 1.0


Record = Example | Document  # the rows of a split are all of one kind


def texts_of(example: Record) -> str | tuple[Any, ...]:
    return example.text if isinstance(example, Document) else (example.persona, example.turns, example.response)


def text_key(example: Record) -> str:
    """Digest of an example's texts."""
    return hashlib.sha256(repr(texts_of(example)).encode()).hexdigest()[:12]


def texts_key(examples: Sequence[Record]) -> str:
    """Digest of the texts of all examples, in order."""
    return hashlib.sha256("".join(map(text_key, examples)).encode()).hexdigest()[:12]


def labels_key(examples: Iterable[Example]) -> str:
    """Digest of whose the examples are, and of the spans that the data marks as personal."""
    labels = [(example.source, example.user_id, example.personal_spans) for example in examples]
    return hashlib.sha256(repr(labels).encode()).hexdigest()[:12]


def _rename(row: dict[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    """The row with the fields in `columns` (ours -> theirs) renamed. Their old names are removed, so that the row fits
    one format only."""
    renamed = {name: value for name, value in row.items() if name not in columns.values()}
    for ours, theirs in columns.items():
        if theirs in row:
            renamed[ours] = row[theirs]
        elif ours not in formats.OPTIONAL:
            got = f"fields {listed(row)}{_instead(ours, theirs, row)}"
            bad = BadRow(theirs, f"this field, named by --columns {ours}={theirs}", got)
            bad.remedy = " Correct --columns; or the row, if other rows have the field (--skip_bad_rows leaves it out)."
            raise bad
    return renamed


def _instead(ours: str, theirs: str, row: Iterable[str]) -> str:
    close = nearest_name(theirs, row)
    return f"; did you mean --columns {ours}={close}" if close else ""


def _nested(row: dict[str, object]) -> dict[str, object]:
    """The row with its lists parsed if they are texts, as in a CSV."""
    lists = {name: parse_list(text, name) for name in formats.LISTS if isinstance(text := row.get(name), str)}
    for name in _MAY_BE_MESSAGES:
        text = row.get(name)
        if isinstance(text, str) and _MESSAGES_AS_TEXT.match(text):
            raise BadRow(name, "a text, or a list of messages", f"messages written as a text: {show(text)}")
    return row | lists if lists else row


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    format: one of FORMATS, or "auto": recognised by the fields of the first good row.
    columns: our field names -> the data's, e.g. {"persona": "profile", "response": "output"}.
    persona_markers: for rows without a field `persona`: the texts before and after the persona in a system message.
    skip_bad_rows: leave bad rows out and count them (`Examples.skipped`, `Examples.reasons`) instead of stopping.
    unanswered: whether rows without a response are examples too, so that a reply can be written to them.
    """

    format: str = "auto"
    columns: Mapping[str, str] | None = None
    persona_markers: tuple[str, str] | None = None
    skip_bad_rows: bool = False
    unanswered: bool = False

    @classmethod
    def of(cls, config: DataConfig, unanswered: bool = False) -> Reading:
        return cls(config.format, config.column_names(), config.markers(), config.skip_bad_rows, unanswered)


AS_IT_IS = Reading()


class Examples:
    """The examples of one split: iterate over them, or take the list `.all`.

    By default `load_examples` has read and checked every row, and `.all` is in memory.
    With `streaming=True` each `iter()` is a fresh pass over the data, and raises when it comes to a bad row.

    format: the format's name; "auto" until a row with all of its fields has been read.
    rows: how many rows the latest pass has read, including those that were left out.
    skipped, reasons: rows left out by skip_bad_rows in the latest pass, and the first few reasons ("FILE:LINE: ...").
    weightless: replies left out because their weight is 0.
    """

    def __init__(self, source: Source, reading: Reading = AS_IT_IS, limit: int | None = None):
        self.format, self.rows, self.skipped, self.weightless = reading.format, 0, 0, 0
        self.reasons: list[str] = []
        self._first: dict[str, object] = {}
        self._unseen: set[str] = set()
        self._source, self._reading, self._limit = source, reading, limit
        self._lookup = Lookup(source.path, self._named_rows)
        self._examples: list[Record] | None = None

    @property
    def unread(self) -> tuple[str, ...]:
        """Names in the data of files, or parts of a file, that are of no split."""
        return self._source.unread

    @property
    def all(self) -> list[Record]:
        if self._examples is None:
            self._examples = [*progress("reading", "example", self._read())]
        return self._examples

    def keep(self, examples: list[Record]) -> None:
        """Replaces the examples that have been read by these, a selection of them."""
        self._examples = examples

    def __iter__(self) -> Iterator[Record]:
        return self._read(sure=SURE) if self._examples is None else iter(self._examples)

    def _read(self, sure: int | None = None) -> Iterator[Record]:
        """sure: the fields in --columns are checked after this many rows as well as at the end; one that no row has had
        is an error."""
        self.rows, self.skipped, self.weightless, self.reasons, count = 0, 0, 0, [], 0
        self._unseen, self._first = set(self._columns.values()), {}
        lines: tuple[str, ...] = ()
        if self._source.read is None:
            return
        for place, value in self._source.rows():
            if self.rows == sure:
                self._check_columns()
            self.rows += 1
            try:
                examples = self._examples_of(self._row_of(value), self._source.name + place, value)
            except (BadRow, RecursionError) as error:
                bad = error if isinstance(error, BadRow) else BadRow(None, "values nested less deeply", "deeper ones")
                reason = f"{self._source.origin}{place}: {bad}"
                if not self._reading.skip_bad_rows:
                    raise UserError(f"{reason}.{bad.remedy}", *bad.lines) from None
                self.skipped, lines = self.skipped + 1, lines or bad.lines
                self.reasons += [reason] if len(self.reasons) < KEPT_REASONS else []
                continue
            except UserError:
                raise
            except Exception as error:  # of a parser, whose author needs its line too
                what = f"{self._source.origin}{place}: cannot be read as format {self.format}"
                raise RuntimeError(f"{what} ({type(error).__name__}: {error}).") from error
            for example in examples:
                yield example
                count += 1
                if count == self._limit:
                    return
        if not count:
            why = f"all {self.skipped:,} rows skipped" if self.skipped else "it has no rows"
            if self.weightless:
                why = f"all replies of its {self.rows:,} rows have weight 0"
            if self.weightless and self.skipped:
                why = f"{self.skipped:,} of {self.rows:,} rows skipped, and all other replies have weight 0"
            why += f"; the first: {self.reasons[0]}" if self.skipped else ""
            raise UserError(f"No example could be read from {self._source.origin}: {why}.", *lines)
        self._check_columns()

    @property
    def _columns(self) -> Mapping[str, str]:
        return self._reading.columns or {}

    def _named_rows(self) -> Iterator[Mapping[str, object]]:
        """All rows of the source, renamed by --columns, except those that cannot be read or renamed."""
        for row in (value for _, value in self._source.rows() if isinstance(value, dict)):
            with contextlib.suppress(BadRow):
                yield _rename({name: cell for name, cell in row.items() if cell is not None}, self._columns)

    def _check_columns(self) -> None:
        """UserError for a name in --columns that no row has. Only optional fields get here; others fail at the row."""
        for ours, theirs in self._columns.items():
            if theirs in self._unseen:
                raise UserError(
                    f"--columns {ours}={theirs}: none of {self.rows:,} rows of {self._source.origin} has a field "
                    f"{theirs!r}; the first has {listed(self._first)}{_instead(ours, theirs, self._first)}. Correct "
                    "the name, or leave it out of --columns."
                )

    def _row_of(self, value: object) -> dict[str, object]:
        """The row by our names, with its lists and its persona as fields."""
        if isinstance(value, BadRow):  # the reader could not make a row of it
            raise value
        if not isinstance(value, dict):
            raise BadRow(None, "a JSON object", show(value))
        value = {str(name): cell for name, cell in value.items()}  # pandas numbers columns that have no names
        # A table holds null for a field that a row lacks, so null and a missing field mean the same.
        given = {name: cell for name, cell in value.items() if cell is not None}
        self._first = self._first or value
        if self._columns:
            self._unseen.difference_update(value)
            given = _rename(given, self._columns)
        if BadRow in map(type, given.values()):
            for name, cell in given.items():
                if isinstance(cell, BadRow) and name in formats.FIELDS:
                    raise cell
        row = _nested(given)
        if "user_id" in row and not str(row["user_id"]).strip():  # of nobody
            del row["user_id"]
        if self._reading.persona_markers:
            row = formats.with_marked_persona(row, *self._reading.persona_markers)
        return row

    def _examples_of(self, row: dict[str, object], source: str, given: Mapping[str, object]) -> Sequence[Record]:
        """The examples of a row in our names. given: the row as it was read, with fields that have no value."""
        if (format := self.format) == "auto":
            empty = [name for name, cell in given.items() if cell is None]
            format = detect_format(row, self._source.name.lower().endswith(".csv"), empty)
        entry = FORMATS[format]
        if missing := missing_fields(format, row):
            fields = missing[0].split("|")
            none = ", [] if there is none" if "persona" in fields else ""
            got = f"only {listed(row) or 'an empty row'}{renaming_hint(fields, row)}"
            raise BadRow("' or '".join(fields), f"it in a row of format {format}{none}", got)
        self.format = format  # the first row that has all fields decides for all: errors can then name the field
        if "personal_spans" in row and (self.format != "perce" or "response" not in row):
            raise BadRow("personal_spans", "it only with a field 'response' (format perce)", f"format {self.format}")
        user_id = self._user_of(row)
        weight, marked = weight_of(row.get("weight"), "weight"), row.get("personal_spans")
        replies = [*entry.parse(entry.join(self._lookup, row) if entry.join else row)]
        for reply in replies:
            if not isinstance(reply.persona, tuple):  # each letter of a text would become a fact
                raise TypeError(f"persona: expected a tuple of texts, got {show(reply.persona)}")
        if "system" in entry.may_have and row.get("system", "") != "":  # an empty one is ignored
            system = Turn("system", text_of(row["system"], "system"))
            if any(reply.turns[0].role == "system" for reply in replies):
                raise BadRow("system", "either the field 'system' or a system message among the messages", "both")
            replies = [reply._replace(turns=(system, *reply.turns)) for reply in replies]
        if not replies:
            raise BadRow(None, "at least one reply that answers a turn", "only an opening line, or no reply")
        if not self._reading.unanswered and not all(reply.response for reply in replies):
            bad = BadRow("response", "a response", f"a row of format {self.format} that has none")
            bad.remedy = UNANSWERED
            raise bad
        replies = [reply._replace(weight=weight * reply.weight) for reply in replies]
        self.weightless += sum(reply.weight == 0 for reply in replies)
        if entry.documents:
            return [Document(reply.response, user_id, source, reply.weight) for reply in replies if reply.weight]
        return [
            Example(persona, turns, said, user_id, None if marked is None else parse_spans(marked, said), source, data)
            for persona, turns, said, data in replies if data
        ]  # fmt: skip

    def _user_of(self, row: Mapping[str, object]) -> str | None:
        for path in FORMATS[self.format].users:
            user: Any = row
            for name in path.split("."):
                if isinstance(user, str) and isinstance(printed := parse_list(f"[{user}]", path), list):  # a CSV
                    user, *_ = [*printed, None]
                user = user.get(name) if isinstance(user, dict) else None
            if user is not None and str(user).strip() not in ("", "[]"):
                if path == "personality":  # the user is who plays a persona: many rows have the same
                    user = hashlib.sha256(repr(parse_persona(user, path)).encode()).hexdigest()[:12]
                if not isinstance(user, str | int):
                    raise BadRow(path, "a string or an integer", show(user))
                return encodable(str(user).strip(), path)
        return None


def load_examples(
    data: str | Path, split: str, *, streaming: bool = False, limit: int | None = None, **how: Any
) -> Examples:
    """The examples of one split ("train", "validation" or "test") of `data`.

    data: a file, a directory of split files, a `save_to_disk` directory, or a Hub id; see reading/sources.py.
    streaming: read the rows anew each time the result is iterated over; otherwise all are read and checked here.
    limit: stop after this many examples; later rows are neither read nor checked.
    how: fields of Reading, such as skip_bad_rows.

    A single file is the train split; its other splits are empty. UserError, with the remedy, if the data or the split
    does not exist (the existing splits are listed), a row cannot be used, or the split has no example.
    """
    reading = Reading(**how)
    for option, value, known in (("split", split, SPLITS), ("format", reading.format, ("auto", *FORMATS))):
        if value not in known:
            hint = renaming_hint(known, [value])
            raise UserError(f"{option}: expected one of {', '.join(known)}, got {value!r}{hint}")
    if limit is not None and limit < 1:
        raise UserError(f"limit: expected at least 1 example, or None for all, got {limit}")
    for ours, theirs in (reading.columns or {}).items():
        if ours not in formats.FIELDS:
            turned = f"; did you mean {theirs}={ours}" if theirs in formats.FIELDS else ""
            close = nearest_name(ours, formats.FIELDS)
            turned = f"; did you mean {close}={theirs}" if close else turned
            names = ", ".join(sorted(formats.FIELDS))
            raise UserError(f"columns: expected OURS=THEIRS with OURS one of {names}, got {ours!r}{turned}.")
    sources = open_data(str(data), streaming)
    if split not in sources:
        raise UserError(f"{data} has no {split} split; {what_is_there(data)}.")
    rows = Examples(sources[split], reading, limit)
    if not streaming:
        _ = rows.all  # read and check everything now
    return rows


def not_read(unread: Collection[str]) -> list[str]:
    """A note on files, or parts of a file, that look like data and are read for no split."""
    others = any(name.lower().endswith(tuple(OTHER_FILES)) for name in unread)
    kinds = f"; kinds of files: {', '.join(READERS)}" if others else ""
    told = f"not read: {listed(sorted(unread))} (the names of splits are {NAMES}{kinds}; one of each is read)"
    return [told] * bool(unread)


def available_splits(data: str | Path) -> list[str]:
    """The splits that `data` has, in the order train, validation, test; a single file has only "train"."""
    return [split for split, source in open_data(str(data)).items() if source.read is not None]


def what_is_there(data: str | Path) -> str:
    """The splits that `data` has, and what of it is read for none, in words."""
    unread = {name for source in open_data(str(data)).values() for name in source.unread}
    present = ", ".join(available_splits(data)) or f"none of {', '.join(SPLITS)}"
    return "; ".join([f"it has {present}", *not_read(unread)])
