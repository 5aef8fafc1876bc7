"""The scored responses as a page embeds them: JSON, deflated, in base64. page.js reads it.

signal, clip, unit   of the page: weights and signals are whole numbers of `unit`; log-probabilities of 0.01 nats
passes, users        names, which responses refer to by their place
strings              entries of personas and turns of conversations; what users' examples share is here once
responses            {user, source, persona: [string], turns: [[role, string]], texts: [[text, lengths]], passes: [...]}
  passes             one per name, or null: {text: its place in texts, logp, cf, weight, signal?, ends, pir, loss}

The texts of a pass's tokens are one text and the length of each token in UTF-16 units, as JavaScript counts. `ends` has
a letter per token: f at the floor, c at the ceiling, - elsewhere, because rounded weights cannot tell. There is no
`signal` where it is PIR.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from perce.objectives import PIR
from perce.report.heatmap import ScoredResponse, ScoredToken, at_ceiling, at_floor, harmless

NATS = 0.01  # unit of log-probabilities


def embedded(
    responses: Sequence[ScoredResponse], signal: str, clip: tuple[float, float], more: dict[str, Any]
) -> str:  # fmt: skip
    """The base64 text of the responses, in which `<` does not occur. signal: its name. more: fields of JSON, added."""
    names = [*dict.fromkeys(name for response in responses for name in response.passes)]
    unit = _unit(clip)
    strings, users = _Places(), _Places()
    rows = [_response(response, names, strings, users, signal, clip, unit) for response in responses]
    content = {
        "signal": signal, "clip": clip, "unit": unit, "passes": [*map(harmless, names)], "users": [*users],
        "strings": [*strings], "responses": rows, **more,
    }  # fmt: skip
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


class _Places(dict[str, int]):
    """Texts by the place at which they were first asked for."""

    def __missing__(self, text: str) -> int:
        self[text] = len(self)
        return self[text]


def _unit(clip: tuple[float, float]) -> float:
    """A hundredth, or a hundredth of the power of ten in a clip that is narrower than 1."""
    width = clip[1] - clip[0]
    return NATS * 10 ** min(math.floor(math.log10(width)), 0) if width else NATS


def _response(
    response: ScoredResponse, names: Sequence[str], strings: _Places, users: _Places, signal: str,
    clip: tuple[float, float], unit: float,
) -> dict[str, Any]:  # fmt: skip
    texts: list[list[Any]] = []
    passes: list[dict[str, Any] | None] = []
    for name in names:
        tokens = response.passes.get(name)
        if tokens is None:
            passes.append(None)
            continue
        pieces = [harmless(token.text) for token in tokens]
        text = ["".join(pieces), [len(piece.encode("utf-16-le")) // 2 for piece in pieces]]
        if text not in texts:
            texts.append(text)
        passes.append({"text": texts.index(text), **_columns(tokens, signal, clip, unit)})
    return {
        "user": None if response.user_id is None else users[harmless(response.user_id)],
        "source": harmless(response.source), "persona": [strings[harmless(entry)] for entry in response.persona],
        "turns": [[harmless(role), strings[harmless(content)]] for role, content in response.turns],
        "texts": texts, "passes": passes,
    }  # fmt: skip


def _columns(tokens: Sequence[ScoredToken], signal: str, clip: tuple[float, float], unit: float) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "logp": _whole((token.logp for token in tokens), NATS), "cf": _whole((token.logp_cf for token in tokens), NATS),
        "weight": _whole((token.token_weight for token in tokens), unit),
        "ends": "".join(_end(token, clip) for token in tokens),
        "pir": mean([token.pir for token in tokens]), "loss": mean([-token.logp for token in tokens]),
    }  # fmt: skip
    if signal != PIR.name:
        columns["signal"] = _whole((token.signal for token in tokens), unit)
    return columns


def _end(token: ScoredToken, clip: tuple[float, float]) -> str:
    return "c" if at_ceiling(token, clip) else "f" if at_floor(token, clip) else "-"


def _whole(values: Iterable[float], unit: float) -> list[int | None]:
    """In units, rounded; None for what is not finite."""
    return [round(value / unit) if math.isfinite(value) else None for value in values]


def mean(values: Sequence[float]) -> float | None:
    """To four decimals; None if it is not finite."""
    found = sum(values) / len(values) if values else math.nan
    return round(found, 4) if math.isfinite(found) else None
