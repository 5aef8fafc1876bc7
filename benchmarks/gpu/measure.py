"""One size, in this process: `python -m benchmarks.gpu.measure JOB` with a Job as JSON; prints events, one JSON a line.

    machine, begin, failed, checked, round, head_done, sweep, logprobs, done

"begin" comes before anything that may crash or hang and names it, so that run.py knows what to leave out next time.
A peer is timed only after its loss and gradients agree with an fp64 reference computed here.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import HostClock, clock_of
from benchmarks.gpu.peers import PEERS, Implementation, Peer, Unable
from benchmarks.implementations import make_inputs, step
from perce_kernels import fused_perce_loss, ops, token_logprobs

SIZES = ((4096, 4096, 128256), (8192, 2560, 151936), (16384, 2304, 262144), (32768, 8192, 128256))  # N, D, V
HEADS = ("trainable", "frozen")
PACKAGES = (
    "torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "trl", "nvidia-cutlass-dsl",
)  # fmt: skip
LOSS_ERROR, GRADIENT_ERROR = 0.01, 0.1
"""Beyond these (relative; of a gradient, ‖error‖/‖gradient‖) a peer computes something else, and is not timed. bf16
logits alone cost some 1e-3 of the loss and 1e-2 of a gradient."""
SAMPLE = 1024  # rows of each gradient that are compared
CHUNK_BUDGETS = tuple(2**exponent for exponent in range(27, 34))  # bytes of logits, 128 MiB to 8 GiB
LONG_STEP = 1.5  # seconds; shorter ones are timed twice
PROBES = 60  # products and copies in a row: some 0.1 s of an H100, so that its clock is that of work that goes on
COMMIT = "PERCE_COMMIT"  # environment variable: a working tree that came without its repository does not know
NO_TIME = "not measured: no time left"
HEAD_SHARE = 0.6  # of the time that is left when a head begins; the first one compiles for the second
PREPARATION_SHARE = 0.7  # of a head's time; the rest is for timing
Event = dict[str, Any]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class Job:
    """What to measure at one size."""

    n: int
    d: int
    v: int
    dtype: str = "bfloat16"
    device: str = "cuda"
    seconds: float = 120.0
    """Time for all of it; what would begin later is left out."""
    rounds: int = 7
    heads: list[str] = field(default_factory=lambda: list(HEADS))
    peers: list[str] = field(default_factory=lambda: list(PEERS))
    probe: int = 8192
    """Side of the square product that gives the matmul rate; the copy is of 8 bytes for each of its entries."""
    extras: bool = True
    """Chunk sizes of ours and the forward of token_logprobs."""


class Dead(Exception):
    """The device answers no more: this process is of no use."""


def machine(device: str) -> Event:
    """Hardware and versions."""

    def output(*command: str) -> str | None:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    found: Event = {"device": platform.processor() or platform.machine(), "driver": None, "cuda": torch.version.cuda}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": [properties.major, properties.minor],
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found | {
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "commit": os.environ.get(COMMIT) or output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """fp32 products as TF32, for the peers whose factors lose nothing by it."""
    if not allowed:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class Reference:
    """The right answer, and which rows of the gradients it has."""

    loss: float
    pir: Tensor
    rows: Tensor
    vocabulary: Tensor
    dhidden: Tensor
    dlm_head: Tensor

    @classmethod
    def of(cls, inputs: Inputs) -> "Reference":
        from tests.numerics import Inputs as OracleInputs
        from tests.oracle import blockwise

        hidden, lm_head, target, hidden_cf = (x.detach() for x in inputs)
        g = torch.Generator().manual_seed(0)
        rows = torch.randperm(len(target), generator=g)[:SAMPLE].to(target.device)
        anywhere = torch.randperm(len(lm_head), generator=g)[: SAMPLE // 2].to(target.device)
        vocabulary = torch.cat([target[rows[: SAMPLE // 2]], anywhere]).unique()
        right = blockwise(OracleInputs(hidden, lm_head, target, hidden_cf), vocabulary_rows=vocabulary)
        dhidden, dlm_head = right.grads["hidden"][rows], right.grads["lm_head"]
        return cls(float(right.loss), right.stats.pir, rows, vocabulary, dhidden, dlm_head)

    def errors(self, implementation: Implementation, loss: Tensor, inputs: Inputs) -> dict[str, float]:
        """Relative errors of loss and gradients, and the largest of a contrast."""

        def relative(actual: Tensor, expected: Tensor) -> float:
            return float((actual.double() - expected).norm() / expected.norm())

        errors = {
            "loss": abs(float(loss) / self.loss - 1),
            "dhidden": relative(inputs[0].grad[self.rows], self.dhidden),
        }
        if inputs[1].requires_grad:
            errors["dlm_head"] = relative(inputs[1].grad[self.vocabulary], self.dlm_head)
        if implementation.pir is not None:
            with torch.no_grad():
                errors["pir"] = float((implementation.pir(*inputs).double() - self.pir).abs().max())
        return errors


def verdict(errors: dict[str, float]) -> str | None:
    """What is wrong, if anything; NaN is."""
    limits = {"loss": LOSS_ERROR, "dhidden": GRADIENT_ERROR, "dlm_head": GRADIENT_ERROR}
    wrong = [
        f"{name} off by {errors[name]:.2g}" for name in limits if name in errors and not errors[name] <= limits[name]
    ]
    return f"wrong result: {', '.join(wrong)}" if wrong else None


def attempt(clock: HostClock, run: Callable[[], Event]) -> Event:
    """The event that `run` returns, or "failed" with the reason; Dead if the device did not survive."""
    try:
        return run()
    except Unable as error:
        return {"event": "failed", "reason": str(error)}
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:  # a library's own, of any kind: recorded by name
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    clock.free()
    if not clock.is_alive():
        raise Dead(reason)
    return {"event": "failed", "reason": reason}


def prepare(clock: HostClock, peer: Peer, inputs: Inputs, reference: Reference, ready: dict[str, Callable]) -> Event:
    """Load, run, compare, measure memory; a peer that is right is then in `ready`."""
    implementation = peer.load()

    def run() -> Tensor:
        with tf32(peer.tf32):
            return step(implementation.loss, inputs)

    errors = reference.errors(implementation, run(), inputs)
    clear(inputs)
    if wrong := verdict(errors):
        return {"event": "failed", "reason": wrong}
    peak = clock.peak_extra_bytes(run)
    seconds = timed(clock, run)  # for the case that it does not come to the rounds
    ready[peer.name] = run
    return {"event": "checked", "errors": errors, "peak_extra_bytes": peak, "seconds": seconds, "rounds": 0}


def clear(inputs: Inputs) -> None:
    for x in inputs:
        x.grad = None


def copied_bytes(job: Job) -> int:
    return 8 * job.probe**2


def probes(job: Job) -> dict[str, Callable]:
    """The two ceilings, timed in turn with everything else: a product, and a copy; PROBES of each."""
    dtype = getattr(torch, job.dtype)
    a, b, c = (torch.randn(job.probe, job.probe, device=job.device).to(dtype) for _ in range(3))
    source = torch.randint(256, (copied_bytes(job),), dtype=torch.uint8, device=job.device)
    target = torch.empty_like(source)

    def matmul() -> None:
        for _ in range(PROBES):
            torch.mm(a, b, out=c)

    def copy() -> None:
        for _ in range(PROBES):
            target.copy_(source)

    return {"matmul": matmul, "copy": copy}


def timed(clock: HostClock, run: Callable) -> float:
    """Seconds of a step; a short one's once more: the peer before may have had the memory, which is then taken anew."""
    seconds = clock.seconds(run)
    return seconds if seconds > LONG_STEP else clock.seconds(run)


