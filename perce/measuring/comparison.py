"""Results of perce.evaluate compared: differences with intervals over users, and what models of several seeds add.

A side of a comparison is one result, or several of one method, whose models were trained with different seeds.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from perce.errors import UserError
from perce.files.paths import did_you_mean
from perce.measuring.evaluation_report import (
    COMPARABLE,
    FORM,
    OF_REFERENCES,
    RESULT,
    Metric,
    all_metrics,
    columns,
    few,
    field_of,
    label_of,
    unit_name,
)  # fmt: skip
from perce.measuring.metrics import RESAMPLES, Interval, paired_difference
from perce.reading.readers import parse_json
from perce.report.terminal import plain, show, table

Side = Mapping[str, Mapping[str, Any]]
"""Results by name."""
ByKey = Mapping[str, Mapping[str, Any]]
"""The records of a result by their keys."""
# Facts of a run that two results may have different.
NOT_SETTINGS = ("model", "weights", "batch_size", "share", "streaming")


def read_result(option: str, path: str) -> dict[str, Any]:
    """A result to compare. UserError if the file is not a result of this version of perce.evaluate."""
    try:
        result = parse_json(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"{option} {path}: cannot be read as a result of perce.evaluate ({error})."
        raise UserError(f"{what}{did_you_mean(path)}") from error
    is_one = isinstance(result, dict) and result.get("kind") == RESULT
    if not (is_one and isinstance(result.get("run"), dict) and isinstance(result.get("records"), list)):
        raise UserError(f"{option} {path}: expected the JSON that perce.evaluate --output writes.")
    if result["run"].get("form") != FORM:
        raise UserError(f"{option} {path}: was written by another version of perce. Evaluate that model again.")
    metrics = all_metrics().values()
    for number, record in enumerate(result["records"], 1):
        try:
            users_of({"records": [record]})
            for metric in metrics:
                columns([record], metric)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"record {number} is not as perce.evaluate writes it ({error!r})"
            raise UserError(f"{option} {path}: {what}. Evaluate that model again.") from error
    return result


def users_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The users of the examples, by their keys."""
    return {record["key"]: record["user_id"] for record in result["records"]}


def check_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> None:
    """UserError, which begins with `where`, unless two results have the same examples of the same users; see users_of.
    Interval and p are over users, so they would depend on which result comes first."""
    if missing := ours.keys() ^ theirs.keys():
        raise UserError(
            f"{where}: {len(missing)} of {len({**ours, **theirs})} examples are in one result only. Evaluate both "
            "models on the same data, split and limit."
        )
    if others := sum(theirs[key] != user for key, user in ours.items()):
        raise UserError(
            f"{where}: {others} of {len(ours)} examples have another user in the other result. Evaluate both models "
            "on the same data."
        )


def check_sides(sides: Mapping[str, Side]) -> None:
    """UserError unless all results, by option and path, have the same examples, and each of a side its own weights."""
    named = [(f"{option} {path}", result) for option, side in sides.items() for path, result in side.items()]
    (first, expected), *others = named
    for where, result in others:
        check_same(users_of(expected), users_of(result), f"{first}, {where}")
    for option, side in sides.items():
        known: dict[str, str] = {}
        for path, result in side.items():
            if (before := known.setdefault(str(result["run"].get("weights")), path)) != path:
                raise UserError(
                    f"{option} {before},{path}: are results of the same weights. Give one result of each trained model."
                )


def compare(a: Side, b: Side) -> dict[str, Any]:
    """Differences (A minus B) over the same examples; see check_same. An example's value is the mean over a side.

    `settings` in the result has the facts of the runs that differ too, by result; `left_out` why a metric is not
    compared.
    """
    results = {**a, **b}
    ours, theirs = (
        [{record["key"]: record for record in result["records"]} for result in side.values()] for side in (a, b)
    )
    differences: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, metric in all_metrics().items():
        found = None if name in OF_REFERENCES else _difference(ours, theirs, metric)
        if isinstance(found, str):
            left_out[name] = found
        elif found is not None:
            differences[name] = found
    runs = {name: result["run"] for name, result in results.items()}
    facts = dict.fromkeys(fact for run in runs.values() for fact in run if fact not in NOT_SETTINGS)
    settings = {fact: {name: run.get(fact) for name, run in runs.items()} for fact in facts}
    return {
        "sides": [{name: result["run"].get("model") for name, result in side.items()} for side in (a, b)],
        "unit": unit_name(next(iter(a.values()))["records"]), "differences": differences, "left_out": left_out,
        "settings": {fact: values for fact, values in settings.items() if not _alike(values.values())},
    }  # fmt: skip


