"""`python -m benchmarks.study_report benchmarks/results/study_NAME.json …`: docs/RESULTS.md and its plots.

Every number is computed here from the cells in the files; a table lacks the cells that have not run, and says so.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from perce.measuring.metrics import clustered_mean, paired_difference
from perce.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NAMES = {"base": "base model"} | {name: entry.title for name, entry in OBJECTIVES.items()} | {"perce": "**PerCE**"}
PALETTE = ("#2d69e1", "#7a808c", "#d9822b", "#3f9f6f", "#8e5bc0", "#c2453d", "#8a6d3b", "#2a9fb0")
COLOURS = dict(zip(OBJECTIVES, cycle(PALETTE)))
# column: (metric, its sum, its weight, digits, factor)
COLUMNS = {
    "loss, personal tokens": ("loss_personal", "personal_tokens", 3, 1),
    "loss, other tokens": ("loss_other", "other_tokens", 3, 1),
    "cost of another's persona": ("swap", "tokens", 3, 1),
    "replies that use the persona, %": ("uses_persona", "", 1, 100),
    "ROUGE-L": ("rougeL", "", 3, 1),
    "METEOR": ("meteor", "", 3, 1),
}
COST, KEPT = "other tokens against CE, %", "kept of PerCE's gain on personal tokens, %"
GOAL = 1  # what the other tokens may cost, in per cent: the search is for the largest gain within it
NOT_RUN = "Not run yet."
Cell = Mapping[str, Any]


def value_and_weight(record: Mapping[str, Any], value: str, weight: str) -> tuple[float, float] | None:
    """Of one evaluated example, or None where it has not been measured."""
    if value == "swap":
        if record.get("loss_swapped") is None:
            return None
        return record["loss_swapped"] - record["loss"], record["tokens"]
    if value == "meteor" and "meteor" not in record:
        value = "meteor_exact_stem"
    if record.get(value) is None:
        return None
    if weight == "other_tokens":
        return record[value], record["tokens"] - record["personal_tokens"]
    return record[value], record[weight] if weight else 1.0


def has(evaluation: Mapping[str, Any], value: str) -> bool:
    """Whether it was measured: replies are written on the first seed only."""
    return any(value_and_weight(record, value, "") is not None for record in evaluation["records"])


def columns(cells: Sequence[Cell], data: str, value: str, weight: str) -> tuple[list, list, list] | None:
    """(values, weights, users) of the examples of `data`, each averaged over the cells (seeds)."""
    by_key: dict[str, list[tuple[float, float]]] = {}
    users: dict[str, str] = {}
    cells = [cell for cell in cells if data in cell["evaluations"] and has(cell["evaluations"][data], value)]
    for cell in cells:
        for record in cell["evaluations"][data]["records"]:
            pair = value_and_weight(record, value, weight)
            if pair is not None:
                by_key.setdefault(record["key"], []).append(pair)
                users[record["key"]] = str(record.get("user_id") or record["source"])
    whole = {key: pairs for key, pairs in by_key.items() if len(pairs) == len(cells)}
    if not whole:
        return None
    keys = sorted(whole)
    values, weights = ([mean(pair[i] for pair in whole[key]) for key in keys] for i in (0, 1))
    return values, weights, [users[key] for key in keys]


def cell_text(cells: Sequence[Cell], data: str, column: str) -> str:
    """Mean over seeds and examples, 95 % interval over users, and the range over seeds where there are several."""
    value, weight, digits, factor = COLUMNS[column]
    gathered = columns(cells, data, value, weight) if cells else None
    interval = clustered_mean(*gathered) if gathered else None
    if interval is None:
        return "not measured"
    interval = interval.scaled(factor)
    text = f"{interval.value:.{digits}f} ({interval.span(f'.{digits}f')})"
    of_seed = [clustered_mean(*gathered) for c in cells if (gathered := columns([c], data, value, weight))]
    seeds = [x.value * factor for x in of_seed if x]
    if len(seeds) > 1:
        text += f", seeds {min(seeds):.{digits}f}–{max(seeds):.{digits}f}"
    return text


class Results:
    """The cells of one results file."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        self.path, self.config = path, content["config"]
        self.cells: list[Cell] = list(content["cells"].values())

    def best_rate(self, data: str, objective: str) -> float | None:
        tuned = objective if objective in self.config["tuned"] else "perce"
        cells = [c for c in self.cells if c["stage"] == "rates" and (c["data"], c["objective"]) == (data, tuned)]
        if len(cells) < len(self.config["learning_rates"]):
            return None
        return min(cells, key=lambda cell: cell["validation"]["eval_loss_with_persona"])["learning_rate"]

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


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    rows = list(rows)
    if not rows:
        yield NOT_RUN
        return
    yield "| " + " | ".join(header) + " |"
    yield "| " + " | ".join("---" for _ in header) + " |"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def comparison(results: Results) -> Iterator[str]:
    for data in results.config["data"]:
        yield f"\n#### {data}\n"
        rows, missing = [], []
        for objective in results.objectives:
            cells = results.main(data, objective)
            if not any(data in cell["evaluations"] for cell in cells):
                missing.append(NAMES[objective])
                continue
            rate = results.best_rate(data, objective)
            about = "" if objective == "base" else f", {rate:g}" if rate else ""
            runs = "" if objective == "base" else f" × {len(cells)}"
            rows.append([NAMES[objective] + about + runs, *(cell_text(cells, data, column) for column in COLUMNS)])
        yield from evaluated_on(results, data)
        yield from table(["objective, learning rate × seeds", *COLUMNS], rows)
        if missing:
            yield f"\nNot run yet: {', '.join(missing)}."
        for objective in results.objectives:
            if objective not in ("base", "ce"):
                yield from differences(results, data, objective)


