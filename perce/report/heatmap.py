"""Token heat maps, as one HTML page and in the terminal: the one renderer of the commands.

A token is tinted by its weight, a signal (PIR, say) under a clip: no tint at the floor, full tint and an underline at
the ceiling. The HTML is one file without scripts. Text from data is escaped, and characters that would act are shown,
so that neither a page nor a terminal can be steered by what a model or a user wrote.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from perce.environment import in_one_move
from perce.visible import visible

if TYPE_CHECKING:
    from rich.text import Text

OPEN_ROWS = 8  # a longer table is folded: the responses are what people come for
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (0x09, 0x0A)} | {0x7F: 0x2421}


class ScoredToken(NamedTuple):
    """One response token with its log-probability with the persona (logp) and without it (logp_cf), in nats."""

    text: str
    logp: float
    logp_cf: float
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
class Table:
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


# ---------------------------------------------------------------------------------------------------------------
# HTML

_CSS = """
:root { color-scheme: light dark; --bg: #fbfbf9; --card: #fff; --ink: #1b1d22; --muted: #646873; --line: #e4e4df;
  --tint: 45, 105, 225; --tint-max: .46; --mark: #1d4fc4; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #131519; --card: #1a1d23; --ink: #e8e9ec; --muted: #9aa0ac; --line: #2b2f38;
    --tint: 84, 140, 255; --tint-max: .58; --mark: #9dbfff; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--bg); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.6rem; line-height: 1.25; font-weight: 650; letter-spacing: -.01em; margin: 0 0 1.25rem; }
.label, dt, h2, h3, summary { font-size: .8rem; line-height: 1.5; color: var(--muted); font-weight: 500; }
.summary { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .9rem 1.5rem;
  margin: 0 0 1.75rem; }
.summary dd { margin: 0; font-size: 1.05rem; font-weight: 550; font-variant-numeric: tabular-nums; line-height: 1.4; }
.legend { margin: 0 0 2rem; padding: 1rem 0; border-block: 1px solid var(--line); }
.scale { display: flex; align-items: center; gap: .6rem; font-size: .85rem; white-space: nowrap; }
.scale i { flex: 0 1 18rem; min-width: 0; height: .9rem; border-radius: 3px; border: 1px solid var(--line);
  background: linear-gradient(90deg, transparent, rgba(var(--tint), var(--tint-max))); }
.legend p { margin: .5rem 0 0; font-size: .85rem; color: var(--muted); }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.25rem 1.5rem 1.5rem;
  margin: 0 0 1.5rem; }
article > header { display: flex; justify-content: space-between; gap: 1rem; margin: 0 0 .75rem; }
h2, h3 { margin: 0; }
.persona ul { margin: .25rem 0 1rem; padding: 0 1.15rem; }
.persona li { margin: .1rem 0; white-space: pre-wrap; }
.persona li::marker { color: var(--muted); }
.turn { margin: .75rem 0 0; padding-inline-start: .85rem; border-inline-start: 2px solid var(--line); }
.text, .tokens { margin: 0; white-space: pre-wrap; }
.pass { margin: 1.1rem 0 0; padding-top: 1rem; border-top: 1px solid var(--line); }
.pass > header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; margin-bottom: .35rem; }
.pass h3 { color: var(--ink); font-weight: 600; }
.tokens { line-height: 1.85; tab-size: 4; }
.t { background: rgba(var(--tint), calc(var(--w, 0) * var(--tint-max))); border-radius: 2px; padding-block: .14em;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.t:hover { outline: 1px solid var(--mark); }
.top { text-decoration: underline; text-decoration-color: var(--mark); text-decoration-thickness: 1.5px;
  text-underline-offset: .22em; }
.nl::before { content: "\\21B5"; color: var(--muted); font-style: normal; font-size: .8em; }
.panel { margin: 0 0 2rem; }
.bars { display: flex; align-items: flex-end; gap: 1px; height: 7rem; margin: .5rem 0 0;
  border-bottom: 1px solid var(--line); }
.bars i { flex: 1; min-width: 0; height: calc(var(--h) * 100%); border-radius: 2px 2px 0 0; background:
  linear-gradient(rgba(var(--tint), calc(.2 + var(--w) * .8)), rgba(var(--tint), calc(.2 + var(--w) * .8))),
  var(--line); }
.ends { display: flex; justify-content: space-between; font-size: .8rem; color: var(--muted); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 500; text-align: start; }
th, td { padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); overflow-wrap: normal; }
@media (hover: none) {  /* no tooltips on a phone: the tapped token's numbers appear at the bottom edge */
  .t:hover::after { content: attr(title); position: fixed; inset: auto 0 0 0; padding: .8rem 1.25rem; z-index: 1;
    background: var(--ink); color: var(--bg); font-size: .85rem; line-height: 1.4; white-space: normal;
    direction: ltr; text-align: start; }
}
@media (max-width: 36rem) {
  main { padding: 1.5rem .9rem 4rem; }
  article { padding: 1rem 1rem 1.25rem; }
}
@media print { .t { print-color-adjust: exact; } }
"""


def write_html(
    path: str | Path,
    responses: Sequence[ScoredResponse],
    *,
    title: str,
    summary: Sequence[tuple[str, str]],
    clip: tuple[float, float],
    signal: str = "PIR",
    panels: Sequence[Histogram | Table] = (),
) -> None:
    """Write the heat map of `responses` as one self-contained file.

    `summary` is shown at the top as (label, value) pairs, `panels` below it; `clip` is (clip_min, clip_max), the ends
    of the colour scale, and `signal` the name of what was clipped to a weight.
    Raises ValueError when clip_min > clip_max or either is not finite.
    """
    clip = _scale(clip)
    cards = "\n".join(_article(r, f"{i} of {len(responses)}", clip) for i, r in enumerate(responses, start=1))
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_html(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<main>
<h1 dir="auto">{_html(title)}</h1>
{_summary(summary)}
{_legend(clip, signal)}
{"".join(_histogram(x, clip) if isinstance(x, Histogram) else _table(x) for x in panels)}
{cards or "<p>No responses were scored.</p>"}
</main>
</body>
</html>
"""
    with in_one_move(Path(path)) as unfinished:
        unfinished.write_text(page, encoding="utf-8", errors="replace")


