"""The first command on a GPU: does it run, which way is fastest, where does the time go? At most 290 seconds.

    train      python -m perce.train on a tiny model; meanwhile `compile`, all kernels and named tiles in parallel, and
               `tests`, the first of the GPU backend's, because errors must be known before anything is tuned
    check      every way compared with fp64: wrong kernels need no timing
    parts      single products and kernels, at all sizes, compared with the roofline's predictions
    ways       the whole loss by each way, at all sizes; these lines decide which way is used
    profiles   where the time of a whole loss goes, kernel by kernel
    tiles      the named tiles of every kernel at two sizes
    budgets    the loss with different memory budgets for a chunk's logits
    steps      training steps of Qwen3-8B's shape, PerCE and cross-entropy, at 8k and 32k tokens, and at 128k

Every line is in RESULTS/gpu_a.json before it is printed. `--device cpu` runs all stages with tiny sizes in Triton's
interpreter, to test the harness: its numbers mean nothing.
"""

import sys
from math import inf

from benchmarks.gpu.command import command
from benchmarks.gpu.peers import WAY_PEERS
from benchmarks.gpu.roofline import HEADS
from benchmarks.gpu.suite import TINY_FILES
from benchmarks.gpu.supervise import Stage

KERNELS = ("row_loss", "store_gemm", "lse_gemm", "stored_rows")
CHECKED_ROWS = 512  # in stage "ways"; stage "check" has compared the ways already
WORKERS = 8  # for the tests, while the kernels compile
ROUNDS = 4  # for the ways: our own implementations differ less than other libraries


def stages(device: str, fakes: tuple[str, ...] = ()) -> list[list[Stage]]:
    """Stages, each with the second at which it ends. Patience is infinite if a process waits for its own children.

    fakes: made-up peers, to test the harness.
    """
    side = {} if device == "cuda" else {"side": 16}
    tests = {"workers": WORKERS} if device == "cuda" else {"files": TINY_FILES, "workers": 2}
    ways = {
        "peers": [*(peer.name for peer in WAY_PEERS.values()), *fakes],
        "heads": list(HEADS),
        "rounds": ROUNDS,
        "checked_rows": CHECKED_ROWS,
    }
    module = "benchmarks.gpu."
    return [
        [
            Stage("train", f"{module}training", 70, inf),
            Stage("compile", f"{module}compile", 70, inf),
            Stage("tests", f"{module}suite", 78, 70, grace=13, options=tests),
        ],
        [Stage("check", f"{module}parts", 88, options={"what": "check"})],
        [Stage("parts", f"{module}parts", 118, options={"what": "parts", **side})],
        [Stage("ways", f"{module}race", 152, options=ways | side)],
        [Stage("profiles", f"{module}parts", 168, options={"what": "profiles"})],
        [Stage("tiles", f"{module}tiles", 188, options={"kernels": KERNELS, "sizes": 2})],
        [Stage("budgets", f"{module}parts", 214, options={"what": "budgets"})],
        [Stage("steps", f"{module}steps", 288, inf, grace=2)],
    ]


def main(arguments: list[str] | None = None) -> None:
    results = command("gpu_a", __doc__, stages, arguments, at_least="ways")
    if results.lines.get("tests/summary", {}).get("failures"):
        sys.exit("gpu_a: tests failed: see above")


if __name__ == "__main__":
    main()
