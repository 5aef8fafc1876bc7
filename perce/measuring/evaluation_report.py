"""Turns records of evaluated examples into metrics with intervals, JSON and tables. For comparisons: comparison.py."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from perce.measuring.metrics import (
    FEW,
    REPLY_METRICS,
    SHARE,
    UNBOUNDED,
    Interval,
    clustered_mean,
    paired_difference,
)  # fmt: skip
from perce.report.terminal import plain, show, table

Records = Sequence[Mapping[str, Any]]


class Metric(NamedTuple):
    label: str
    value: str
    """The field that is summed; see `field_of`."""
    weight: str = ""
    """The field whose sum divides it; "" for the number of examples."""
    better: str = "↑"
    """Whether more (↑), less (↓) or neither (–) is better."""
    bounds: tuple[float, float] = UNBOUNDED
    share: bool = False
    """Whether every value is 0 or 1."""


_LOSS = (0, math.inf)
_BUILT_IN = {
    "loss_personal_tokens": Metric("loss on personal tokens", "loss_personal", "personal_tokens", "↓", _LOSS),
    "loss_other_tokens": Metric("loss on other tokens", "loss_other", "other_tokens", "↓", _LOSS),
    "loss_with_persona": Metric("loss with persona", "loss", "tokens", "↓", _LOSS),
    "loss_without_persona": Metric("loss without persona", "loss_without", "tokens", "–", _LOSS),
    "loss_swapped_persona": Metric("loss with another's persona", "loss_swapped", "tokens", "–", _LOSS),
    "swap_cost": Metric("cost of another's persona", "swap_cost", "tokens"),
    "swap_cost_other": Metric("another's cost, other tokens", "swap_cost_other", "other_tokens"),
    "loss_of_nobody": Metric("loss of rows without a persona", "loss_of_nobody", "tokens", "↓", _LOSS),
    "uses_persona": Metric("replies that use the persona", "uses_persona", better="–", bounds=SHARE, share=True),
    "uses_another": Metric("replies that use another's", "uses_another", better="–", bounds=SHARE, share=True),
    "reference_uses_persona": Metric(
        "references that use the persona", "reference_uses_persona", better="–", bounds=SHARE, share=True
    ),
    "reply_words": Metric("words per reply", "reply_words", better="–", bounds=(0, math.inf)),
    "reference_words": Metric("words per reference", "reference_words", better="–", bounds=(0, math.inf)),
}
SWAPPED = {"swap_cost": ("loss_swapped", "loss"), "swap_cost_other": ("loss_other_swapped", "loss_other")}
"""A computed field: the loss with another user's persona and the one with the own, which it is the difference of."""
OF_REFERENCES = ("reference_uses_persona", "reference_words")  # alike for every model
_OF_PERSONAL = "personal_mask", "other personal tokens"
COMPARABLE = {
    "personal_tokens": _OF_PERSONAL, "other_tokens": _OF_PERSONAL,
    "tokens": ("tokens", "another number of tokens"),  # of another tokenizer
}  # fmt: skip
"""By a metric's weight: the field that an example must have alike in two results, and what it has otherwise."""
BY_TURN = ("loss_with_persona", "loss_without_persona", "uses_persona", "reference_uses_persona")
TURNS = 10  # turns of a conversation that the table and the JSON have
RESULT, FORM = "perce.evaluate", 5  # kind and version of a result: raise FORM when a field or a metric changes


def all_metrics() -> dict[str, Metric]:
    of_replies = {name: Metric(x.label, name, "", x.better, x.bounds) for name, x in REPLY_METRICS.items()}
    return _BUILT_IN | of_replies


def field_of(record: Mapping[str, Any], name: str) -> Any:
    """A field of a record, or what is computed from its fields; None if it was not measured."""
    if name == "other_tokens":
        return record["tokens"] - record["personal_tokens"]
    if name in SWAPPED:
        swapped, own = SWAPPED[name]
        return None if record.get(swapped) is None else record[swapped] - record[own]
    return record.get(name)


def unit_of(record: Mapping[str, Any]) -> str:
    """The user of a record, or its row if users are not named: examples of one user are not independent."""
    return str(record["user_id"] or record["source"])


def columns(records: Records, metric: Metric) -> tuple[list[float], list[float], list[str]]:
    """(values, weights, users) of the records that have this metric."""
    having = [record for record in records if field_of(record, metric.value) is not None]
    values = [float(field_of(record, metric.value)) for record in having]
    weights = [float(field_of(record, metric.weight)) if metric.weight else 1.0 for record in having]
    return values, weights, [unit_of(record) for record in having]


def summarise(records: Records, notes: list[str], run: Mapping[str, Any]) -> dict[str, Any]:
    """The result as JSON: each metric with its 95 % interval over users."""
    from importlib.metadata import version

    packages = {name: version(name) for name in ("torch", "transformers")}
    records_kept = [dict(record) for record in sorted(records, key=lambda record: record["example"])]
    return {
        "kind": RESULT, "run": dict(run), "packages": packages, "notes": notes,
        "metrics": _means(records, all_metrics()), "by_turn": _by_turn(records), "records": records_kept,
    }  # fmt: skip