def measure_head(
    job: Job, head: str, inputs: Inputs, reference: Reference, clock: HostClock, until: float
) -> Iterator[Event]:
    """All peers with this head: each prepared, then all timed in turn, round after round."""
    inputs[1].requires_grad_(head == "trainable")
    ready = probes(job)
    yield {"event": "round", "head": head, "seconds": {name: timed(clock, run) for name, run in ready.items()}}
    deadline = time.monotonic() + (until - time.monotonic()) * PREPARATION_SHARE
    for name in job.peers:
        where = {"head": head, "peer": name}
        if name != job.peers[0] and time.monotonic() > deadline:
            yield where | {"event": "failed", "reason": NO_TIME}
            continue
        yield where | {"event": "begin"}
        yield where | attempt(clock, lambda peer=PEERS[name]: prepare(clock, peer, inputs, reference, ready))
        clear(inputs)
        clock.free()
    for _ in range(job.rounds):
        if time.monotonic() > until:
            break
        seconds = {}
        for name, run in list(ready.items()):
            where = {"head": head, "peer": name}
            yield where | {"event": "begin"}
            outcome = attempt(clock, lambda run=run: {"seconds": timed(clock, run)})
            clear(inputs)
            if "seconds" in outcome:
                seconds[name] = outcome["seconds"]
            else:
                ready.pop(name)
                yield where | outcome
        yield {"event": "round", "head": head, "seconds": seconds}
    yield {"event": "head_done", "head": head}


