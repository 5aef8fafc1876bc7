"""The HTML page of scored responses: one file that asks for nothing from outside.

page.html   the frame: $names are filled in here       page.css, page.js   its style and script, allowed by their hashes

Text from data is escaped, or embedded in base64 and set as text by the script. Responses are rendered as they are
scrolled into view, and a page holds a bounded number of tokens, because all of them are unpacked when it is opened
(0.4 s in Chromium for as many as there can be, 0.15 s for a page of ten responses; two cores of an AMD EPYC).
"""

from __future__ import annotations

import base64
import hashlib
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path
from string import Template
from typing import NamedTuple

from perce.files.outputs import in_one_move
from perce.objectives import PIR, Objective, TokenWeighting
from perce.report.embedded import embedded, mean
from perce.report.heatmap import Cells, Histogram, ScoredResponse, ScoredToken, harmless, intensity, scale

OPEN_ROWS = 8  # a longer table is folded: the responses are what people come for
MOST_USERS = 50  # in the table of users
MOST_TOKENS = 300_000  # of a page, over all passes: random ones then take less than 5 MB under any objective
SPAN = 3  # nats at which the tints of PIR and of changes are full


@dataclass(frozen=True)
class Weighed:
    """How the tokens of a page were weighed, for its words: by which objective, and its clip."""

    objective: Objective
    weighting: TokenWeighting
    """The objective's, with the contrast and the clip that were asked for."""
    documents: bool = False
    """Whether long and short context were compared, in place of prompts with and without a persona."""

    @property
    def title(self) -> str:
        if "logp_cf" not in self.weighting.reported.needs:
            return "Which tokens count most"
        return "Which tokens need the long context" if self.documents else "Which tokens are personal"

    @property
    def full(self) -> str:
        return "after the long context" if self.documents else "with the persona"

    @property
    def short(self) -> str:
        return "after the short context" if self.documents else "without it"

    @property
    def signal(self) -> str:
        return self.weighting.reported.signal_name

    @property
    def weight(self) -> str:
        """What the tint and the numbers of a token call its weight."""
        return "weight" if self.weighting.signal else "PerCE's weight"

    @property
    def meaning(self) -> str:
        """A sentence on the signal."""
        signal = self.weighting.signal or PIR
        return f"Here {signal.name} is {signal.meaning.format(full=self.full, short=self.short)}."


def write_page(
    path: str | Path,
    responses: Sequence[ScoredResponse],
    *,
    title: str,
    summary: Sequence[tuple[str, str]],
    weighed: Weighed,
    scored: int | None = None,
    panels: Sequence[Histogram | Cells] = (),
) -> None:
    """Write the page of `responses`: of the first ones whose passes have at most MOST_TOKENS tokens together.

    Args:
        summary: (label, value) pairs, shown at the top; `panels` follow.
        scored: how many responses there are, if the page shows only some; default: those given.
    """
    scored = len(responses) if scored is None else scored
    assert scored >= len(responses)
    responses = _that_fit(responses)
    clip = scale((weighed.weighting.clip_min, weighed.weighting.clip_max))
    users = users_table(responses, of="Of the responses shown." if len(responses) < scored else "")
    style, script, frame = (
        Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("css", "js", "html")
    )
    more = {"span": SPAN, "full": weighed.full, "short": weighed.short, "documents": weighed.documents}
    more["weight"] = weighed.weight
    page = Template(frame).substitute(
        policy=_policy(style, script), style=style, script=script, title=_html(title), summary=_summary(summary),
        reading=_reading(responses, weighed), legend=_legend(weighed), shown=_shown(len(responses), scored),
        panels="".join(_histogram(x, clip, weighed) if isinstance(x, Histogram) else _table(x) for x in panels)
        + (_table(users, folded=True) if users else ""),
        nothing="No response matches." if responses else f"No responses {'are shown' if scored else 'were scored'}.",
        data=embedded(responses, weighed.signal, clip, more),
    )  # fmt: skip
    with in_one_move(Path(path)) as unfinished:
        unfinished.write_text(page, encoding="utf-8", newline="\n")


def _that_fit(responses: Sequence[ScoredResponse]) -> Sequence[ScoredResponse]:
    """The first responses, one at least, with MOST_TOKENS tokens at most."""
    totals = accumulate(sum(map(len, response.passes.values())) for response in responses)
    return responses[: max(bisect_right([*totals], MOST_TOKENS), 1)]