def evaluated_on(results: Results, data: str) -> Iterator[str]:
    """How much the numbers stand on."""
    records = [cell["evaluations"][data]["records"] for cell in results.cells if data in cell["evaluations"]]
    if records:
        users = len({str(record.get("user_id") or record["source"]) for record in records[0]})
        tokens, personal = (sum(record[name] for record in records[0]) for name in ("tokens", "personal_tokens"))
        own = [x["reference_uses_persona"] for part in records for x in part if "reference_uses_persona" in x]
        yield f"{len(records[0])} replies of {users} users, {tokens:,} tokens of which {personal} are personal. What"
        yield f"they wrote uses their persona in {100 * mean(own):.0f} %. Generated replies are of the first seed.\n"


def differences(results: Results, data: str, objective: str) -> Iterator[str]:
    """An objective against CE on the same examples."""
    mine, ce = results.main(data, objective), results.main(data, "ce")
    texts = []
    for column, (value, weight, digits, factor) in COLUMNS.items():
        ours, theirs = (columns(cells, data, value, weight) if cells else None for cells in (mine, ce))
        if not ours or not theirs or len(ours[0]) != len(theirs[0]):
            continue
        result = paired_difference(ours[0], theirs[0], ours[1], ours[2])
        if result:
            d, p = result[0].scaled(factor), result[1]
            chance = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
            texts.append(f"{column} {d.value:+.{digits}f} ({d.span(f'+.{digits}f')}; {chance})")
    if texts:
        yield f"\n{NAMES[objective]} minus CE, paired over users: {'; '.join(texts)}."


def transfer(results: Results) -> Iterator[str]:
    """Trained on one set, tested on the others: losses only."""
    sets = list(results.config["data"])
    shown = list(COLUMNS)[:3]
    rows = []
    for trained in sets:
        for tested in sets:
            for objective in results.objectives[1:]:
                cells = [cell for cell in results.main(trained, objective) if tested in cell["evaluations"]]
                if trained != tested and cells:
                    texts = (cell_text(cells, tested, column) for column in shown)
                    rows.append([trained, tested, f"{NAMES[objective]} × {len(cells)}", *texts])
    yield from table(["trained on", "tested on", "objective × seeds", *shown], rows)


def rates(results: Results) -> Iterator[str]:
    rows = []
    for cell in results.cells:
        if cell["stage"] == "rates":
            texts = (cell_text([cell], cell["data"], column) for column in list(COLUMNS)[:2])
            validation = f"{cell['validation']['eval_loss_with_persona']:.3f}"
            rows.append([cell["data"], NAMES[cell["objective"]], f"{cell['learning_rate']:g}", validation, *texts])
    yield from table(
        ["data", "objective", "learning rate", "validation loss with persona", *list(COLUMNS)[:2]], sorted(rows)
    )


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


def variants(results: Results) -> Iterator[str]:
    found = searched(results)
    rows = [
        [
            x.data, x.name, *(cell_text([x.cell], x.data, column) for column in list(COLUMNS)[:3]),
            share_text(x.cost, "+.1f"), share_text(x.kept, ".0f"),
        ]
        for x in found
    ]  # fmt: skip
    yield from table(["data", "options", *list(COLUMNS)[:3], COST, KEPT], rows)
    if any(x.cell["stage"] == "variants" and None not in (x.cost, x.kept) for x in found):
        yield ""
        yield variants_plot(found, f"{results.path.stem}_variants")


def share_text(share: float | None, digits: str) -> str:
    if share is None:
        return "not measured"
    text = f"{share:{digits}}"
    return text if float(text) else text.lstrip("-")


