"""The tests of the GPU backend, in parallel processes; each outcome is printed as a line at once.

When the time is over, pytest is interrupted, not terminated, so that it still prints its summary.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.gpu import child as children
from benchmarks.gpu.child import Child, die_with_parent

ROOT = Path(__file__).parents[2]
FILES = [
    f"tests/perce_kernels/{name}.py"
    for name in "gpu/test_device gpu/test_promises gpu/test_lse_gemm gpu/test_row_loss gpu/test_stored_rows "
    "gpu/test_combine gpu/test_scale gpu/test_steps gpu/test_driver test_loss test_ops".split()
]
"""By importance, because there may not be time for all."""
TINY_FILES = ["tests/perce_kernels/gpu/test_lse_gemm.py"]
"""Used without a GPU, to test the harness."""
OPTIONS = ("-p", "benchmarks.gpu.suite", "-m", "not slow", "-v", "--timeout", "60", "--timeout-method", "thread",
           "--tb", "short", "--disable-warnings", "-rf", "--maxfail", "60", "-o", "addopts=", "-o",
           "timeout_func_only=true", "-p", "no:cacheprovider")  # fmt: skip
# A blocked CUDA call does not react to signals, so a thread ends the process of such a test.
WORDS = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL)"
OUTCOME = re.compile(rf"\[gw\d+\] \[ *\d+%\] {WORDS} (tests/\S.*)|(tests/\S.*?) {WORDS}(?: .*)?")
PATIENCE = 15.0  # seconds that pytest gets for its summary


def pytest_runtest_logreport(report) -> None:
    """A pytest plugin that prints failures at once; pytest itself prints them at its end, which it may not reach."""
    if report.failed:
        print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)


def command(child: Child) -> list[str]:
    options = child.request.options
    files = options.get("files") or FILES
    workers = ["-n", str(options["workers"])] if options.get("workers") else []
    return [sys.executable, "-m", "pytest", *OPTIONS, *workers, *files]


def outcome_of(line: str) -> tuple[str, str] | None:
    """(test, outcome) of a line of `pytest -v`, with or without processes."""
    match = OUTCOME.fullmatch(line.strip())
    return match and (match[2] or match[3], (match[1] or match[4]).lower())


def _start() -> None:
    """Runs before pytest: background jobs of a shell ignore interrupts, and children would inherit that."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stage(child: Child) -> None:
    """Options: files, workers."""
    name, counts, failures, last = child.request.stage, {}, [], ""
    child.begin(f"{name}/summary")
    process = subprocess.Popen(
        command(child),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # The first is needed for torch's deterministic mode, the second because several processes share the cores.
        env=os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "2"},
        start_new_session=True,
        preexec_fn=_start,
    )
    assert process.stdout is not None
    timer = threading.Timer(max(0.0, child.until - time.monotonic()), process.send_signal, [signal.SIGINT])
    killer = threading.Timer(
        max(0.0, child.until - time.monotonic()) + PATIENCE, os.killpg, [process.pid, signal.SIGKILL]
    )
    timer.start(), killer.start()
    try:
        for line in process.stdout:
            print(line, end="", file=sys.stderr)
            last = line.strip() or last
            if found := outcome_of(line):
                test, outcome = found
                counts[outcome] = counts.get(outcome, 0) + 1
                failures += [test] * (outcome in ("failed", "error"))
                child.line(f"{name}/{test}", outcome=outcome)
    finally:
        timer.cancel(), killer.cancel()
    status = process.wait()
    child.line(f"{name}/summary", status=status, last_words=last, **counts, failures=failures)


if __name__ == "__main__":
    children.main(stage, __doc__)
