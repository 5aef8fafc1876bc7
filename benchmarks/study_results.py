"""The cells of a study's results file, and what is computed from their evaluated examples."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from perce.measuring.evaluation_report import Metric, all_metrics, field_of, unit_of
from perce.measuring.metrics import Interval, paired_difference
from perce.objectives import OBJECTIVES

NAMES = {"base": "base model"} | {name: entry.title for name, entry in OBJECTIVES.items()} | {"perce": "**PerCE**"}
# column: (metric of perce.evaluate, digits, factor)
COLUMNS = {
    "loss on personal tokens": ("loss_personal_tokens", 3, 1),
    "loss on other tokens": ("loss_other_tokens", 3, 1),
    "rise with another user's persona": ("swap_cost", 3, 1),
    "the same, on other tokens": ("swap_cost_other", 3, 1),
    "replies that use the persona, %": ("uses_persona", 1, 100),
    "ROUGE-L": ("rougeL", 3, 1),
    "METEOR": ("meteor", 3, 1),
}
COST = "rise of the loss on other tokens compared with CE, %"
KEPT = "share of PerCE's gain on personal tokens, %"
Cell = Mapping[str, Any]


def value_and_weight(record: Mapping[str, Any], value: str, weight: str) -> tuple[float, float] | None:
    """Of one evaluated example, or None where it has not been measured."""
    if value == "meteor" and "meteor" not in record:
        value = "meteor_exact_stem"
    found = field_of(record, value)
    return None if found is None else (found, field_of(record, weight) if weight else 1.0)


def has(evaluation: Mapping[str, Any], value: str) -> bool:
    """Whether it was measured: replies are written on the first seed only."""
    return any(value_and_weight(record, value, "") is not None for record in evaluation["records"])


def measured(cells: Sequence[Cell], *sets: str) -> list[str]:
    """The columns that any of the cells has a number for on any of these sets."""
    found = [cell["evaluations"][data] for cell in cells for data in sets if data in cell["evaluations"]]
    return [x for x, (name, *_) in COLUMNS.items() if any(has(each, all_metrics()[name].value) for each in found)]


def columns(cells: Sequence[Cell], data: str, metric: Metric) -> tuple[list, list, list] | None:
    """(values, weights, users) of the examples of `data`, each averaged over the cells (seeds)."""
    value, weight = metric.value, metric.weight
    by_key: dict[str, list[tuple[float, float]]] = {}
    users: dict[str, str] = {}
    cells = [cell for cell in cells if data in cell["evaluations"] and has(cell["evaluations"][data], value)]
    for cell in cells:
        for record in cell["evaluations"][data]["records"]:
            pair = value_and_weight(record, value, weight)
            if pair is not None:
                by_key.setdefault(record["key"], []).append(pair)
                users[record["key"]] = unit_of(record)
    whole = {key: pairs for key, pairs in by_key.items() if len(pairs) == len(cells)}
    if not whole:
        return None
    keys = sorted(whole)
    values, weights = ([fmean(pair[i] for pair in whole[key]) for key in keys] for i in (0, 1))
    return values, weights, [users[key] for key in keys]


def best_rate(config: Mapping[str, Any], cells: Iterable[Cell], data: str, objective: str) -> float | None:
    """The rate with the lowest validation loss with persona; None before all rates have run. Objectives that are not
    tuned take PerCE's, because their weights are as large."""
    tuned = objective if objective in config["tuned"] else "perce"
    tried = [c for c in cells if c["stage"] == "rates" and (c["data"], c["objective"]) == (data, tuned)]
    if len(tried) < len(config["learning_rates"]):
        return None
    return min(tried, key=lambda cell: cell["validation"]["eval_loss_with_persona"])["learning_rate"]


class Results:
    """The cells of one results file."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        self.path, self.config = path, content["config"]
        self.cells: list[Cell] = list(content["cells"].values())

    def best_rate(self, data: str, objective: str) -> float | None:
        return best_rate(self.config, self.cells, data, objective)

    def main(self, data: str, objective: str) -> list[Cell]:
        """The plain cells of an objective at its rate, one a seed."""
        if objective == "base":
            return [cell for cell in self.cells if cell["objective"] == "base" and cell["data"] == data]
        wanted = (data, objective, self.best_rate(data, objective))
        plain = [cell for cell in self.cells if not cell["options"]]
        return [cell for cell in plain if (cell["data"], cell["objective"], cell["learning_rate"]) == wanted]

    @property
    def objectives(self) -> list[str]:
        return ["base", *self.config["tuned"], *self.config["untuned"]]


def difference(
    mine: Sequence[Cell], others: Sequence[Cell], data: str, column: str
) -> tuple[Interval, float] | None:  # fmt: skip
    """(mine minus others on the same examples, with its interval; p-value), None if one was not measured."""
    name, _, factor = COLUMNS[column]
    metric = all_metrics()[name]
    ours, theirs = (columns(cells, data, metric) if cells else None for cells in (mine, others))
    if not ours or not theirs or len(ours[0]) != len(theirs[0]):
        return None
    found = paired_difference(ours[0], theirs[0], ours[1], ours[2], bounds=metric.bounds)
    return found and (scaled(found[0], factor), found[1])


def by_pairs_of_seeds(mine: Sequence[Cell], others: Sequence[Cell], data: str, column: str) -> list[float]:
    """The difference of each of these cells and each of the others."""
    found = (difference([one], [other], data, column) for one in mine for other in others)
    return [interval.value for interval, _ in filter(None, found)]


def scaled(interval: Interval, factor: float) -> Interval:
    low, high = (None if x is None else x * factor for x in (interval.low, interval.high))
    return interval._replace(value=interval.value * factor, low=low, high=high)


def trade(cell: Cell, data: str) -> tuple[float, float] | None:
    metrics = cell["evaluations"].get(data, {}).get("metrics", {})
    if not {"loss_other_tokens", "loss_personal_tokens"} <= metrics.keys():
        return None
    return metrics["loss_other_tokens"]["value"], metrics["loss_personal_tokens"]["value"]


class Variant(NamedTuple):
    """A cell of the search, or one that it is measured against; both shares in per cent, None where not known."""

    data: str
    name: str
    cell: Cell
    cost: float | None
    """Rise of the loss on other tokens against CE."""
    kept: float | None
    """Share of PerCE's fall of the loss on personal tokens; a point estimate."""


def searched(results: Results) -> list[Variant]:
    """CE, PerCE and PerCE with other options, all on the first seed."""
    seed, found = results.config["seeds"][0], []
    for data in results.config["data"]:
        plain = {x: [cell for cell in results.main(data, x) if cell["seed"] == seed] for x in ("ce", "perce")}
        of_ce, of_perce = (trade(cells[0], data) if cells else None for cells in plain.values())
        varied = [cell for cell in results.cells if cell["stage"] == "variants" and cell["data"] == data]
        named = [(NAMES[objective], cell) for objective, cells in plain.items() for cell in cells]
        for name, cell in [*named, *((options_text(cell["options"]), cell) for cell in varied)]:
            mine, cost, kept = trade(cell, data), None, None
            if mine and of_ce:
                cost = 100 * (mine[0] / of_ce[0] - 1)
            if mine and of_ce and of_perce and of_perce[1] < of_ce[1]:  # else there is no gain to keep
                kept = 100 * (of_ce[1] - mine[1]) / (of_ce[1] - of_perce[1])
            found.append(Variant(data, name, cell, cost, kept))
    return found


def options_text(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())
