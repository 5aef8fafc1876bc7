"""Peak extra memory of one forward and backward: `python -m benchmarks.memory IMPL N D V DTYPE` prints it as JSON.

The peak of resident memory, gradients included, minus the memory held with the inputs, in a process of its own.
"""

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

M_MMAP_THRESHOLD = -3


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux only")


def return_freed_blocks(at_least: int = 2**20) -> None:
    """Freed blocks of so many bytes go back to the system. By itself glibc raises this threshold and keeps them, and
    the resident set would be that of the allocator."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, at_least)


def measured_step(step: Callable[[], float]) -> dict[str, float]:
    """The loss that a step returns, its seconds, and its peak of resident memory minus what was held before."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before, started = status_bytes("VmRSS"), time.perf_counter()
    loss = step()
    seconds = time.perf_counter() - started
    return {"peak_extra_bytes": status_bytes("VmHWM") - before, "seconds": seconds, "loss": loss}


def in_a_child(module: str, *arguments: object) -> Any:
    """The last line that `python -m module` prints in a process of its own, read as JSON."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    child = subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, capture_output=True, text=True)
    return json.loads(child.stdout.splitlines()[-1])


def measure(implementation: str, n: int, d: int, v: int, dtype: str) -> dict[str, float]:
    """Measured in this process; to be called once in a fresh one."""
    return_freed_blocks()

    import torch

    from benchmarks.implementations import IMPLEMENTATIONS, make_inputs, step

    loss = IMPLEMENTATIONS[implementation]
    # Thread pools, GEMM primitives and compiled code do not belong to the loss.
    warm_up = (n, d, v) if implementation == "compiled" else (32, d, 512)
    step(loss, make_inputs(*warm_up, getattr(torch, dtype)))
    inputs = make_inputs(n, d, v, getattr(torch, dtype))
    return measured_step(lambda: step(loss, inputs).item())


def peak_extra_bytes(implementation: str, n: int, d: int, v: int, dtype: str) -> int:
    """Bytes, measured in a child process."""
    return in_a_child("benchmarks.memory", implementation, n, d, v, dtype)["peak_extra_bytes"]


def main() -> None:
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    implementation, n, d, v, dtype = sys.argv[1:]
    print(json.dumps(measure(implementation, int(n), int(d), int(v), dtype)))


if __name__ == "__main__":
    main()
