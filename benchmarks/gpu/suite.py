"""The tests of the GPU backend, in parallel processes, each outcome a line as it comes.

At the end of the time pytest is interrupted, not terminated: it still prints its summary.
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
"""In this order, for the time may end before they do."""
TINY_FILES = ["tests/perce_kernels/gpu/test_lse_gemm.py"]
"""Where there is no GPU, to try the harness."""
OPTIONS = ("-p", "benchmarks.gpu.suite", "-m", "not slow", "-v", "--timeout", "60", "--timeout-method", "thread",
           "--tb", "short", "--disable-warnings", "-rf", "--maxfail", "60", "-o", "addopts=", "-o",
           "timeout_func_only=true", "-p", "no:cacheprovider")  # fmt: skip
# A CUDA call that is blocked hears no signal: a thread ends such a test's process.
WORDS = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL)"
OUTCOME = re.compile(rf"\[gw\d+\] \[ *\d+%\] {WORDS} (tests/\S.*)|(tests/\S.*?) {WORDS}(?: .*)?")
PATIENCE = 15.0  # seconds that pytest has for its summary


def pytest_runtest_logreport(report) -> None:
    """A plugin of pytest: why a test failed is said at once. pytest itself says it at the end, which may not come."""
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
    """Before pytest: a shell's background jobs ignore interrupts, and would pass that on."""
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
        # What torch's deterministic mode asks for; and several processes on the cores.
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
