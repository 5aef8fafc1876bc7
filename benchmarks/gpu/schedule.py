"""Whether the two commands fit their time: `python -m benchmarks.gpu.schedule A.json B.json [--compile SECONDS]`.

A.json and B.json are the results of both commands with `--device cpu`. They say how long the processes of a stage took
until their first line. Three times are added: START for a GPU's context, the seconds on the device by the roofline, and
for the compilation what `python -m benchmarks.gpu.compile` took on one core ÷ 12. Every stage must fit between the end
of the stage before and its own end. Stages that depend on other libraries (peers that compile, the tests) are limited
only by their end.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import compare, decide, parts, race, steps
from benchmarks.gpu.compile import WORKERS
from benchmarks.gpu.roofline import H100, HEADS, WAYS, predict, product_seconds, work
from benchmarks.gpu.sizes import BY_IMPORTANCE, SIZES, Size
from benchmarks.gpu.tiles import GEMM_TILES, ROW_TILES
from perce_kernels.gpu.cut import Cut

START = 3.0
"""Seconds, assumed, until a process on a GPU is ready, although it was started ahead of time."""
STEP_FLOPS = 0.4 * H100.flops
"""Assumed for whole training steps."""
LIMITS = {"gpu_a": 290, "gpu_b": 1585}


def loss_seconds(size: Size, way: str = "fused", head: str = "trainable") -> float:
    return sum(predict(size, way, head).values())


def reference_seconds(size: Size) -> float:
    """Both sweeps of the fp64 reference."""
    return 8 * size.n * size.d * size.v / race.FP64_FLOPS


def of_check() -> float:
    small = [Size(parts.CHECKED_ROWS, size.d, size.v) for size in BY_IMPORTANCE[:2]]
    return sum(reference_seconds(size) + 4 * loss_seconds(size) for size in small)


def of_parts() -> float:
    """Products and kernels of a chunk, dW at each number of tokens, both kinds of token_logprobs."""
    total = 0.0
    for size in SIZES:
        chunk = Size(min(size.n, 2048), size.d, size.v)
        repetitions = parts.REPETITIONS + 1
        total += repetitions * 2 * sum(loss_seconds(chunk, way) for way in WAYS)
        for rows in parts.BLOCKS:
            total += (
                3
                * repetitions
                * product_seconds("dW", work(Size(rows, *size[1:]), "fused", "trainable", Cut(rows, rows))["dW"], H100)
            )
        total += 4 * 3 * 2 * size.n * size.d * size.v / (H100.flops * H100.gemm)
    return total


def of_races(heads: tuple[str, ...], peers: float, rounds: int, checked_rows: int = 2**62) -> float:
    """Seconds of races between implementations that together take `peers` times as long as ours.

    Each runs about two and a half times before the rounds. In a round, a long step runs once, a short one twice. The
    ceilings are timed once more than there are rounds; 1.3 is the time of product and copy over that of the product.
    """
    total = sum(reference_seconds(size._replace(n=min(size.n, checked_rows))) for size in SIZES)
    for head in heads:
        for size in SIZES:
            ours = loss_seconds(size, head=head)
            total += (2.5 + rounds * (1 if ours > race.LONG_STEP else 2)) * peers * ours
            total += (rounds + 1) * 1.3 * race.PROBES * 2 * race.SIDE**3 / H100.flops
    return total


def of_tiles() -> float:
    total = 0.0
    for size in BY_IMPORTANCE[:2]:
        chunk = Size(2048, size.d, size.v)
        gemm, rows = predict(chunk, "stored")["logits"], predict(chunk)["rows"] / 2
        total += (2 * 7 + 3) * 2 * (len(GEMM_TILES) * gemm + len(ROW_TILES) * rows)
    return total


def of_budgets() -> float:
    return sum(
        3 * len(budgets) * loss_seconds(size, way, head) / (2 if (size, head) == (SIZES[-1], "trainable") else 1)
        for size in SIZES
        for way in WAYS
        for head, budgets in parts.BUDGETS.items()
    )


def of_profiles() -> float:
    """Each way twice, plus the profiler's overhead."""
    return sum(3 * loss_seconds(size, way) for size in SIZES for way in WAYS)


