"""Whether the two commands fit their time: `python -m benchmarks.gpu.schedule A.json B.json [--compile SECONDS]`.

A.json and B.json are what both commands wrote on CPU doubles: a stage's seconds there are those of its processes,
imports and messages. To these are added the seconds that the device should take by the roofline, and of the compilation
what `python -m benchmarks.gpu.compile` took on one core ÷ 12. What depends on others' code (peers that compile, the
tests) is bounded by the stage's end alone.
"""

import argparse
import json
from pathlib import Path

from benchmarks.gpu import compare, decide, parts, race, steps
from benchmarks.gpu.compile import WORKERS
from benchmarks.gpu.roofline import H100, HEADS, WAYS, predict, product_seconds, work
from benchmarks.gpu.sizes import BY_IMPORTANCE, SIZES, Size
from benchmarks.gpu.tiles import GEMM_TILES, ROW_TILES

FP64_FLOPS = 40e12
"""Assumed of an H100's fp64 products, of which the references are made; 67 is what its data sheet says."""
STEP_FLOPS = 0.4 * H100.flops
"""Assumed of whole training steps."""
LIMITS = {"gpu_a": 230, "gpu_b": 390}


def loss_seconds(size: Size, way: str = "fused", head: str = "trainable") -> float:
    return sum(predict(size, way, head).values())


def reference_seconds(size: Size) -> float:
    """Both sweeps of the fp64 reference."""
    return 8 * size.n * size.d * size.v / FP64_FLOPS


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
        for rows in parts.DW_ROWS:
            total += (
                2
                * repetitions
                * product_seconds("dW", work(Size(rows, *size[1:]), "fused", "trainable", rows)["dW"], H100)
            )
        total += 4 * 3 * 2 * size.n * size.d * size.v / (H100.flops * H100.gemm)
    return total


def of_races(heads: tuple[str, ...], peers: float, rounds: int) -> float:
    """peers: how many times our time they take together. Each runs four times before the rounds, and its PIR once."""
    total = sum(map(reference_seconds, SIZES))
    for head in heads:
        for size in SIZES:
            total += (rounds + 5) * peers * loss_seconds(size, head=head)
            total += (rounds + 1) * race.PROBES * 2 * 8192**3 / H100.flops * 1.6  # and the copies
    return total


def of_tiles() -> float:
    total = 0.0
    for size in BY_IMPORTANCE[:2]:
        chunk = Size(2048, size.d, size.v)
        gemm, rows = predict(chunk, "stored")["logits"], predict(chunk)["rows"]
        total += (2 * 7 + 3) * 2 * (len(GEMM_TILES) * gemm + len(ROW_TILES) * rows)
    return total


def of_budgets() -> float:
    return sum(4 * len(parts.BUDGETS) * loss_seconds(size, way) for size in SIZES for way in WAYS)


def of_steps() -> float:
    """LoRA with checkpointing: three forwards' worth of products, and attention over the lower triangle."""
    parameters, layers, width, total = 8.2e9, 36, 4096, 0.0
    for index, context in enumerate(steps.CONTEXTS["cuda"]):
        flop = 6 * parameters * context + 3.5 * 2 * layers * width * context**2
        total += len(steps.OBJECTIVES) * (4 if index == 0 else 2) * flop / STEP_FLOPS
    return total


DEVICE = {
    "gpu_a": {
        "check": of_check, "parts": of_parts, "ways": lambda: of_races(HEADS, 2.0, decide.ROUNDS), "tiles": of_tiles,
        "budgets": of_budgets, "steps": of_steps,
    },
    "gpu_b": {},
}  # fmt: skip
BOUNDED = ("peers", *compare.CUTE, "tests")
"""Stages whose end is the only bound."""


def rows(name: str, lines: dict[str, dict], compilation: float) -> list[tuple[str, float, float, float]]:
    """(stage, seconds of the double, seconds on the device, end) of each; stages that run at once are one."""
    found = []
    before = 0.0
    for row in {"gpu_a": decide, "gpu_b": compare}[name].stages("cuda"):
        names = [stage.name for stage in row]
        doubled = max(lines.get(f"stages/{stage}", {"seconds": 0.0})["seconds"] for stage in names)
        end = max(stage.until for stage in row)
        if any(stage in BOUNDED for stage in names):
            found.append((" + ".join(names), 0.0, end - before, end))
        else:
            device = sum(DEVICE[name].get(stage, lambda: 0.0)() for stage in names)
            device += compilation / WORKERS if "compile" in names else 0.0
            found.append((" + ".join(names), doubled, device, end))
        before = end
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs=2, help="results of both commands on CPU doubles")
    parser.add_argument("--compile", type=float, default=0.0, help="seconds of all compilations on one core")
    options = parser.parse_args(arguments)
    for path in options.files:
        tree = json.loads(path.read_text(encoding="utf-8"))
        name, total = tree["command"], 0.0
        print(f"| {name}: stage | processes, s | device, s | ends at, at the latest |\n| --- | --- | --- | --- |")
        for stage, doubled, device, end in rows(name, tree["lines"], options.compile):
            total += doubled + device
            print(f"| {stage} | {doubled:.0f} | {device:.0f} | {end:.0f} |")
        print(f"| **sum**, limit {LIMITS[name]} | | {total:.0f} | |\n")
        if total > LIMITS[name]:
            raise SystemExit(f"{name}: {total:.0f} s expected, more than its {LIMITS[name]} s")


if __name__ == "__main__":
    main()