def _means(records: Records, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """The means of those metrics that any record has."""
    found = (
        (name, clustered_mean(*columns(records, each), bounds=each.bounds, share=each.share))
        for name, each in metrics.items()
    )
    return {name: interval._asdict() for name, interval in found if interval is not None}


def _by_turn(records: Records) -> dict[int, dict[str, Any]]:
    """Means of the first replies of conversations, of the second, …; {} if no conversation has a second reply."""
    turns: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        turns.setdefault(record["turn"], []).append(record)
    metrics = {name: _BUILT_IN[name] for name in BY_TURN}
    return {turn: _means(turns[turn], metrics) for turn in sorted(turns)[:TURNS]} if len(turns) > 1 else {}


def unit_name(records: Records) -> str:
    """What `unit_of` these records is: "user", or "row" if no users are named."""
    return "user" if any(record["user_id"] for record in records) else "row"


def label_of(name: str) -> str:
    """How tables call a metric."""
    metric = all_metrics()[name]
    return f"{metric.better} {metric.label}"


def print_result(result: Mapping[str, Any]) -> None:
    """Prints, within 80 columns, the values, what the signs mean, and notes."""
    unit = unit_name(result["records"])
    rows = table("", "value", "95 % interval", "examples", f"{unit}s", numbers=True)
    for name, metric in result["metrics"].items():
        interval = Interval(**metric)
        counts = f"{interval.n:,}", f"{interval.clusters:,}"
        rows.add_row(label_of(name), f"{interval.value:.4f}", interval.span(alone=f"one {unit}"), *counts)
    legend = f"↓ lower is better, ↑ higher, – neither; 95 %: bootstrap by {unit}, or Wilson"
    notes = [*few(result["metrics"], unit), *result["notes"]]
    show(rows, "", *_table_by_turn(result["by_turn"]), legend, *(plain(note, "dim") for note in notes))


def _table_by_turn(by_turn: Mapping[int, Mapping[str, Any]]) -> list[Any]:
    """One line per turn: losses, how much lower the persona makes them, and whether replies use it."""
    if not by_turn:
        return []
    found = table("turn", "with persona", "without", "gain", "replies use it", "examples", numbers=True)
    for turn, metrics in by_turn.items():
        with_it, without, uses, _ = (metrics[name]["value"] if name in metrics else None for name in BY_TURN)
        gain = without - with_it if with_it is not None and without is not None else None
        counts = max((metric["n"] for metric in metrics.values()), default=0)
        cells = ("" if value is None else f"{value:.4f}" for value in (with_it, without, gain, uses))
        found.add_row(str(turn), *cells, f"{counts:,}")
    return [found, ""]


def cut_replies(records: Records, max_new_tokens: int) -> list[str]:
    """A note on replies that had not ended after so many tokens."""
    ended = [not record["is_cut"] for record in records if "is_cut" in record]
    cut = f"{ended.count(False):,} of {len(ended):,} replies were cut at --max_new_tokens {max_new_tokens}"
    return [] if all(ended) else [f"{cut}: scores are of their beginnings"]


def quoting(records: Records) -> list[str]:
    """A note on replies that use the persona more often than the references do, and not by chance (p ≤ 0.05, which
    takes six users)."""
    asked = [x for x in records if None not in (x.get("uses_persona"), x.get("reference_uses_persona"))]
    ours, theirs = ([float(x[name]) for x in asked] for name in ("uses_persona", "reference_uses_persona"))
    found = paired_difference(ours, theirs, [1.0] * len(asked), [unit_of(x) for x in asked], bounds=SHARE)
    if found is None or found[0].value <= 0 or found[1] > 0.05:
        return []
    shares = [f"{100 * sum(uses) / len(asked):.1f} %" for uses in (ours, theirs)]
    return [
        f"{shares[0]} of the replies use the persona, and {shares[1]} of the references. Of models trained with "
        "--objective perce, one with --clip_min 1 --clip_max 2 quoted less on tweets, at half of the gain"
    ]


def few(found: Mapping[str, Mapping[str, Any]], unit: str, rough: str = "") -> list[str]:
    """A note on the metric with the fewest users if they are too few for good intervals, which `rough` adds to."""
    counts = {name: metric["clusters"] for name, metric in found.items()}
    name = min(counts, key=counts.__getitem__, default="")
    if not name or counts[name] >= FEW:
        return []
    count, of = counts[name], f" ({all_metrics()[name].label})" if counts[name] < max(counts.values()) else ""
    return [f"only {count} {unit}{'s' * (count > 1)}{of}: intervals are rough{rough}; use at least {FEW}"]
