"""Scored responses, and their heat map in the terminal; perce/report/page.py writes the HTML page of the same data.

A token is tinted by its weight, a signal (PIR, say) under a clip: no tint at the floor, full tint and an underline at
the ceiling. Characters that would act are shown, so that neither a page nor a terminal can be steered by what a model
or a user wrote.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from perce.visible import visible

if TYPE_CHECKING:
    from rich.text import Text


class ScoredToken(NamedTuple):
    """One response token with its log-probability with the persona (logp) and without it (logp_cf), in nats, and what
    its weight was clipped from (signal)."""

    text: str
    logp: float
    logp_cf: float
    signal: float
    token_weight: float

    @property
    def pir(self) -> float:
        return self.logp - self.logp_cf


@dataclass(frozen=True)
class ScoredResponse:
    """A response scored once or more, e.g. passes = {"before training": ..., "after training": ...}."""

    persona: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    """The conversation before the response: (role, content)."""
    passes: Mapping[str, Sequence[ScoredToken]]
    user_id: str | None = None
    source: str = ""
    """The file and the row that it is of."""


@dataclass(frozen=True)
class Histogram:
    """Counts between edges (one more than counts) of what the clip acted on, by its name in `title`; what lies outside
    belongs to the bars at the ends."""

    title: str
    edges: Sequence[float]
    counts: Sequence[int]
    clipped: tuple[float, float]
    """Shares of all tokens at or below the clip's lower end, and at or above its upper one."""


@dataclass(frozen=True)
class Cells:
    """Cells as text, below a header; `note` says what they are."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def intensity(token_weight: float, clip: tuple[float, float]) -> float:
    """Place of a weight on the colour scale: 0 at clip_min (or for NaN), 1 at clip_max, linear between."""
    clip_min, clip_max = clip
    if not token_weight > clip_min:
        return 0.0
    return min((token_weight - clip_min) / (clip_max - clip_min), 1.0) if clip_max > clip_min else 1.0


def at_floor(token: ScoredToken, clip: tuple[float, float]) -> bool:
    return token.token_weight <= clip[0] < clip[1]


def at_ceiling(token: ScoredToken, clip: tuple[float, float]) -> bool:
    return token.token_weight >= clip[1] > clip[0]


def harmless(text: str) -> str:
    """The text with what acts shown, but tab and newline."""
    return visible(text, keep="\t\n")


def scale(clip: tuple[float, float]) -> tuple[float, float]:
    """The clip in fp32, as the weights that it is compared with."""
    low, high = struct.unpack("2f", struct.pack("2f", *clip))
    return low, high


# From slate to blue of one lightness: visible on dark and light terminals, white text keeps a contrast of at least 4.7.
_TERMINAL_LOW = (100, 116, 139)
_TERMINAL_HIGH = (37, 99, 235)


def terminal_text(tokens: Iterable[ScoredToken], clip: tuple[float, float]) -> Text:
    """The tokens as coloured rich text. Its plain text is theirs, with what acts shown, but tab and newline."""
    from rich.text import Text

    clip = scale(clip)
    text = Text()
    for token in tokens:
        text.append(harmless(token.text), style=_terminal_style(token, clip))
    return text


def _terminal_style(token: ScoredToken, clip: tuple[float, float]) -> str:
    shade = intensity(token.token_weight, clip)
    if shade == 0:
        return ""
    ends = zip(_TERMINAL_LOW, _TERMINAL_HIGH, strict=True)
    red, green, blue = (round(low + shade * (high - low)) for low, high in ends)
    return f"{'bold underline ' if at_ceiling(token, clip) else ''}#ffffff on #{red:02x}{green:02x}{blue:02x}"
