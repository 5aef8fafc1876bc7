"""A measuring process, as run by supervise.py. It reads a request and prints messages, one JSON object per line:

    {"machine": {…}}            once
    {"begin": KEY}              before anything that may crash or hang
    {"line": KEY, …}            what was measured, or the reason why not; "partial": a later line replaces it
    {"done": true}              at the end

`measured` does all of that for one key. It skips keys that an earlier process finished or that ended one, and keys that
there is no time for.
"""

import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

from benchmarks.commit import commit, versions
from benchmarks.gpu.clock import HostClock, clock_of
from benchmarks.gpu.results import NO_TIME
from benchmarks.gpu.sizes import BY_IMPORTANCE, TINY, Size

PACKAGES = (
    "torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels", "trl",
    "nvidia-cutlass-dsl", "datasets", "flash-attn",
)  # fmt: skip

PR_SET_PDEATHSIG = 1
T = TypeVar("T")


class Unable(Exception):
    """This cannot be measured here; the message says why."""


class Dead(Exception):
    """The device no longer responds, so this process cannot measure anything."""


@dataclass
class Request:
    """What a process should measure."""

    stage: str
    seconds: float
    """Time for the whole request; measurements that would begin later are left out."""
    device: str = "cuda"
    tell_machine: bool = True
    """Whether to report hardware and versions, because they are not known yet."""
    finished: list[str] = field(default_factory=list)
    """Keys that an earlier process of this stage finished before it crashed or hung on another key."""
    lost: dict[str, str] = field(default_factory=dict)
    """Keys that ended a process, and how."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the stage."""

    @property
    def sizes(self) -> tuple[Size, ...]:
        return BY_IMPORTANCE if self.device == "cuda" else TINY

    def as_argument(self) -> str:
        return json.dumps(asdict(self))


def machine(device: str) -> dict[str, Any]:
    """Hardware and versions."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(), "driver": None, "cuda": torch.version.cuda,
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": [properties.major, properties.minor],
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": driver_version(),
        }
    return found | {
        "python": platform.python_version(),
        "packages": versions(PACKAGES),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def driver_version() -> str | None:
    """The version of NVIDIA's driver, by nvidia-smi."""
    try:
        command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class Child:
    """The state of this process while it measures."""

    def __init__(self, request: Request, say: Callable[[dict[str, Any]], object]):
        self.request, self.say = request, say
        self.clock: HostClock = clock_of(request.device)
        self.until = time.monotonic() + request.seconds

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.until

    def line(self, key: str, **values: Any) -> None:
        self.say({"line": key} | values)

    def begin(self, key: str) -> None:
        self.say({"begin": key})

    def wants(self, key: str) -> bool:
        """Whether this key still has to be measured, and there is time for it."""
        if key in self.request.finished or key in self.request.lost:
            return False
        if self.out_of_time:
            self.line(key, reason=NO_TIME)
        return not self.out_of_time

    def prepared(self, key: str, make: Callable[[], T]) -> T | None:
        """What `make` returns, which several lines share. None if it fails, with the reason, or failed before."""
        if key in self.request.finished or key in self.request.lost or self.out_of_time:
            return None
        self.begin(key)
        made: list[T] = []
        outcome = self.attempt(lambda: made.append(make()) or {})
        if made:
            return made[0]
        self.line(key, **outcome)
        return None

    def measured(self, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """The line that `run` returns, printed. None if `run` fails; then the reason is printed."""
        if not self.wants(key):
            return None
        self.begin(key)
        outcome = self.attempt(run)
        self.line(key, **outcome)
        return None if "reason" in outcome else outcome

    def attempt(self, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `run` returns, or the reason why it failed. Raises Dead if the device did not survive."""
        try:
            return run()
        except Unable as error:
            return {"reason": str(error)}
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Exception as error:  # libraries raise errors of any kind: recorded by name
            traceback.print_exc()
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.clock.free()
        if not self.clock.is_alive():
            raise Dead(reason)
        return {"reason": reason}


def is_asked() -> bool:
    """Whether this process belongs to a stage: its arguments are "-" and the device."""
    return sys.argv[1:2] == ["-"]


def die_with_parent() -> None:
    """Ends this process when its parent ends, so that no process outlives a command that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def warm_up(device: str) -> None:
    """Creates the GPU context and loads cuBLAS, which takes the first seconds of a process."""
    if device == "cuda":
        x = torch.zeros(64, 64, device=device, dtype=torch.bfloat16)
        torch.mm(x, x).sum().item()


def main(stage: Callable[[Child], object], doc: str | None, prepare: Callable[[], object] = lambda: None) -> None:
    """The command of a stage: after `prepare`, it reads a Request as JSON from standard input and runs the stage."""
    if not is_asked():
        sys.exit(doc)
    die_with_parent()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between the lines
    prepare()
    warm_up(sys.argv[2])
    request = Request(**json.loads(sys.stdin.read()))
    child = Child(request, lambda event: print(json.dumps(event), file=out, flush=True))
    if request.tell_machine:
        child.say({"machine": machine(request.device)})
    try:
        stage(child)
    except Dead as reason:
        sys.exit(f"the device is lost: {reason}")
    child.say({"done": True})
