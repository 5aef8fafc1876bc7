"""The tables of README and docs, made from the results of the two commands; missing values are "not measured"."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.gpu.peers import PEERS, WAY_PEERS
from benchmarks.gpu.results import NO_TIME
from benchmarks.gpu.roofline import FLOOR_FLOP, H100, HEADS, WAYS, Gpu, floor_seconds, measured_gpu, predict
from benchmarks.gpu.sizes import SIZES, Size
from benchmarks.gpu.steps import CASES

NOT_MEASURED = "not measured"
FAILED = "failed"
RACES = ("ways", "peers", "quack", "liger_cutedsl")
"""Stages of races. If a peer is in several, the last one counts; for perce, the first one with rounds."""
Line = dict[str, Any]
Lines = dict[str, Line]


@dataclass
class Entry:
    """The measurements of a peer at one size with one head."""

    line: Line
    seconds: float | None = None
    floor: float | None = None
    rounds: int = 0
    """How many rounds the median seconds are of; 0 if they are those of a single step."""

    @property
    def correct(self) -> bool:
        return self.line.get("correct", False)

    @property
    def ratio(self) -> float:
        assert self.seconds is not None and self.floor is not None
        return self.seconds / self.floor


Cell = Callable[[Entry], str | None]


def sizes_of(lines: Lines) -> tuple[Size, ...]:
    """The sizes of the races in these lines, or all sizes if there are none."""
    found = {Size.parse(key.split("/")[2]) for key in lines if key.endswith("/race") and key.split("/")[0] in RACES}
    return tuple(sorted(found)) or SIZES


def entry(lines: Lines, head: str, size: Size, peer: str) -> Entry | None:
    """A peer's measurements, from the stage that RACES gives precedence; None if no stage has it."""
    found: Entry | None = None
    for stage in RACES:
        place = f"{stage}/{head}/{size}"
        line, race = lines.get(f"{place}/{peer}"), lines.get(f"{place}/race")
        if line is None or (found is not None and found.rounds and peer == "perce"):
            continue
        here = Entry(line)
        if race is not None and "rounds" in race and "reason" not in line:
            times = [seconds[peer] for seconds in race["rounds"] if peer in seconds]
            here.seconds, here.rounds = median(times) if times else line["seconds"], len(times)
            here.floor = FLOOR_FLOP[head] * size.n * size.d * size.v / race["matmul_flops"]
        found = here
    return found


def _time(found: Entry) -> str | None:
    if found.seconds is None:
        return None
    ms = f"{1000 * found.seconds:.1f}" + ("" if found.rounds else "*")
    return f"{ms} ({found.ratio:.2f})" if found.correct else f"{ms}, PIR off by {found.line['errors']['pir']:.1g}"


def _memory(found: Entry) -> str | None:
    return None if found.line.get("peak_extra_bytes") is None else f"{found.line['peak_extra_bytes'] / 2**30:.2f}"


def _errors(found: Entry) -> str | None:
    if "errors" not in found.line or "reason" in found.line:
        return None
    errors = found.line["errors"]
    return " / ".join("–" if name not in errors else f"{errors[name]:.1e}" for name in ("pir", "dhidden", "dlm_head"))


def _text(cell: Cell, found: Entry | None) -> str:
    if found is None or found.line.get("reason") == NO_TIME:
        return NOT_MEASURED
    return cell(found) or (FAILED if "reason" in found.line else NOT_MEASURED)


def _name(size: Size) -> str:
    return f"{size.n} × {size.d} × {size.v}"


def by_peer(lines: Lines, title: str, head: str, cell: Cell) -> Iterator[str]:
    """One row per peer, one column per size; peers that failed everywhere are among the reasons below."""
    sizes = sizes_of(lines)
    yield f"| {title} | {' | '.join(map(_name, sizes))} |"
    yield "| --- |" + " --- |" * len(sizes)
    for name, peer in PEERS.items():
        cells = [_text(cell, entry(lines, head, size, name)) for size in sizes]
        if not lines or any(text != FAILED for text in cells):
            yield f"| {peer.title} | {' | '.join(cells)} |"