def variants_plot(found: Sequence[Variant], name: str) -> str:
    """What is kept of the gain over what it costs: above and left is better."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(x.data for x in found))
    varied = dict.fromkeys(x.name for x in found if x.cell["stage"] == "variants")
    numbers = {name: f"${number}$" for number, name in enumerate(varied, start=1)}  # what stands at a point
    figure = Figure(figsize=(4.2 * len(sets) + 2.4, 4), dpi=150, facecolor="white", layout="constrained")
    for ax, data in zip(figure.subplots(1, len(sets), squeeze=False).flat, sets, strict=True):
        for x in found:
            if x.data == data and x.cost is not None and x.kept is not None:
                colour = "#1b1d21" if x.name in numbers else COLOURS[x.cell["objective"]]
                marker, size = numbers.get(x.name, "o"), 45 if x.name in numbers else 90
                ax.scatter(x.cost, x.kept, color=colour, marker=marker, s=size, linewidth=0.3, label=x.name.strip("*"))
        limits = ax.get_xlim()
        ax.axvspan(limits[0], GOAL, color="#1b1d21", alpha=0.06, linewidth=0, label=f"at most {GOAL} %")
        ax.set_xlim(limits)
        ax.set_title(data, loc="left", fontsize=10)
        ax.set_xlabel(COST)
        ax.set_ylabel(KEPT)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return f"![{KEPT}, over: {COST}](images/{save(figure, name)})"


def cost(results: Results) -> Iterator[str]:
    rows = []
    for data in results.config["data"]:
        for objective in results.objectives[1:]:
            speeds = [
                max(entry["tokens_per_second"] for entry in cell["log"] if "tokens_per_second" in entry)
                for cell in results.main(data, objective)
            ]
            if speeds:
                rows.append([data, NAMES[objective], f"{mean(speeds):.0f}"])
    yield from table(["data", "objective", "training tokens/s per process, fastest ten steps"], rows)


def plots(results: Results) -> Iterator[str]:
    """Personal against other tokens, one point an objective and seed: the trade that the weights make."""
    from matplotlib.figure import Figure

    sets = list(results.config["data"])
    if not any(results.main(data, objective) for data in sets for objective in COLOURS):
        yield NOT_RUN
        return
    figure = Figure(figsize=(4.8 * len(sets), 3.8), dpi=150, facecolor="white", layout="constrained")
    for ax, data in zip(figure.subplots(1, len(sets), squeeze=False).flat, sets, strict=True):
        for objective, colour in COLOURS.items():
            points = [point for cell in results.main(data, objective) if (point := trade(cell, data))]
            if points:
                ax.scatter(*zip(*points, strict=True), color=colour, label=NAMES[objective].strip("*"))
        ax.set_title(data, loc="left", fontsize=10)
        ax.set_xlabel("loss on other tokens")
        ax.set_ylabel("loss on personal tokens")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    name = save(figure, results.path.stem)
    yield f"![Loss on personal against other tokens, by objective; lower left is better](images/{name})"


def save(figure: Any, name: str) -> str:
    """The file's name, in docs/images."""
    path = DOCS / "images" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path.name


def trade(cell: Cell, data: str) -> tuple[float, float] | None:
    metrics = cell["evaluations"].get(data, {}).get("metrics", {})
    if not {"loss_other_tokens", "loss_personal_tokens"} <= metrics.keys():
        return None
    return metrics["loss_other_tokens"]["value"], metrics["loss_personal_tokens"]["value"]


def report(results: Results) -> Iterator[str]:
    config = results.config
    untuned = " and ".join(NAMES[x] for x in config["untuned"])
    sets = "; ".join(f"{name} {options_text(options)}".strip() for name, options in config["data"].items())
    yield f'### Study "{config["name"]}": {config.get("model") or "SmolLM2-135M-Instruct"}\n'
    yield f"{len(results.cells)} cells. Training: {options_text(config['train'])}. Evaluation: {sets};"
    yield f"{options_text(config['evaluate'])}. Learning rates are picked by validation loss with persona, on seed"
    yield f"{config['seeds'][0]}, for CE and PerCE; {untuned} take PerCE's. In brackets 95 % intervals over users.\n"
    yield f"    python -m benchmarks.study --config benchmarks/studies/{config['name']}.yaml --data_root DIR"
    yield f"    python -m benchmarks.study_report {results.path.relative_to(ROOT)}"
    for title, part in (
        ("Comparison", comparison), ("Trade", plots), ("Transfer", transfer), ("Learning rates", rates),
        ("Clips, normalisations, schedules", variants), ("Speed", cost),
    ):  # fmt: skip
        yield f"\n#### {title}\n" if part is not comparison else ""
        yield from part(results)


def options_text(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    generated = "\n".join(line for path in sys.argv[1:] for line in report(Results(Path(path).resolve())))
    path = DOCS / "RESULTS.md"
    begin, end = "<!-- generated by benchmarks.study_report -->", "<!-- end -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{begin}\n{generated}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
