"""The first command on a GPU: does it run, which way is the faster, where does the time go. At most 230 seconds.

    train      python -m perce.train on a tiny model; meanwhile `compile`, all kernels and named tiles in parallel
    check      every way against fp64: wrong kernels need no timing
    parts      products and kernels by themselves, at all sizes, beside the roofline's predictions
    ways       the whole loss each way, at all sizes: these lines decide
    tiles      the named tiles of every kernel at two sizes
    budgets    the loss by the bytes of a chunk's logits
    steps      training steps of Qwen3-8B's shape, PerCE and cross-entropy, at 8k and 32k tokens

Every line is in RESULTS/gpu_a.json before it is printed. `--device cpu` runs all of it on tiny doubles in Triton's
interpreter, to try the harness: its numbers mean nothing.
"""

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.results import Results
from benchmarks.gpu.roofline import HEADS
from benchmarks.gpu.supervise import ROOT, Stage, run

RESULTS = ROOT / "benchmarks/results/gpu"
KERNELS = ("store_gemm", "row_loss", "lse_gemm", "stored_rows")
CPU_TIME = 4  # times as long, for the doubles on two slow cores
WAYS = ("perce", "perce_stored")
ROUNDS = 4  # of the ways: two implementations of ours differ less than others'


def stages(device: str, fakes: tuple[str, ...] = ()) -> list[list[Stage]]:
    """Stages, with the second each of them ends at. fakes: made-up peers, to try the harness."""
    side = {} if device == "cuda" else {"side": 16}
    module = "benchmarks.gpu."
    return [
        [
            Stage("train", f"{module}training", 50, patience=50),
            Stage("compile", f"{module}compile", 50, patience=50),
        ],
        [Stage("check", f"{module}parts", 65, options={"what": "check"})],
        [Stage("parts", f"{module}parts", 100, options={"what": "parts", **side})],
        [
            Stage(
                "ways",
                f"{module}race",
                138,
                options={"peers": [*WAYS, *fakes], "heads": list(HEADS), "rounds": ROUNDS, **side},
            )
        ],
        [Stage("tiles", f"{module}tiles", 155, options={"kernels": KERNELS, "sizes": 2})],
        [Stage("budgets", f"{module}parts", 170, options={"what": "budgets"})],
        [Stage("steps", f"{module}steps", 228, patience=60, grace=2, options={})],
    ]


def command(name: str, doc: str, stages, arguments: list[str] | None) -> Results:
    """What both commands share: options, the stages, the tables."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results (default %(default)s)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny doubles, to try the harness"
    )
    parser.add_argument("--fakes", nargs="*", default=(), metavar="PEER", help="made-up peers of tests/fake_peers.py")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages alone")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit(f"{name}: expected a CUDA GPU, found none; nothing was measured")
    rows = stages(options.device, tuple(options.fakes))
    known = [stage.name for row in rows for stage in row]
    if options.only and (unknown := set(options.only) - set(known)):
        parser.error(f"--only: expected stages of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left
    results = Results(name, options.results)
    rows = [[stage for stage in row if not options.only or stage.name in options.only] for row in rows]
    if options.device == "cpu":
        rows = [[replace(stage, until=CPU_TIME * stage.until) for stage in row] for row in rows]
    run([row for row in rows if row], results, options.device)
    from benchmarks.gpu.tables import report

    print(report([results.tree]))
    print(f"\nwritten to {results.path}")
    return results


def main(arguments: list[str] | None = None) -> None:
    results = command("gpu_a", __doc__, stages, arguments)
    if not any(key.startswith("ways/") and key.endswith("/perce") and "seconds" in line
               for key, line in results.lines.items()):  # fmt: skip
        sys.exit("gpu_a: perce itself was not measured: see the reasons above")


if __name__ == "__main__":
    main()
