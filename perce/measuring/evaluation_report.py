"""Turns records of evaluated examples into metrics with intervals, a comparison of two models, JSON and tables."""

from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from perce.data.readers import parse_json
from perce.environment import did_you_mean, in_one_move, written
from perce.errors import UserError
from perce.measuring.metrics import (
    FEW,
    REPLY_METRICS,
    RESAMPLES,
    ROUGE_NOTE,
    Interval,
    clustered_mean,
    paired_difference,
)  # fmt: skip
from perce.report.terminal import plain, show, table
from perce.visible import as_json

Records = Sequence[Mapping[str, Any]]

# metric: (label, field that is summed, field whose sum divides it ("" for the number of examples))
METRICS: dict[str, tuple[str, str, str]] = {
    "loss_personal_tokens": ("loss on personal tokens", "loss_personal", "personal_tokens"),
    "loss_other_tokens": ("loss on other tokens", "loss_other", "other_tokens"),
    "loss_with_persona": ("loss with persona", "loss", "tokens"),
    "loss_without_persona": ("loss without persona", "loss_without", "tokens"),
    "loss_swapped_persona": ("loss with another's persona", "loss_swapped", "tokens"),
    "uses_persona": ("replies that use the persona", "uses_persona", ""),
    "reference_uses_persona": ("references that use the persona", "reference_uses_persona", ""),
} | {name: (metric.label, name, "") for name, metric in REPLY_METRICS.items()}
BETTER = dict.fromkeys(("loss_personal_tokens", "loss_other_tokens", "loss_with_persona"), "↓")
BETTER |= dict.fromkeys(("loss_without_persona", "loss_swapped_persona", "reference_uses_persona"), "–")
"""Metrics of which less is better (↓) or neither more nor less is (–); more is better for all others."""
BY_TURN = ("loss_with_persona", "loss_without_persona", "uses_persona", "reference_uses_persona")
TURNS = 10  # turns of a conversation that the table and the JSON have
RESULT = "perce.evaluate"


def _columns(records: Records, metric: str) -> tuple[list[float], list[float]]:
    """(values, weights) of the records that have this metric."""
    _, value, weight = METRICS[metric]
    having = [record for record in records if record.get(value) is not None]
    values = [float(record[value]) for record in having]
    if weight == "other_tokens":
        return values, [record["tokens"] - record["personal_tokens"] for record in having]
    return values, [float(record[weight]) if weight else 1.0 for record in having]


def _clusters(records: Records, metric: str) -> list[str]:
    """The user of each record, or its row if users are not named: examples of one user are not independent."""
    value = METRICS[metric][1]
    return [str(record["user_id"] or record["source"]) for record in records if record.get(value) is not None]


def summarise(records: Records, notes: list[str], run: Mapping[str, Any], meteor: str | None) -> dict[str, Any]:
    """The result as JSON: each metric with its 95 % interval over users."""
    from importlib.metadata import version

    metrics = _means(records, METRICS)
    if "loss_swapped_persona" in metrics:
        having = [record for record in records if record["loss_swapped"] is not None]
        gain = clustered_mean(
            [record["loss_swapped"] - record["loss"] for record in having], [record["tokens"] for record in having],
            _clusters(having, "loss_swapped_persona"),
        )  # fmt: skip
        metrics["swap_cost"] = gain.to_dict() if gain else None
    about = {"rouge": ROUGE_NOTE, "meteor": meteor} if meteor else {}
    packages = {name: version(name) for name in ("torch", "transformers")}
    records_kept = [dict(record) for record in sorted(records, key=lambda record: record["example"])]
    return {
        "kind": RESULT, "run": dict(run), "packages": packages, "about": about, "notes": notes, "metrics": metrics,
        "by_turn": _by_turn(records), "records": records_kept,
    }  # fmt: skip


def _means(records: Records, metrics: Iterable[str]) -> dict[str, Any]:
    """The means of those metrics that any record has."""
    found = ((name, clustered_mean(*_columns(records, name), _clusters(records, name))) for name in metrics)
    return {name: interval.to_dict() for name, interval in found if interval is not None}


def _by_turn(records: Records) -> dict[int, dict[str, Any]]:
    """Means of the first replies of conversations, of the second, …; {} if no conversation has a second reply."""
    turns: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        turns.setdefault(record["turn"], []).append(record)
    return {turn: _means(turns[turn], BY_TURN) for turn in sorted(turns)[:TURNS]} if len(turns) > 1 else {}


def read_result(path: Path) -> dict[str, Any]:
    """An earlier result to compare with. UserError if the file is not a result of perce.evaluate."""
    try:
        result = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        near = "" if path.exists() else did_you_mean(str(path))
        raise UserError(
            f"--compare_with {path}: cannot be read as a result of perce.evaluate ({error}).{near}"
        ) from error
    if not isinstance(result, dict) or result.get("kind") != RESULT:
        raise UserError(f"--compare_with {path}: expected the JSON that perce.evaluate --output writes.")
    return result


