"""The second command on a GPU: the op beside its peers, and its tests. At most 550 seconds.

    peers          all that need no CuTe DSL, trainable head at all sizes, then frozen; each timed in turn with ours
    quack          at two sizes, in a process of its own: it patches CuTe's classes
    liger_cutedsl  likewise; both compile for long, and may be silent for two minutes if the time allows
    flash          perce.train with flash-attn-4
    long           one step of Qwen3-8B's shape at 128k tokens, its gradient whole
    tests          the GPU backend's, in eight processes, interrupted at the end of the time; meanwhile `memcheck` and
                   `racecheck`, all kernels under compute-sanitizer

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
"""Stage → peers that need the CuTe DSL."""
WORKERS = 8


def stages(device: str, fakes: tuple[str, ...] = ()) -> list[list[Stage]]:
    """Stages, with the second each of them ends at."""
    tiny = device == "cpu"
    side = {"side": 16} if tiny else {}
    race = "benchmarks.gpu.race"
    others = [name for name in PEERS if not any(name in peers for peers in CUTE.values())]
    tests = {"files": TINY_FILES, "workers": 2} if tiny else {"workers": WORKERS}
    both = {"heads": ["trainable"], "sizes": 2} | side
    cute = [
        [Stage(name, race, until, 120, options={"peers": ["perce", *peers]} | both)]
        for (name, peers), until in zip(CUTE.items(), (225, 270), strict=True)
    ]
    return [
        [Stage("peers", race, 160, 45, options={"peers": [*others, *fakes], "heads": list(HEADS), **side})],
        *cute,
        [Stage("flash", "benchmarks.gpu.training", 305, inf)],
        [Stage("long", "benchmarks.gpu.steps", 430, inf)],
        [
            Stage("tests", "benchmarks.gpu.suite", 550, 90, grace=18, options=tests),
            *(Stage(tool, "benchmarks.gpu.sanitizer", 550, inf) for tool in TOOLS),
        ],
    ]


def main(arguments: list[str] | None = None) -> None:
    results = command("gpu_b", __doc__, stages, arguments)
    failed = results.lines.get("tests/summary", {}).get("failures")
    failed = failed or any(results.lines.get(f"{tool}/all kernels", {}).get("problems") for tool in TOOLS)
    if failed or not any("seconds" in line for key, line in results.lines.items() if key.endswith("/perce")):
        sys.exit("gpu_b: tests or a sanitizer failed, or perce itself was not measured: see above")


if __name__ == "__main__":
    main()