def _summary(rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    items = "".join(f"<div><dt>{_html(label)}</dt><dd>{_html(value)}</dd></div>" for label, value in rows)
    return f'<dl class="summary">{items}</dl>'


def _legend(clip: tuple[float, float], signal: str) -> str:
    clip_min, clip_max = clip
    return f"""<section class="legend" aria-label="Colour scale">
<div class="scale"><b class="label">Token weight</b> {clip_min:g} <i></i> {clip_max:g}</div>
<p>PIR is a token's log-probability with the persona minus without it. Weights are {_html(signal)} clipped to this
scale: no tint is the floor, <span class="top">underlined</span> is the ceiling. Point at or tap a token for more.</p>
</section>"""


def _histogram(histogram: Histogram, clip: tuple[float, float]) -> str:
    total, most = max(sum(histogram.counts), 1), max([*histogram.counts, 1])
    bars = "".join(
        f'<i title="{_html(histogram.title)} {low:g} to {high:g}: {count:,} tokens, {count / total:.1%}" style="'
        f'--h:{math.sqrt(count / most):.3f};--w:{intensity((low + high) / 2, clip):.3g}"></i>'
        for low, high, count in zip(histogram.edges[:-1], histogram.edges[1:], histogram.counts, strict=True)
    )
    floor, ceiling = histogram.clipped
    return f"""<section class="panel"><h2>{_html(histogram.title)}</h2>
<div class="bars" role="img" aria-label="{_html(histogram.title)}">{bars}</div>
<div class="ends"><span>{histogram.edges[0]:g}</span><span>{histogram.edges[-1]:g}</span></div>
<p class="label">Tokens by {_html(histogram.title)}, tinted by weight; heights are square roots of counts.
{floor:.1%} lie at the floor ({clip[0]:g} or less), {ceiling:.1%} at the ceiling ({clip[1]:g} or more).</p></section>"""


def _table(table: Table) -> str:
    head = "".join(f"<th>{_html(cell)}</th>" for cell in table.header)
    bodies = ("".join(f'<td dir="auto">{_html(cell)}</td>' for cell in row) for row in table.rows)
    rows = "".join(f"<tr>{body}</tr>" for body in bodies)
    note = f'<p class="label">{_html(table.note)}</p>' if table.note else ""
    is_open = " open" if len(table.rows) <= OPEN_ROWS else ""
    return f"""<details class="panel"{is_open}><summary>{_html(table.title)}</summary>
<div class="wide"><table><tr>{head}</tr>{rows}</table></div>{note}</details>"""


def _article(response: ScoredResponse, place: str, clip: tuple[float, float]) -> str:
    user = f'<span class="label" dir="auto">{_html(response.user_id)}</span>' if response.user_id is not None else ""
    turns = "".join(
        f'<div class="turn"><div class="label">{_html(role)}</div><p class="text" dir="auto">{_html(content)}</p></div>'
        for role, content in response.turns
    )
    passes = "\n".join(_pass(name, tokens, clip) for name, tokens in response.passes.items())
    return f"""<article>
<header><h2>Response {_html(place)}</h2>{user}</header>
{_persona(response.persona)}
{turns}
{passes}
</article>"""


def _persona(facts: Sequence[str]) -> str:
    if not facts:
        return '<p class="label">No persona</p>'
    # A profile of passages runs to thousands of words; folded, it does not push the response off the screen.
    is_open = " open" if sum(map(len, facts)) <= 1200 else ""
    count = f"{len(facts)} entr{'y' if len(facts) == 1 else 'ies'}"
    items = "".join(f'<li dir="auto">{_html(fact)}</li>' for fact in facts)
    return f'<details class="persona"{is_open}><summary>Persona, {count}</summary><ul>{items}</ul></details>'


def _pass(name: str, tokens: Sequence[ScoredToken], clip: tuple[float, float]) -> str:
    return f"""<section class="pass">
<header><h3>{_html(name)}</h3><span class="label">{_pass_stats(tokens, clip)}</span></header>
<p class="tokens" dir="auto">{"".join(_token(token, clip) for token in tokens)}</p>
</section>"""


def _pass_stats(tokens: Sequence[ScoredToken], clip: tuple[float, float]) -> str:
    if not tokens:
        return "no tokens"
    mean_pir = sum(token.pir for token in tokens) / len(tokens)
    ce = -sum(token.logp for token in tokens) / len(tokens)
    at_ceiling = sum(_at_ceiling(token, clip) for token in tokens)
    count = f"{len(tokens):,} token{'s' if len(tokens) > 1 else ''}"
    return f"{count} · mean PIR {mean_pir:.2f} · loss {ce:.2f} · {at_ceiling:,} at the ceiling"


def _token(token: ScoredToken, clip: tuple[float, float]) -> str:
    shade = intensity(token.token_weight, clip)
    css_class = "t top" if _at_ceiling(token, clip) else "t"
    style = f' style="--w:{shade:.3g}"' if shade > 0 else ""
    text = _html(token.text).replace("\n", '<i class="nl"></i>\n')
    return f'<span class="{css_class}"{style} title="{_tooltip(token)}">{text}</span>'


def _tooltip(token: ScoredToken) -> str:
    logps = f"logp {token.logp:.2f} with persona, logp_cf {token.logp_cf:.2f} without"
    return f"PIR {token.pir:.2f} · weight {token.token_weight:.2f} · {logps}"


def _at_ceiling(token: ScoredToken, clip: tuple[float, float]) -> bool:
    return token.token_weight >= clip[1] > clip[0]


def _html(text: str) -> str:
    return escape(_visible(text))


def _visible(text: str) -> str:
    """The text with what acts shown, but tab and newline: control characters by their symbols (ESC -> ␛)."""
    return visible(text.translate(_CONTROL_PICTURES), keep="\t\n")


def _scale(clip: tuple[float, float]) -> tuple[float, float]:
    """The clip in fp32, as the weights that it is compared with; ValueError unless it is a scale."""
    if not (all(map(math.isfinite, clip)) and clip[0] <= clip[1]):
        raise ValueError(f"clip: expected finite clip_min <= clip_max, got {clip}")
    low, high = struct.unpack("2f", struct.pack("2f", *clip))
    return low, high


# ---------------------------------------------------------------------------------------------------------------
# Terminal

# From slate to blue of one lightness: visible on dark and light terminals, white text keeps a contrast of at least 4.7.
_TERMINAL_LOW = (100, 116, 139)
_TERMINAL_HIGH = (37, 99, 235)


def terminal_text(tokens: Iterable[ScoredToken], clip: tuple[float, float]) -> Text:
    """The tokens as coloured rich text. Its plain text is theirs, with what acts shown, but tab and newline."""
    from rich.text import Text

    clip = _scale(clip)
    text = Text()
    for token in tokens:
        text.append(_visible(token.text), style=_terminal_style(token, clip))
    return text


def _terminal_style(token: ScoredToken, clip: tuple[float, float]) -> str:
    shade = intensity(token.token_weight, clip)
    if shade == 0:
        return ""
    ends = zip(_TERMINAL_LOW, _TERMINAL_HIGH, strict=True)
    red, green, blue = (round(low + shade * (high - low)) for low, high in ends)
    return f"{'bold underline ' if _at_ceiling(token, clip) else ''}#ffffff on #{red:02x}{green:02x}{blue:02x}"