def ceilings(lines: Lines) -> Iterator[str]:
    """The machine's ceilings, and the forward of token_logprobs compared with its products alone."""
    yield "| N × D × V | matmul, TFLOP/s | copy, TB/s | floor, ms, trainable / frozen | token_logprobs ÷ cuBLAS |"
    yield "| --- | --- | --- | --- | --- |"
    for size in sizes_of(lines):
        races = {
            head: race for head in HEADS for stage in ("ways", "peers")
            if (race := lines.get(f"{stage}/{head}/{size}/race")) and "rounds" in race
        }  # fmt: skip
        race = races.get("trainable") or races.get("frozen")
        flop = size.n * size.d * size.v
        floors = [f"{1000 * FLOOR_FLOP[head] * flop / race['matmul_flops']:.1f}" for head in HEADS] if race else []
        logprobs = lines.get(f"parts/{size}/token_logprobs", {})
        cells = [
            f"{race['matmul_flops'] / 1e12:.0f}" if race else NOT_MEASURED,
            f"{race['bandwidth'] / 1e12:.2f}" if race else NOT_MEASURED,
            " / ".join(floors) or NOT_MEASURED,
            f"{logprobs['seconds'] / logprobs['matmul_seconds']:.2f}" if "seconds" in logprobs else NOT_MEASURED,
        ]
        yield f"| {_name(size)} | {' | '.join(cells)} |"


def ways(lines: Lines, device: str = "") -> Iterator[str]:
    """The loss by each way, measured and predicted; predictions use the ceilings of the same run if it has them."""
    yield "| N × D × V, trainable head | way | measured, ms (÷ floor) | predicted, ms (÷ floor) |"
    yield "| --- | --- | --- | --- |"
    for size in sizes_of(lines):
        for way, title in WAYS.items():
            found = entry(lines, "trainable", size, WAY_PEERS[way].name)
            gpu = _gpu(lines, device)
            seconds = sum(predict(size, way, gpu=gpu).values())
            predicted = f"{1000 * seconds:.1f} ({seconds / floor_seconds(size, 'trainable', gpu):.2f})"
            yield f"| {_name(size)} | {title} | {_text(_time, found)} | {predicted} |"


def _gpu(lines: Lines, device: str) -> Gpu:
    """The GPU with the ceilings in these lines, else with roofline.py's defaults."""
    found = lines.get("parts/ceilings", {"reason": None})
    return H100 if "reason" in found else measured_gpu(found["matmul_flops"], found["bandwidth"], device)


def parts(lines: Lines) -> Iterator[str]:
    """Products and kernels of one chunk."""
    timed = {key: line for key, line in lines.items() if key.startswith("parts/") and line.get("predicted")}
    if not timed:
        yield f"Parts of a chunk: {NOT_MEASURED}."
        return
    yield "| N × D × V | part | measured, ms | predicted, ms | ratio | TFLOP/s |\n| --- | --- | --- | --- | --- | --- |"
    for key, line in timed.items():
        _, size, name = key.split("/")
        rate = f"{line['tflops']:.0f}" if "tflops" in line else "–"
        yield (
            f"| {_name(Size.parse(size))} | {name} | {1000 * line['seconds']:.3f} | {1000 * line['predicted']:.3f} | "
            f"{line['seconds'] / line['predicted']:.2f} | {rate} |"
        )


def budgets(lines: Lines) -> Iterator[str]:
    """Our time by memory budget."""
    yield "| N × D × V | way | ms by tokens per block (and budget); the default is bold |\n| --- | --- | --- |"
    for size in sizes_of(lines):
        for way, title in WAYS.items():
            cells = []
            for key, line in lines.items():
                if key.startswith(f"budgets/{size}/{way}/"):
                    time = f"{1000 * line['seconds']:.1f}" if "seconds" in line else FAILED
                    text = f"{line.get('rows', '?')} ({key.rpartition('/')[2]}): {time}"
                    cells.append(f"**{text}**" if line.get("shipped") else text)
            yield f"| {_name(size)} | {title} | {', '.join(cells) or NOT_MEASURED} |"


def tiles(lines: Lines) -> Iterator[str]:
    """The named tiles of each kernel, fastest first."""
    yield "| kernel | N × D × V | ratio to the shipped tile |\n| --- | --- | --- |"
    found: dict[tuple[str, str], dict[str, float]] = {}
    for key, line in lines.items():
        if key.startswith("tiles/") and "ratio" in line:
            _, kernel, size, tile = key.split("/")
            found.setdefault((kernel, size), {})[tile] = line["ratio"]
    for (kernel, size), ratios in found.items():
        order = sorted(ratios, key=lambda tile: ratios[tile])
        listed = ", ".join(f"{tile} {ratios[tile]:.2f}" for tile in order)
        yield f"| {kernel} | {_name(Size.parse(size))} | {listed} |"
    if not found:
        yield f"| every kernel | | {NOT_MEASURED} |"