def of_steps(stage: str) -> float:
    """LoRA with checkpointing: products worth three forwards, and attention over the lower triangle; for a persona
    without a gradient, products worth one forward. Requests read the persona, which is computed once.
    """
    parameters, layers, width, total = 8.2e9, 36, 4096, 0.0
    cases = steps.CASES[stage]["cuda"]
    request = sum(steps.QUERY_AND_RESPONSE["cuda"])
    for case in cases:
        persona, behind = case.context - request, case.requests * request
        of_persona = (3, 3.5) if case.persona_grad == "full" else (1, 1)
        of_requests = (4, 4.5) if case.branches_per_forward else (3, 3.5)
        tokens = of_persona[0] * persona + of_requests[0] * behind
        pairs = of_persona[1] * persona**2 / 2 + of_requests[1] * behind * (persona + request / 2)
        flop = 2 * parameters * tokens + 4 * layers * width * pairs
        total += (3 if case.context == steps.SHORT["cuda"] else 1) * flop / STEP_FLOPS
    return total


DEVICE = {
    "check": of_check, "parts": of_parts, "tiles": of_tiles, "budgets": of_budgets, "profiles": of_profiles,
    **{name: partial(of_steps, name) for name in steps.CASES},
    "ways": lambda: of_races(HEADS, 2.0, decide.ROUNDS, decide.CHECKED_ROWS),
}  # fmt: skip
BOUNDED = ("trainers", "peers", *compare.CUTE, "tests", "options", "flash", "lengths", "flex", *compare.TOOLS)
"""Stages that are limited only by their end; other stages of the same row must still fit."""


class Row(NamedTuple):
    """Stages that run at the same time."""

    names: str
    processes: float
    device: float
    window: float
    """Seconds between the end of the row before and the time after which these stages start no measurement."""


def rows(name: str, lines: dict[str, dict], compilation: float) -> list[Row]:
    """The rows of one command. Stages that are limited only by their end take all of their window."""
    found: list[Row] = []
    before = 0.0
    for row in {"gpu_a": decide, "gpu_b": compare}[name].stages("cuda"):
        stages = [stage for stage in row if stage.name not in BOUNDED] or row
        names, end = [stage.name for stage in stages], max(stage.until for stage in stages)
        window = end - before - max(stage.grace for stage in stages)
        if stages == row and names[0] in BOUNDED:
            found.append(Row(" + ".join(names), 0.0, window, window))
        else:
            heard = [lines.get(f"stages/{stage}", {}).get("until_first_line", 0.0) for stage in names]
            device = sum(DEVICE[stage]() for stage in names if stage in DEVICE)
            device += compilation / WORKERS if "compile" in names else 0.0
            found.append(Row(" + ".join(names), max(heard) + START, device, window))
        before = max(stage.until for stage in row)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs=2, help="results of both commands with --device cpu")
    parser.add_argument("--compile", type=float, default=0.0, help="seconds of all compilations on one core")
    options = parser.parse_args(arguments)
    late = []
    for path in options.files:
        tree = json.loads(path.read_text(encoding="utf-8"))
        name = tree["command"]
        found = rows(name, tree["lines"], options.compile)
        print(f"| {name}: stage | processes, s | device, s | of, s |\n| --- | --- | --- | --- |")
        for row in found:
            print(f"| {row.names} | {row.processes:.0f} | {row.device:.0f} | {row.window:.0f} |")
            late += [f"{name}, {row.names}"] if row.processes + row.device > row.window else []
        total = sum(row.processes + row.device for row in found)
        print(f"| **sum**, limit {LIMITS[name]} | | {total:.0f} | |\n")
        late += [name] if total > LIMITS[name] else []
    if late:
        raise SystemExit(f"more time is needed than there is: {'; '.join(late)}")


if __name__ == "__main__":
    main()
