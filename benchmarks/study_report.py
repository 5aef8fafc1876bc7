"""`python -m benchmarks.study_report benchmarks/results/study_NAME.json …`: docs/reference/study.md and its pictures.

Every number is computed here from the cells in the files; a table lacks the cells that have not run, and says so.
docs/RESULTS.md, which tells what the numbers mean, is written by hand and shows the same pictures.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean

from benchmarks.pictures import embedded, write
from benchmarks.study_pictures import draw_trade, draw_variants, has_trade
from benchmarks.study_results import (
    COLUMNS,
    COST,
    KEPT,
    NAMES,
    Cell,
    Results,
    by_pairs_of_seeds,
    columns,
    difference,
    measured,
    options_text,
    scaled,
    searched,
)  # fmt: skip
from perce.measuring.evaluation_report import all_metrics, unit_of
from perce.measuring.metrics import Interval, clustered_mean

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONTROLS = ("random", "wordmatch")
NOT_RUN, NOT_MEASURED = "Not run yet.", "not measured"
HEAD = """# Tables of the studies

All numbers behind [Results](../RESULTS.md), which says what they mean. `python -m benchmarks.study_report` wrote this
page: do not edit it. Losses and their differences are nats per token. In brackets are 95 % intervals over users;
p-values are those of a paired permutation test over users. Both are of the models that were trained: the range over the
seeds, or over the pairs of a seed of each method, says how other trainings differ. METEOR in study "cpu" was measured
before texts were split into sentences for it, and is lower on average: full stops within a text stayed parts of words.
"""


def cell_text(cells: Sequence[Cell], data: str, column: str) -> str:
    """Mean over seeds and examples, 95 % interval over users, and the range over seeds where there are several."""
    name, digits, factor = COLUMNS[column]
    metric = all_metrics()[name]

    def mean_of(cells: Sequence[Cell]) -> Interval | None:
        gathered = columns(cells, data, metric) if cells else None
        # Means over seeds are no longer 0 or 1.
        share = metric.share and gathered is not None and {*gathered[0]} <= {0.0, 1.0}
        return clustered_mean(*gathered, bounds=metric.bounds, share=share) if gathered else None

    if (interval := mean_of(cells)) is None:
        return NOT_MEASURED
    interval = scaled(interval, factor)
    text = f"{interval.value:.{digits}f} ({interval.span(f'.{digits}f')})"
    seeds = [x.value * factor for x in map(mean_of, ([cell] for cell in cells)) if x]
    if len(seeds) > 1:
        text += f", seeds {min(seeds):.{digits}f}–{max(seeds):.{digits}f}"
    return text


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
        yield f"\n### {data}\n"
        rows, missing, shown = [], [], measured(results.cells, data)
        for objective in results.objectives:
            cells = results.main(data, objective)
            if not any(data in cell["evaluations"] for cell in cells):
                missing.append(NAMES[objective])
                continue
            rate = results.best_rate(data, objective)
            about = "" if objective == "base" else f", {rate:g}" if rate else ""
            runs = "" if objective == "base" else f" × {len(cells)}"
            rows.append([NAMES[objective] + about + runs, *(cell_text(cells, data, column) for column in shown)])
        yield from evaluated_on(results, data)
        yield from table(["objective, learning rate × seeds", *shown], rows)
        if missing:
            yield f"\nNot run yet: {', '.join(missing)}."
        yield ""
        yield from table(["paired over users", *shown], differences(results, data, shown))


def evaluated_on(results: Results, data: str) -> Iterator[str]:
    """The size of the test set, and how often its users themselves use their persona."""
    records = [cell["evaluations"][data]["records"] for cell in results.cells if data in cell["evaluations"]]
    if records:
        users = len({unit_of(record) for record in records[0]})
        tokens, personal = (sum(record[name] for record in records[0]) for name in ("tokens", "personal_tokens"))
        own = [x["reference_uses_persona"] for part in records for x in part if "reference_uses_persona" in x]
        yield f"{len(records[0])} replies of {users} users, {tokens:,} tokens of which {personal} are personal. The"
        yield f"users' own replies use the persona in {100 * mean(own):.0f} %. Only the first seed generated replies.\n"


def differences(results: Results, data: str, shown: Sequence[str]) -> Iterator[list[str]]:
    """Each objective against CE, and PerCE against each control, on the same examples."""
    ce = results.main(data, "ce")
    for objective in results.objectives:
        texts = difference_texts(results.main(data, objective), ce, data, shown)
        if objective not in ("base", "ce") and {*texts} != {NOT_MEASURED}:
            yield [f"{NAMES[objective]} minus CE", *texts]
    for control in CONTROLS:
        texts = difference_texts(results.main(data, "perce"), results.main(data, control), data, shown)
        if {*texts} != {NOT_MEASURED}:
            yield [f"{NAMES['perce']} minus {NAMES[control]}", *texts]


def difference_texts(mine: Sequence[Cell], others: Sequence[Cell], data: str, shown: Sequence[str]) -> list[str]:
    """The difference from others in each column, with its interval, its p-value and its range over pairs of seeds."""
    texts = []
    for column in shown:
        found, digits = difference(mine, others, data, column), COLUMNS[column][1]
        if found is None:
            texts.append(NOT_MEASURED)
            continue
        interval, p = found
        chance = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
        pairs = by_pairs_of_seeds(mine, others, data, column)
        seeds = f"; seeds {min(pairs):+.{digits}f} to {max(pairs):+.{digits}f}" if len(pairs) > 1 else ""
        texts.append(f"{interval.value:+.{digits}f} ({interval.span(f'+.{digits}f')}; {chance}{seeds})")
    return texts


def trade(results: Results) -> Iterator[str]:
    if not has_trade(results):
        yield NOT_RUN
        return
    write(lambda theme: draw_trade(results, theme), DOCS / "images" / f"{results.path.stem}.png")
    text = "Loss on personal tokens over loss on other tokens, for each method and seed; lower left is better"
    yield embedded(results.path.stem, text, "../images")


def transfer(results: Results) -> Iterator[str]:
    """Trained on one set, tested on the others: losses only."""
    sets = list(results.config["data"])
    shown = list(COLUMNS)[:3]
    rows, against = [], []
    for trained in sets:
        for tested in sets:
            tried = {
                objective: [cell for cell in results.main(trained, objective) if tested in cell["evaluations"]]
                for objective in results.objectives[1:]
            }
            for objective, cells in tried.items() if trained != tested else ():
                if cells:
                    texts = [cell_text(cells, tested, column) for column in shown]
                    rows.append([trained, tested, f"{NAMES[objective]} × {len(cells)}", *texts])
                if cells and objective != "ce":
                    texts = difference_texts(cells, tried["ce"], tested, shown)
                    against.append([trained, tested, f"{NAMES[objective]} minus CE", *texts])
    yield from table(["trained on", "tested on", "objective × seeds", *shown], rows)
    if against:
        yield ""
        yield from table(["trained on", "tested on", "paired over users", *shown], against)


def of_rates(results: Results) -> Iterator[str]:
    shown = list(COLUMNS)[:2]
    rows, against = [], []
    tried = {(c["data"], c["objective"], c["learning_rate"]): c for c in results.cells if c["stage"] == "rates"}
    for (data, objective, rate), cell in tried.items():
        texts = [cell_text([cell], data, column) for column in shown]
        validation = f"{cell['validation']['eval_loss_with_persona']:.3f}"
        rows.append([data, NAMES[objective], f"{rate:g}", validation, *texts])
        if objective != "ce" and (data, "ce", rate) in tried:
            texts = difference_texts([cell], [tried[data, "ce", rate]], data, shown)
            against.append([data, f"{NAMES[objective]} minus CE", f"{rate:g}", *texts])
    yield from table(["data", "objective", "learning rate", "validation loss with persona", *shown], sorted(rows))
    if against:
        yield ""
        yield from table(["data", "paired over users", "learning rate", *shown], sorted(against))


def variants(results: Results) -> Iterator[str]:
    """PerCE with other options, on the first seed; compared with CE and PerCE where they have generated replies."""
    found = searched(results)
    varied = [x for x in found if x.cell["stage"] == "variants"]
    shown = measured([x.cell for x in varied], *results.config["data"]) or list(COLUMNS)[:3]
    rows = [
        [
            x.data, x.name, *(cell_text([x.cell], x.data, column) for column in shown),
            share_text(x.cost, "+.1f"), share_text(x.kept, ".0f"),
        ]
        for x in found
    ]  # fmt: skip
    yield from table(["data", "options", *shown, COST, KEPT], rows)
    if results.config.get("variant_replies"):
        plain = [x for x in found if x not in varied]
        pairs = [(x, other) for x in varied for other in plain if other.data == x.data]
        rows = [
            [x.data, f"{x.name} minus {other.name}", *difference_texts([x.cell], [other.cell], x.data, shown)]
            for x, other in pairs
        ]
        yield ""
        yield from table(["data", "paired over users, one seed each", *shown], rows)
    if any(None not in (x.cost, x.kept) for x in varied):
        name = f"{results.path.stem}_variants"
        write(lambda theme: draw_variants(found, theme), DOCS / "images" / f"{name}.png")
        yield ""
        yield embedded(name, f"{KEPT}, over: {COST}; upper left is better", "../images")


def share_text(share: float | None, digits: str) -> str:
    if share is None:
        return NOT_MEASURED
    text = f"{share:{digits}}"
    return text if float(text) else text.lstrip("-")


def speed(results: Results) -> Iterator[str]:
    rows = []
    for data in results.config["data"]:
        for objective in results.objectives[1:]:
            speeds = [
                max(entry["tokens_per_second"] for entry in cell["log"] if "tokens_per_second" in entry)
                for cell in results.main(data, objective)
            ]
            if speeds:
                rows.append([data, NAMES[objective], f"{mean(speeds):.0f}"])
    yield from table(["data", "objective", "training tokens per second and process, fastest ten steps"], rows)


def report(results: Results) -> Iterator[str]:
    config = results.config
    untuned = " and ".join(NAMES[x] for x in config["untuned"])
    sets = "; ".join(f"{name} {options_text(options)}".strip() for name, options in config["data"].items())
    yield f'\n## Study "{config["name"]}": {config.get("model") or "SmolLM2-135M-Instruct"}\n'
    yield f"{len(results.cells)} training runs and base models. Training: {options_text(config['train'])}."
    yield f"Evaluation: {sets}; {options_text(config['evaluate'])}."
    if len(rates := config["learning_rates"]) > 1:
        first = config["seeds"][0]
        yield f"Learning rates are picked by validation loss with persona, on seed {first}, for CE and"
        yield f"PerCE; {untuned} take PerCE's.\n"
    else:
        yield f"The learning rate is {rates[0]:g}.\n"
    yield f"    python -m benchmarks.study --config benchmarks/studies/{config['name']}.yaml --data_root DIR"
    yield f"    python -m benchmarks.study_report {results.path.relative_to(ROOT)}"
    parts = {"Comparison": comparison, "Personal against other tokens": trade}
    parts |= {"Transfer": transfer} if len(config["data"]) > 1 else {}
    parts |= {"Learning rates": of_rates} if len(rates) > 1 else {}
    parts |= {"Clips, normalisations, schedules": variants} if config.get("variants") else {}
    parts |= {"Speed": speed} if config.get("timed", True) else {}
    for title, part in parts.items():
        yield f"\n### {title}\n" if part is not comparison else ""
        yield from part(results)


def page(reports: Iterable[Iterable[str]]) -> str:
    lines = [line for lines in reports for line in lines]
    return "\n".join([HEAD, *lines]).replace("\n\n\n", "\n\n") + "\n"


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    reports = [report(Results(Path(path).resolve())) for path in sys.argv[1:]]
    (DOCS / "reference" / "study.md").write_text(page(reports), encoding="utf-8")


if __name__ == "__main__":
    main()
