"""Recognises the format of a row by the names of its fields. For a row of no format, suggests what to rename."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from perce.reading.formats import FIELDS, FORMATS, OPTIONAL, Format, system_message
from perce.reading.readers import BadRow
from perce.visible import listed

# Our field → names that other data sets give it, for the hints about a row of no format.
ALSO_CALLED = {
    "persona": (
        "profile", "user_profile", "personality", "bio", "about", "facts", "preferences", "traits", "description"
    ),
    "query": ("question", "prompt", "instruction", "input", "user", "request", "message", "subject", "user_message"),
    "conversations": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "response": ("answer", "output", "reply", "completion", "assistant", "target", "body", "text", "assistant_message"),
}  # fmt: skip


def missing_fields(format: str, row: Mapping[str, Any]) -> list[str]:
    return [need for need in FORMATS[format].needs if not any(name in row for name in need.split("|"))]


def renaming_hint(wanted: Iterable[str], present: Iterable[str]) -> str:
    """A hint that names present fields which resemble the wanted ones, ignoring case and underscores."""
    pairs = [(name, close) for name in wanted if (close := nearest_name(name, present))]
    return "".join(f"; did you mean {name!r} by {close!r}" for name, close in pairs)


def nearest_name(name: str, present: Iterable[str]) -> str | None:
    present = [other for other in present if len(other) <= 60]  # a long text as a name takes long to compare
    plain = {re.sub(r"[\W_]", "", other.casefold()): other for other in sorted(present)}
    close = difflib.get_close_matches(re.sub(r"[\W_]", "", name.casefold()), plain, 1, 0.7)
    return plain[close[0]] if close else None


class UnknownShape(BadRow):
    """A row of no known format; the error says in four lines what to do."""

    def __init__(self, row: Mapping[str, Any], has_header: bool):
        super().__init__(None, "the fields of a known format", f"the fields {listed(row)}" if row else "no field")
        nearest, lacking = _nearest(row)
        missing = [need.replace("|", " or ") for need in missing_fields(nearest, row)]
        line = ",".join(f"{ours}={theirs or 'FIELD'}" for ours, theirs in lacking.items())
        way = f"Rename fields: --columns {shlex.quote(line)}"
        if None in lacking.values():
            way += " (FIELD: the name of your field; add a field that your rows do not have yet)"
        if has_header and not any(lacking.values()) and not FIELDS & row.keys():
            header = ",".join(lacking)
            way = f"If the first line is a row, the header is missing: add {header}. Else r{way.removeprefix('R')}"
        if any(need.startswith("persona") for need in missing) and system_message(row) is not None:
            way += ". If the persona is part of the system message: --persona_markers START...END"
        self.remedy = ""
        self.lines = (
            f"The nearest format is {nearest}; missing: {', '.join(missing)}.",
            way,
            "docs/DATA.md shows an example row of every format, and how to convert other rows.",
        )


def _nearest(row: Mapping[str, Any]) -> tuple[str, dict[str, str | None]]:
    """The format of which a row lacks the least, and which fields might be renamed for it."""
    formats = [
        name for name in FORMATS if name != "text" and ("profile" in row or "profile" not in FORMATS[name].needs)
    ]
    lacking = {name: _renames(name, row) for name in formats}
    told = {
        name: sum(need not in OPTIONAL for need in FORMATS[name].needs) for name in formats
    }  # optional fields such as user_id do not tell formats apart
    cost = {name: sum(0.1 if its else 1 for its in lacking[name].values()) / told[name] for name in formats}
    nearest = min(formats, key=cost.__getitem__)
    return nearest, lacking[nearest]


def _renames(format: str, row: Mapping[str, Any]) -> dict[str, str | None]:
    """Each field of the format that the row lacks -> the row's field that might be meant, or None."""
    found: dict[str, str | None] = {}
    for need in missing_fields(format, row):
        ours, taken = need.split("|"), {*OPTIONAL, *found.values()}
        left = {name for name in row if not {",", "="} & {*name}} - taken  # --columns splits its value at , and =
        names = (*ours, *ALSO_CALLED.get(ours[0], ()))
        found[ours[0]] = next((close for name in names if (close := nearest_name(name, left))), None)
    return found


OF_REVIEWS = {"rating", "asin", "parent_asin", "verified_purchase"}


def _lacks_something(row: Mapping[str, Any]) -> bool:
    """Whether a row with a `text` is no document: it is a review, or has two fields of another format."""

    def told(entry: Format) -> int:
        needs = (need.split("|") for need in entry.needs if need not in ("text", *OPTIONAL))
        return sum(any(name in row for name in names) for names in needs)

    return bool(OF_REVIEWS & row.keys()) or max(map(told, FORMATS.values())) > 1


def detect_format(row: Mapping[str, Any], has_header: bool = False, empty: Collection[str] = ()) -> str:
    """has_header: the names come from the first line of a file, which may be a row. empty: fields without a value; they
    tell the format if the others do not."""
    fits = [name for name in FORMATS if not missing_fields(name, row)]
    needs = {name: {*FORMATS[name].needs} for name in fits}
    fits = [name for name in fits if not any(needs[name] < needs[other] for other in fits)]
    if len(fits) > 1 and "text" in fits:
        fits.remove("text")
    named = {**row, **dict.fromkeys(empty)}
    if not fits or (fits == ["text"] and _lacks_something(named)):
        if empty:
            return detect_format(named, has_header)
        raise UnknownShape(row, has_header)
    if len(fits) > 1:
        known = "; ".join(f"{name} ({', '.join(FORMATS[name].needs)})" for name in fits)
        raise BadRow(
            None, f"the fields of one format (choose it with --format: {known})", f"fields of several: {listed(row)}"
        )
    return fits[0]