def _policy(style: str, script: str) -> str:
    """A Content-Security-Policy under which this style and this script are all that acts, and nothing is loaded."""
    allowed = (f"style-src 'sha256-{_digest(style)}'", f"script-src 'sha256-{_digest(script)}'")
    return "; ".join(("default-src 'none'", *allowed, "base-uri 'none'", "form-action 'none'"))


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _summary(rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    items = "".join(f'<div><dt>{_html(label)}</dt><dd dir="auto">{_html(value)}</dd></div>' for label, value in rows)
    return f'<dl class="summary">{items}</dl>'


def _shown(shown: int, scored: int) -> str:
    return f"This page shows {shown:,} of {scored:,} scored responses." if shown < scored else ""


# ---- words


def _legend(weighed: Weighed) -> str:
    """One scale per tint; the style shows the one that is chosen."""
    low, high = weighed.weighting.clip_min, weighed.weighting.clip_max
    ends = '<span class="low">overlined</span> and <span class="top">underlined</span>: the ends, or beyond'
    return f"""<div class="scale" data-for="weight"><b>{_html(_weight_is(weighed))}</b>
<span>{low:g} <i></i> {high:g}</span> <span><span class="top">underlined</span>: {high:g}, the ceiling</span></div>
<div class="scale" data-for="pir"><b>PIR, nats</b> <span>−{SPAN} <i></i> +{SPAN}</span> <span>{ends}</span></div>
<div class="scale" data-for="change"><b>Change of log p {_html(weighed.full)}, nats</b>
<span>−{SPAN} <i></i> +{SPAN}</span> <span>{ends}</span></div>"""


def _weight_is(weighed: Weighed) -> str:
    name = f"{weighed.signal}, clipped"
    if weighed.weighting.signal is None:
        return f"{weighed.objective.title} weighs all tokens the same; tint: PerCE's weight ({name})"
    if weighed.objective.over_step:
        return f"Token weight ({name}) before {weighed.objective.title} deals it to other tokens"
    return f"Token weight: {name}"


def _reading(responses: Sequence[ScoredResponse], weighed: Weighed) -> str:
    """The folded section for who has not seen such a page before."""
    full, short = _html(weighed.full), _html(weighed.short)
    meaning = "" if weighed.signal == "PIR" else f" {_html(weighed.meaning)}"
    example = _example(responses, weighed)
    return f"""<details class="panel reading"><summary>How to read this page</summary>
<p>Each response was scored twice: {full} and {short}. PIR is a token's log-probability {full} minus its log-probability
{short}, in nats: above 0 the token is likelier {full}, and at 0 it is as likely either way.</p>
<p>{_html(_weights(weighed))}{meaning}</p>{f"<p>{example}</p>" if example else ""}
<p>Point at a token, tap it, or go to it with the arrow keys: its numbers appear at the bottom edge. If responses were
scored before and after training, they are sorted by the numbers after it. Press <kbd>?</kbd> for the keys.</p>
</details>"""


def _weights(weighed: Weighed) -> str:
    title, clip = weighed.objective.title, f"{weighed.weighting.clip_min:g} … {weighed.weighting.clip_max:g}"
    is_clipped = f"is {weighed.signal}, clipped to {clip}."
    if weighed.weighting.signal is None:
        return f"{title} gives every token the same weight. The tint compares: PerCE's weight of a token {is_clipped}"
    dealt = f" {title} then deals a step's weights to other tokens." if weighed.objective.over_step else ""
    twice = "A token with twice the weight of another counts twice as much in the loss."
    return f"The weight of a token {is_clipped} {twice}{dealt}"


class _Word(NamedTuple):
    number: int
    token: ScoredToken


def _words(responses: Sequence[ScoredResponse]) -> Iterator[_Word]:
    """Tokens that are a whole word, in each response's last pass."""
    for number, response in enumerate(responses, 1):
        tokens = [*response.passes.values()][-1] if response.passes else ()
        for token, following in zip(tokens, [*[x.text for x in tokens[1:]], " "], strict=False):
            is_word = token.text.strip().isalpha() and token.text[0] == " " and not following[:1].isalpha()
            if is_word and all(map(math.isfinite, token[1:])):
                yield _Word(number, token)


def _example(responses: Sequence[ScoredResponse], weighed: Weighed) -> str:
    """A sentence on the word with the highest weight below the ceiling; empty where there is none."""
    low, high = scale((weighed.weighting.clip_min, weighed.weighting.clip_max))
    words = [word for word in _words(responses) if round(word.token.token_weight, 2) < high]
    if not words:
        return ""
    number, token = max(words, key=lambda word: word.token.token_weight)
    its = weighed.weight if weighed.weighting.signal is None else f"its {weighed.weight}"
    clipped = "below the clip, which raises it to" if token.signal < low else f"within the clip, so {its} is"
    logps = f"{_number(token.logp)} {weighed.full} and {_number(token.logp_cf)} {weighed.short}"
    signal = "" if weighed.signal == "PIR" else f", and {weighed.signal} is {_number(token.signal)}"
    return (
        f'For example, <b dir="auto">{_html(token.text.strip())}</b> in response {number:,} has log-probability '
        f"{_html(logps)}: PIR is {_number(token.pir)}{_html(signal)}. That is {clipped} {_number(token.token_weight)}."
    )


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


# ---- panels


def users_table(responses: Sequence[ScoredResponse], of: str = "") -> Cells | None:
    """Examples, mean PIR and loss per user, in each response's last pass; None of fewer than two users. of: a sentence
    on which responses these are."""
    tokens: dict[str, list[ScoredToken]] = defaultdict(list)
    examples: dict[str, int] = defaultdict(int)
    for response in responses:
        if response.user_id is not None and response.passes:
            tokens[response.user_id] += [*response.passes.values()][-1]
            examples[response.user_id] += 1
    if len(examples) < 2:
        return None
    most = sorted(examples, key=lambda user: -examples[user])[:MOST_USERS]
    most_of = f"The {MOST_USERS} users with the most responses, of {len(examples):,}." * (len(most) < len(examples))
    rows = []
    for user in most:
        means = mean([x.pir for x in tokens[user]]), mean([-x.logp for x in tokens[user]])
        cells = ("–" if each is None else f"{each:.2f}" for each in means)
        rows.append((user, f"{examples[user]:,}", f"{len(tokens[user]):,}", *cells))
    return Cells("Users", ("user", "responses", "tokens", "mean PIR", "loss"), rows, f"{of} {most_of}".strip())


def _histogram(histogram: Histogram, clip: tuple[float, float], weighed: Weighed) -> str:
    total, most = max(sum(histogram.counts), 1), max([*histogram.counts, 1])
    title, bars = _html(histogram.title), []
    for place, count in enumerate(histogram.counts):
        low, high = histogram.edges[place], histogram.edges[place + 1]
        height = 100 * math.sqrt(count / most)
        box = f'x="{10 * place}" y="{100 - height:.2f}" width="9" height="{height:.2f}"'
        tint = 0.2 + 0.8 * intensity((low + high) / 2, clip)
        bars.append(
            f"<g><title>{title} {low:g} to {high:g}: {count:,} tokens, {count / total:.1%}</title>"
            f'<rect class="base" {box}/><rect class="tinted" {box} fill-opacity="{tint:.3f}"/></g>'
        )
    floor, ceiling = histogram.clipped
    return f"""<section class="panel"><h2>Tokens by {title}</h2>
<svg class="bars" viewBox="0 0 {10 * len(bars)} 100" preserveAspectRatio="none" role="img"
 aria-label="Histogram of the tokens by {title}">{"".join(bars)}</svg>
<div class="ends"><span>{histogram.edges[0]:g}</span><span>{histogram.edges[-1]:g}</span></div>
<p class="label">Tinted by {weighed.weight}; heights are square roots of counts.
{floor:.1%} lie at the floor ({clip[0]:g} or less), {ceiling:.1%} at the ceiling ({clip[1]:g} or more).</p></section>"""


def _table(table: Cells, folded: bool = False) -> str:
    head = "".join(f'<th scope="col">{_html(cell)}</th>' for cell in table.header)
    bodies = ("".join(f'<td dir="auto">{_html(cell)}</td>' for cell in row) for row in table.rows)
    rows = "".join(f"<tr>{body}</tr>" for body in bodies)
    note = f'<p class="label">{_html(table.note)}</p>' if table.note else ""
    is_open = " open" if len(table.rows) <= OPEN_ROWS and not folded else ""
    return f"""<details class="panel"{is_open}><summary>{_html(table.title)}</summary>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}</details>"""


def _html(text: str) -> str:
    return escape(harmless(text))
