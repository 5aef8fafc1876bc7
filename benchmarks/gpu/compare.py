"""The second command on a GPU: other libraries, the tests, and long steps. At most 27 minutes; in parts with --only.

    trainers       steps of Qwen3-8B's shape by a plain Trainer, TRL's and ours, at 8k and 32k tokens
    peers          all that need no CuTe DSL, trainable head at all sizes, then frozen; each timed in turn with ours
    tests          the GPU backend's, in twelve processes, interrupted when the time is over; meanwhile `memcheck` and
                   `racecheck`, all kernels under compute-sanitizer, and perce.train with its `options` and with `flash`
    quack          at two sizes, in a process of its own, because it patches CuTe's classes
    liger_cutedsl  likewise; both take long to compile, and may print nothing for two minutes if the time allows
    attention      steps at 32k tokens with PyTorch's attention and with flash-attn-4
    personas       steps on eight requests for one persona of 8k tokens, together and one by one
    lengths        what attention costs at lengths that it has not seen before, by itself and in steps
    flex           perce.train under flex attention
    long, longest  one step at 128k tokens, and at 256k (an H200's memory), with a gradient through all of them

Every line is in RESULTS/gpu_b.json before it is printed. `--device cpu`: see decide.py.
"""

import sys
from math import inf

from benchmarks.gpu.command import command
from benchmarks.gpu.peers import PEERS
from benchmarks.gpu.roofline import HEADS
from benchmarks.gpu.sanitizer import TOOLS
from benchmarks.gpu.suite import TINY_FILES
from benchmarks.gpu.supervise import Stage

CUTE = {"quack": ["quack", "quack_exact"], "liger_cutedsl": ["liger_cutedsl"]}
"""Stages of peers that need the CuTe DSL."""
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""For a step that needs nearly all of the memory, which fragments might not leave in one piece."""
WORKERS = 12
ROUNDS = 4


def stages(device: str, fakes: tuple[str, ...] = ()) -> list[list[Stage]]:
    """Stages, each with the second at which it ends."""
    tiny = device == "cpu"
    side = {"side": 16} if tiny else {}
    race = "benchmarks.gpu.race"
    others = [name for name in PEERS if not any(name in peers for peers in CUTE.values())]
    tests = {"files": TINY_FILES, "workers": 2} if tiny else {"workers": WORKERS}
    both = {"heads": ["trainable"], "sizes": 2} | side
    cute = [
        [Stage(name, race, until, 120, options={"peers": ["perce", *peers]} | both)]
        for (name, peers), until in zip(CUTE.items(), (615, 660), strict=True)
    ]
    peers = {"peers": [*others, *fakes], "heads": list(HEADS), "rounds": ROUNDS} | side
    return [
        [Stage("trainers", "benchmarks.gpu.trainers", 240, inf)],
        [Stage("peers", race, 400, 45, options=peers)],
        [
            Stage("tests", "benchmarks.gpu.suite", 560, 90, grace=18, options=tests),
            *(Stage(tool, "benchmarks.gpu.sanitizer", 560, inf) for tool in TOOLS),
            *(Stage(name, "benchmarks.gpu.training", 560, inf) for name in ("options", "flash")),
        ],
        *cute,
        [Stage("attention", "benchmarks.gpu.steps", 735, inf)],
        [Stage("personas", "benchmarks.gpu.steps", 825, inf)],
        [Stage("lengths", "benchmarks.gpu.lengths", 905, inf)],
        [Stage("flex", "benchmarks.gpu.training", 1145, inf)],
        [Stage("long", "benchmarks.gpu.steps", 1265, inf)],
        [Stage("longest", "benchmarks.gpu.steps", 1585, inf, environment=EXPANDABLE)],
    ]


def main(arguments: list[str] | None = None) -> None:
    results = command("gpu_b", __doc__, stages, arguments, at_least="peers")
    failed = results.lines.get("tests/summary", {}).get("failures")
    if failed or any(results.lines.get(f"{tool}/all kernels", {}).get("problems") for tool in TOOLS):
        sys.exit("gpu_b: tests or a sanitizer failed: see above")


if __name__ == "__main__":
    main()