def sweep_chunks(inputs: Inputs, clock: HostClock, until: float) -> Iterator[Event]:
    """Our time over the budget of a chunk's logits, which the driver turns into a number of tokens."""
    from perce_kernels.gpu import driver

    (n, d), v, shipped = inputs[0].shape, inputs[1].shape[0], driver.LOGITS_BYTES

    def run() -> None:
        step(lambda *x: fused_perce_loss(*x, backend="triton"), inputs)

    try:
        for budget in CHUNK_BUDGETS:
            if time.monotonic() > until:
                return
            rows = min(n, driver.chunk_rows(d, v, 2, driver._multiprocessors(inputs[0].device), budget))
            yield {"event": "begin", "head": "sweep", "peer": "perce"}
            driver.LOGITS_BYTES = budget
            outcome = attempt(clock, lambda: {"seconds": median([clock.seconds(run) for _ in range(4)][1:])})
            clear(inputs)
            yield {"event": "sweep", "logits_bytes": budget, "rows": rows, "shipped": budget == shipped} | {
                name: value for name, value in outcome.items() if name != "event"
            }
            if rows == n:
                return
    finally:
        driver.LOGITS_BYTES = shipped


@torch.no_grad()
def measure_logprobs(inputs: Inputs, clock: HostClock) -> Event:
    """token_logprobs forward against the cuBLAS products that it replaces, logits written in the inputs' dtype."""
    hidden, lm_head, target, _ = inputs
    rows = max(16, 2**31 // (lm_head.shape[0] * hidden.itemsize) // 128 * 128)
    logits = hidden.new_empty(min(rows, len(hidden)), lm_head.shape[0])

    def products() -> None:
        for chunk in hidden.split(rows):
            torch.mm(chunk, lm_head.T, out=logits[: len(chunk)])

    runs = {
        "seconds": lambda: token_logprobs(hidden, lm_head, target, backend="triton"),
        "entropy_seconds": lambda: token_logprobs(hidden, lm_head, target, backend="triton", return_entropy=True),
        "matmul_seconds": products,
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(6):
        for name, run in runs.items():
            times[name].append(clock.seconds(run))
    return {"event": "logprobs"} | {name: median(values[1:]) for name, values in times.items()}


def events(job: Job, clock: HostClock) -> Iterator[Event]:
    """Everything of one job, in the order of importance."""
    started = time.monotonic()
    yield machine(job.device) | {"event": "machine"}
    inputs = make_inputs(job.n, job.d, job.v, getattr(torch, job.dtype), job.device)
    yield {"event": "begin", "head": "reference", "peer": "reference"}
    reference = Reference.of(inputs)
    clock.free()
    for head in job.heads:
        now = time.monotonic()
        until = now + HEAD_SHARE * (started + job.seconds - now)
        yield from measure_head(job, head, inputs, reference, clock, until)
        clock.free()
    needed = ops.triton_needs(inputs[0].device)
    if job.extras and needed is None and time.monotonic() < started + job.seconds:
        inputs[1].requires_grad_(True)
        yield {"event": "begin", "head": "logprobs", "peer": "perce"}
        yield {"head": "logprobs", "peer": "perce"} | attempt(clock, lambda: measure_logprobs(inputs, clock))
        yield from sweep_chunks(inputs, clock, started + job.seconds)
    yield {"event": "done"}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    job = Job(**json.loads(sys.argv[1]))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between the events
    try:
        for event in events(job, clock_of(job.device)):
            print(json.dumps(event), file=out, flush=True)
    except Dead as reason:
        sys.exit(f"the device is lost: {reason}")


def as_argument(job: Job) -> str:
    return json.dumps(asdict(job))


if __name__ == "__main__":
    main()