def steps(lines: Lines, title: str, *stages: str) -> Iterator[str]:
    """Training steps of a large model."""
    yield f"| {title} | s | tokens/s | peak, GiB | planned, GiB |"
    yield "| --- | --- | --- | --- | --- |"
    found = False
    for key, line in lines.items():
        if key.split("/")[0] in stages and "tokens_per_second" in line:
            found = True
            _, objective, case = key.split("/")
            context, *options = case.split(", ")
            planned = lines.get(f"{key}/plan", {}).get("planned_bytes")
            peak = line["peak_bytes"]
            memory = [NOT_MEASURED if size is None else f"{size / 2**30:.1f}" for size in (peak, planned)]
            if "waits" in line:
                options.append(f"{line['waits']:g} waits per step")
            name = ", ".join([objective, f"{context} tokens", *options])
            speed = f"{line['seconds']:.2f} | {line['tokens_per_second']:.0f}"
            yield f"| {name} | {speed} | {' | '.join(memory)} |"
    if not found:
        yield f"| every objective and context | {' | '.join([NOT_MEASURED] * 4)} |"


def new_lengths(lines: Lines) -> Iterator[str]:
    """What a length costs that attention has not seen before."""
    yield "| of each length, s | the first time | once more |"
    yield "| --- | --- | --- |"
    found = {key: line for key, line in lines.items() if key.startswith("lengths/") and "seconds" in line}
    for key, line in found.items():
        count = line.get("steps", 1)
        cells = (f"{line[name] / count:.4f}" for name in ("first_seconds", "seconds"))
        yield f"| {', '.join(key.split('/')[1:])} | {' | '.join(cells)} |"
    if not found:
        yield f"| every kind | {NOT_MEASURED} | {NOT_MEASURED} |"


def compiled_again(lines: Lines) -> Iterator[str]:
    """Which runs compiled functions again, and how often."""
    for key, line in lines.items():
        if "recompilations" in line:
            gave_up = ", and gave a function up" if line["gave_up"] else ""
            yield f"- {key}: torch.compile compiled functions again {line['recompilations']} times{gave_up}"


def suite(lines: Lines) -> Iterator[str]:
    """The summary of the tests on the GPU, and those that failed."""
    summary = lines.get("tests/summary")
    if summary is None or "last_words" not in summary:
        yield f"GPU tests: {NOT_MEASURED}."
        return
    yield f"GPU tests: {summary['last_words'].strip('= ')}."
    yield from (f"- failed: {test}" for test in summary["failures"])


def reasons(lines: Lines) -> Iterator[str]:
    """Why measurements are missing: each reason once, with the lines that it applies to."""
    found: dict[tuple[str, str], list[str]] = {}
    for key, line in lines.items():
        reason = line.get("reason")
        if reason is not None and reason != NO_TIME:
            place, _, name = key.rpartition("/")
            found.setdefault((name, reason), []).append(place)
    for (name, reason), places in found.items():
        title = PEERS[name].title if name in PEERS else name
        yield f"- {title}: {reason} ({'; '.join(places)})"


def heading(tree: dict[str, Any]) -> str:
    machine = tree["machine"]
    if not machine:
        return f"{tree['command']}: no process of it started."
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    return (
        f"{machine['device']}, driver {machine['driver']}, {packages}, commit {machine['commit']}, {machine['date']}."
    )


def report(trees: list[dict[str, Any]]) -> str:
    """All tables from these files together, as Markdown."""
    lines: Lines = {key: line for tree in trees for key, line in tree["lines"].items()}
    tables = (
        ways(lines, trees[0]["machine"].get("device", "") if trees else ""),
        by_peer(lines, "trainable head, ms (÷ floor), * of a single step", "trainable", _time),
        by_peer(lines, "frozen head, ms (÷ floor), * of a single step", "frozen", _time),
        by_peer(lines, "peak extra memory, GiB, trainable", "trainable", _memory),
        by_peer(lines, "peak extra memory, GiB, frozen", "frozen", _memory),
        by_peer(lines, "error: largest of PIR / of dhidden / of dlm_head", "trainable", _errors),
        ceilings(lines),
        parts(lines),
        budgets(lines),
        tiles(lines),
        steps(lines, "Qwen3-8B's shape, LoRA, bf16, one sequence", *CASES),
        steps(lines, "the same by trainer", "trainers"),
        new_lengths(lines),
        compiled_again(lines),
        suite(lines),
        reasons(lines),
    )
    headings = [heading(tree) for tree in trees] or ["GPU: not measured."]
    return "\n\n".join(["\n".join(headings), *("\n".join(table) for table in tables)]).rstrip()