def check_same(ours: Set[str], other: Mapping[str, Any], name: str) -> None:
    """UserError unless the other result has the examples with these keys."""
    theirs = {record["key"] for record in other["records"]}
    if missing := ours ^ theirs:
        raise UserError(
            f"--compare_with {name}: {len(missing)} of {len(ours | theirs)} examples are in one result only. Evaluate "
            "both models on the same data, split and limit."
        )


def compare(records: Records, run: Mapping[str, Any], other: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Differences (this model minus the other) over the same examples; see check_same.

    `settings` in the result has the facts of the runs that also differ, as [of this run, of the other].
    """
    theirs = {record["key"]: record for record in other["records"]}
    ours = {record["key"]: record for record in records}
    its_run = other["run"]
    settings = {
        fact: [run.get(fact), its_run.get(fact)]
        for fact in dict.fromkeys([*run, *its_run])
        if fact not in ("model", "weights", "batch_size", "share") and run.get(fact) != its_run.get(fact)
    }
    keys = sorted(ours)
    differences: dict[str, Any] = {}
    assert len(ours) == len(records), "keys are unique"
    for metric in METRICS:
        (mine, weights), (its, their_weights) = (
            _columns([side[key] for key in keys], metric) for side in (ours, theirs)
        )
        clusters = _clusters([ours[key] for key in keys], metric)
        # Losses per token are comparable only for the same tokens: not if tokenizers or shown passages differ.
        if weights != their_weights or not mine or metric == "reference_uses_persona":
            continue
        if (result := paired_difference(mine, its, weights, clusters)) is not None:
            differences[metric] = result[0].to_dict() | {"p": result[1]}
    return {"with": name, "model": other["run"].get("model"), "differences": differences, "settings": settings}


def write_result(path: Path, result: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> None:
    content = dict(result) | ({"comparison": comparison} if comparison else {})
    with written(path), in_one_move(path) as unfinished:
        unfinished.write_text(as_json(content, indent=1) + "\n", encoding="utf-8")


def print_result(result: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> None:
    """Prints, within 80 columns, the values, the differences, what the signs mean, and notes."""
    unit = "user" if any(record["user_id"] for record in result["records"]) else "row"
    labels = {name: label for name, (label, _, _) in METRICS.items()} | {"swap_cost": "cost of another's persona"}
    rows = table("", "value", "95 % interval", "examples", f"{unit}s", numbers=True)
    for name, metric in result["metrics"].items():
        if metric is not None:
            interval = Interval(**metric)
            counts = f"{interval.n:,}", f"{interval.clusters:,}"
            span = interval.span(alone=f"one {unit}")
            rows.add_row(f"{BETTER.get(name, '↑')} {labels[name]}", f"{interval.value:.4f}", span, *counts)
    differences = table("difference", "value", "95 % interval", "p", numbers=True)
    for name, found in comparison["differences"].items() if comparison else ():
        interval = Interval(**{key: value for key, value in found.items() if key != "p"})
        span = interval.span("+.4f", f"one {unit}")
        differences.add_row(
            f"{BETTER.get(name, '↑')} {labels[name]}", f"{interval.value:+.4f}", span, f"{found['p']:.4f}"
        )
    legend = f"↓ lower is better, ↑ higher, – neither; 95 %: bootstrap by {unit}"
    tested = f"p: sign-flip permutation test by {unit}, two-sided, {RESAMPLES:,} draws"
    about = (f"{name}: {text}" for name, text in result["about"].items())
    notes = [*_few(result["records"], unit, bool(comparison)), *result["notes"], *about]
    bold = []
    if comparison:
        notes.append(f"differences: this model minus {comparison['model'] or comparison['with']}")
        bold = [
            f"not only the model differs: {fact} is {mine!r} here and {its!r} there"
            for fact, (mine, its) in comparison["settings"].items()
        ]
    tables: list[Any] = [rows, "", *_table_by_turn(result["by_turn"])]
    tables += [differences, "", legend, tested] if comparison else [legend]
    show(*tables, *(plain(note, "dim") for note in notes), *(plain(note, "bold") for note in bold))


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


def _few(records: Records, unit: str, compared: bool) -> list[str]:
    """A note if there are too few users for good intervals and a small p; empty if there are enough."""
    count = len({record["user_id"] or record["source"] for record in records})
    if not 0 < count < FEW:
        return []
    least = f", and p cannot be below {2.0 ** (1 - count):.2g}" if compared else ""
    return [f"only {count} {unit}{'s' * (count > 1)}: intervals are rough{least}; use at least {FEW}"]
