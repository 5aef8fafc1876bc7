"""The pictures of a study: what the methods trade, and what other clips keep and cost."""

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from benchmarks.pictures import MARKERS, Point, Theme, better, label_at_the_right, label_nearby, title
from benchmarks.study_results import COST, KEPT, NAMES, Results, Variant, difference, trade
from perce.measuring.evaluation_report import unit_of
from perce.objectives import OBJECTIVES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GOAL = 1  # what the other tokens may cost, in per cent: the search is for the largest gain within it
PERSONAL, OTHER = "loss on personal tokens", "loss on other tokens"


def look(objective: str, theme: Theme) -> dict[str, str]:
    number = list(OBJECTIVES).index(objective)
    return {"color": theme.colours[number % len(theme.colours)], "marker": MARKERS[number % len(MARKERS)]}


def has_trade(results: Results) -> bool:
    return any(results.main(data, x) for data in results.config["data"] for x in results.objectives[1:])


def draw_trade(results: Results, theme: Theme) -> "Figure":
    """Personal against other tokens, one point per method and seed: the trade that the weights make."""
    from matplotlib.figure import Figure

    sets = list(results.config["data"])
    figure = Figure(figsize=(5.1 * len(sets), 4.7), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    drawn = []
    for ax, data in zip(figure.subplots(1, len(sets), squeeze=False).flat, sets, strict=True):
        crosses = {x: _cross(results, data, x) for x in results.objectives[1:]}
        seeds = {x: _seeds(results, data, x) for x in results.objectives[1:]}
        for objective in results.objectives[1:]:
            style = look(objective, theme)
            for ends in crosses[objective]:
                ax.plot(*zip(*ends, strict=True), color=style["color"], linewidth=1, alpha=0.7, zorder=1)
            for seed, point in seeds[objective].items():
                ax.scatter(*point, s=150 if style["marker"] == "^" else 105, linewidth=0.8, edgecolor=theme.paper,
                           **style)  # fmt: skip
                ax.annotate(
                    str(seed), point, (0, -2 if style["marker"] == "^" else -0.5), textcoords="offset points",
                    ha="center", va="center_baseline", fontsize=7, fontweight="bold", color=theme.paper,
                )  # fmt: skip
        ax.margins(0.1)
        ax.set_xlabel(f"{OTHER}, nats per token")
        ax.set_ylabel(f"{PERSONAL}, nats per token")
        title(ax, data, size_of(results, data), theme)
        better(ax, (0.17, 0.13), (0.03, 0.03), theme)
        drawn.append((ax, seeds, crosses))
    words = ("A digit is a seed. Crosses: 95 % interval, over users,", "of the difference from CE (mean over seeds).")
    figure.supxlabel(("\n" if len(sets) == 1 else " ").join(words), fontsize=9, color=theme.faint)
    for ax, seeds, crosses in drawn:
        labels = [(NAMES[x].strip("*"), look(x, theme)["color"], list(seeds[x].values())) for x in seeds if seeds[x]]
        label_nearby(ax, labels, [line for lines in crosses.values() for line in lines])
    return figure


def _seeds(results: Results, data: str, objective: str) -> dict[int, Point]:
    """seed → (loss on other tokens, loss on personal tokens)"""
    return {cell["seed"]: point for cell in results.main(data, objective) if (point := trade(cell, data))}


def _cross(results: Results, data: str, objective: str) -> list[tuple[Point, Point]]:
    """Two lines through the mean over seeds, as long as the intervals of the differences from CE."""
    seeds = _seeds(results, data, objective)
    mine, ce = results.main(data, objective), results.main(data, "ce")
    differences = [difference(mine, ce, data, column) for column in (OTHER, PERSONAL)]
    if objective == "ce" or not seeds or not all(x and x[0].low is not None for x in differences):
        return []
    x, y = (mean(at) for at in zip(*seeds.values(), strict=True))
    other, personal = (found[0] for found in differences if found)
    return [
        ((x + other.low - other.value, y), (x + other.high - other.value, y)),
        ((x, y + personal.low - personal.value), (x, y + personal.high - personal.value)),
    ]


def size_of(results: Results, data: str) -> str:
    """What stands behind a panel."""
    rates = sorted({rate for x in results.objectives[1:] if (rate := results.best_rate(data, x))})
    records = next((cell["evaluations"][data]["records"] for cell in results.cells if data in cell["evaluations"]), [])
    users = {unit_of(record) for record in records}
    personal = sum(record["personal_tokens"] for record in records)
    trained = ", ".join(f"{rate:g}" for rate in rates)
    return f"{len(records)} replies, {len(users)} users, {personal} personal tokens; learning rate {trained}"


def draw_variants(found: Sequence[Variant], theme: Theme) -> "Figure":
    """The share of the gain that is kept over its cost."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(x.data for x in found))
    figure = Figure(figsize=(8.8, 3.3 * len(sets)), layout="constrained")
    figure.get_layout_engine().set(hspace=0.04)
    costs = sorted(x.cost for x in found if x.cost is not None)
    for ax, data in zip(figure.subplots(len(sets), 1, squeeze=False, sharex=True).flat, sets, strict=True):
        shown = [x for x in found if x.data == data and x.cost is not None and x.kept is not None]
        for x in shown:
            if x.cell["stage"] == "variants":
                ax.scatter(x.cost, x.kept, s=22, color=theme.ink)
            else:
                style = look(x.cell["objective"], theme)
                ax.scatter(x.cost, x.kept, s=70, **style)
                ax.annotate(x.name.strip("*"), (x.cost, x.kept), (-7, 6), textcoords="offset points", ha="right",
                            color=style["color"], fontweight="bold")  # fmt: skip
        ax.set_xlim(costs[0] - 0.08 * (costs[-1] - costs[0]), costs[-1] + 0.03 * (costs[-1] - costs[0]))
        ax.margins(y=0.08)
        ax.axvspan(ax.get_xlim()[0], GOAL, color=theme.faint, alpha=0.15, linewidth=0, zorder=0)
        ax.text(GOAL / 2, 0.17, f"goal: ≤ {GOAL} %", transform=ax.get_xaxis_transform(), rotation=90, ha="center",
                va="center", fontsize=8, color=theme.faint)  # fmt: skip
        label_at_the_right(ax, [(x.name, x.cost, x.kept) for x in shown if x.cell["stage"] == "variants"], theme, 0.09)
        rates = ", ".join(f"{rate:g}" for rate in sorted({x.cell["learning_rate"] for x in shown}))
        seeds = ", ".join(str(seed) for seed in sorted({x.cell["seed"] for x in shown}))
        title(ax, data, f"one run per point, seed {seeds}, no intervals; learning rate {rates}", theme)
        better(ax, (0.17, 0.82), (0.1, 0.96), theme)
    figure.axes[-1].set_xlabel(COST)
    figure.supylabel(KEPT, fontsize=10)
    return figure