def _difference(a: Sequence[ByKey], b: Sequence[ByKey], metric: Metric) -> dict[str, Any] | str | None:
    """A metric's difference as JSON, why it is not compared, or None if no result has it.

    `means` has the mean of each result, by side; `pairs` the smallest and the largest difference of a result of A and
    one of B.
    """
    results = [*a, *b]
    measured = [{key for key in records if field_of(records[key], metric.value) is not None} for records in results]
    both = sorted(set.intersection(*measured))
    if not any(measured):
        return None
    if not both:
        return "no example has it in every result"
    field, otherwise = COMPARABLE.get(metric.weight, ("", ""))
    if differing := sum(not _alike(records[key].get(field) for records in results) for key in both):
        return f"{differing:,} of {len(both):,} examples have {otherwise} in another result"
    by_result = [columns([records[key] for key in both], metric) for records in results]
    _, weights, users = by_result[0]
    values = np.array([values for values, _, _ in by_result])
    ours, theirs = values[: len(a)], values[len(a) :]
    if (found := paired_difference(ours.mean(0), theirs.mean(0), weights, users, bounds=metric.bounds)) is None:
        return None
    means = [(side.sum(1) / sum(weights)).tolist() for side in (ours, theirs)]
    pairs = [min(means[0]) - max(means[1]), max(means[0]) - min(means[1])]
    return found[0]._asdict() | {"p": found[1], "means": means, "pairs": pairs}


def _alike(values: Iterable[Any]) -> bool:
    first, *others = values
    return all(value == first for value in others)


def print_means(comparison: Mapping[str, Any]) -> None:
    """Prints, within 80 columns, the mean of each side and the range of its results, if they are several."""
    header = ["mean, over results"]
    for letter, side in zip("AB", comparison["sides"], strict=True):
        header += [letter, "min", "max"] if len(side) > 1 else [letter]
    means = table(*header, numbers=True)
    means.padding = (0, 1, 0, 0)
    for name, found in comparison["differences"].items():
        cells: list[float] = []
        for side in found["means"]:
            cells += [sum(side) / len(side), min(side), max(side)] if len(side) > 1 else side
        digits = 4 if max(map(abs, cells)) < 100 else 2  # six of these columns fit if each has seven characters
        means.add_row(label_of(name), *(f"{x:.{digits}f}" for x in cells))
    show(means, "")


def print_comparison(comparison: Mapping[str, Any]) -> None:
    """Prints, within 80 columns, the differences, what they are of, and what else differs."""
    unit, counts = comparison["unit"], [len(side) for side in comparison["sides"]]
    several = max(counts) > 1
    rows = table("A − B", "value", "95 % interval", "p", *["apart"] * several, numbers=True)
    for name, found in comparison["differences"].items():
        interval = Interval(*(found[field] for field in Interval._fields))
        apart = ["yes" if found["pairs"][0] > 0 or found["pairs"][1] < 0 else "no"] * several
        span = interval.span("+.4f", f"one {unit}")
        rows.add_row(label_of(name), f"{interval.value:+.4f}", span, f"{found['p']:.4f}", *apart)
    least = min((found["clusters"] for found in comparison["differences"].values()), default=1)
    notes = few(comparison["differences"], unit, f", and p cannot be below {2.0 ** (1 - least):.2g}")
    notes += [
        f"{letter}: {name}, of {model or 'the default model'}"
        for letter, side in zip("AB", comparison["sides"], strict=True)
        for name, model in side.items()
    ]
    bold = [f"not compared: {all_metrics()[name].label}, because {why}" for name, why in comparison["left_out"].items()]
    bold += [f"not only the model differs: {fact} is {_told(x)}" for fact, x in comparison["settings"].items()]
    show(
        rows, "", *_legend(unit, counts), *(plain(note, "dim") for note in notes),
        *(plain(note, "bold") for note in bold),
    )  # fmt: skip


def _legend(unit: str, counts: Sequence[int]) -> list[str]:
    """What the columns of differences tell, and what they do not, by the number of results of each side."""
    lines = [
        f"p: sign-flip permutation test by {unit}, two-sided; {RESAMPLES:,} draws, or all signs",
        f"interval and p hold for these models: they tell how {unit}s differ, not seeds",
        "if only the interval or only p tells a difference, take it as not shown",
    ]
    if max(counts) == 1:
        return [*lines, "one model a side: what other seeds would give is unknown (see perce compare)"]
    chance = 200 / comb(sum(counts), counts[0])
    lines += [
        "apart: each result of A is above each of B, or each is below; where seeds alone",
        f"  differ, this happens in {chance:.2g} % of cases",
    ]
    alone = (letter for letter, count in zip("AB", counts, strict=True) if count == 1)
    return [*lines, *(f"{letter} is one result: its spread over seeds is unknown" for letter in alone)]


def _told(values: Mapping[str, Any]) -> str:
    """Each value with the results that have it."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(repr(value), []).append(name)
    return " and ".join(f"{value} in {', '.join(having)}" for value, having in names.items())
