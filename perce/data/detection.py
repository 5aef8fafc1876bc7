"""Which format a row is of, by the names of its fields alone; and of one that is of none, what it might become."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from perce.data.formats import FORMATS, OPTIONAL
from perce.data.readers import BadRow
from perce.visible import listed, shortened

# What others call it, for the hint at a row of no format.
ALSO_CALLED = {
    "persona": (
        "profile", "user_profile", "personality", "bio", "about", "facts", "preferences", "traits", "description"
    ),
    "query": ("question", "prompt", "instruction", "input", "user", "request", "message", "subject", "user_message"),
    "response": ("answer", "output", "reply", "completion", "assistant", "target", "body", "text", "assistant_message"),
}  # fmt: skip


def missing_fields(format: str, row: Mapping[str, Any]) -> list[str]:
    return [need for need in FORMATS[format] if not any(name in row for name in need.split("|"))]


def did_you_mean(wanted: Iterable[str], present: Iterable[str]) -> str:
    """The names that are there and might be those that are wanted, whatever their case and underscores."""
    pairs = [(name, close) for name in wanted if (close := nearest_name(name, present))]
    return "".join(f"; did you mean {name!r} by {close!r}" for name, close in pairs)


def nearest_name(name: str, present: Iterable[str]) -> str | None:
    present = [other for other in present if len(other) <= 60]  # a name that is a text takes long to compare
    plain = {re.sub(r"[\W_]", "", other.casefold()): other for other in sorted(present)}
    close = difflib.get_close_matches(re.sub(r"[\W_]", "", name.casefold()), plain, 1, 0.7)
    return plain[close[0]] if close else None


class UnknownShape(BadRow):
    """A row that is of no format: what to do, in four lines."""

    def __init__(self, row: Mapping[str, Any]):
        super().__init__(None, "the fields of a format", f"the fields {listed(row)}" if row else "no field")
        talks = next((name for name, value in row.items() if _is_sharegpt(value)), None)
        row = {"messages" if name == talks else name: value for name, value in row.items()}
        nearest, lacking = _nearest(row)
        missing = [need.replace("|", " or ") for need in missing_fields(nearest, row)] + ["messages"] * bool(talks)
        line = ",".join(f"{ours}={theirs or 'FIELD'}" for ours, theirs in lacking.items())
        ways = [f"Rename fields: --columns {shlex.quote(line)}"] if line else []
        if None in lacking.values():
            ways[0] += " (FIELD: one of yours; what no field has must be added first)"
        ways += [f"`{shortened(talks)}` has from and value where `messages` has role and content"] if talks else []
        self.remedy = ""
        self.lines = (
            f"Nearest is {nearest}; missing: {', '.join(missing)}.",
            "; ".join(ways) + "." * bool(talks),
            "docs/DATA.md has every format with a row to compare, and how other shapes become one of them.",
        )


def _nearest(row: Mapping[str, Any]) -> tuple[str, dict[str, str | None]]:
    """The format that a row lacks the least of, and what might be renamed for it."""
    formats = [name for name in FORMATS if name != "text" and ("profile" in row or "profile" not in FORMATS[name])]
    lacking = {name: _renames(name, row) for name in formats}
    cost = {name: sum(0.1 if its else 1 for its in lacking[name].values()) / len(FORMATS[name]) for name in formats}
    nearest = min(formats, key=cost.__getitem__)
    return nearest, lacking[nearest]


def _renames(format: str, row: Mapping[str, Any]) -> dict[str, str | None]:
    """What a row lacks of a format -> the field that might be it."""
    found: dict[str, str | None] = {}
    for need in missing_fields(format, row):
        ours, taken = need.split("|"), {*OPTIONAL, *found.values()}
        left = {name for name in row if not {",", "="} & {*name}} - taken  # at these --columns divides
        names = (*ours, *ALSO_CALLED.get(ours[0], ()))
        found[ours[0]] = next((close for name in names if (close := nearest_name(name, left))), None)
    return found


def _is_sharegpt(value: object) -> bool:
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and {"from", "value"} <= value[0].keys()
    )


def detect_format(row: Mapping[str, Any]) -> str:
    fits = [name for name in FORMATS if not missing_fields(name, row)]
    if "longlamp" in fits:
        fits.remove("lamp")  # a LongLaMP row has all of LaMP's fields
    if len(fits) > 1 and "text" in fits:
        fits.remove("text")
    if not fits:
        raise UnknownShape(row)
    if len(fits) > 1:
        known = "; ".join(f"{name} ({', '.join(FORMATS[name])})" for name in fits)
        raise BadRow(
            None, f"the fields of one format (choose with --format: {known})", f"fields of several: {listed(row)}"
        )
    return fits[0]
