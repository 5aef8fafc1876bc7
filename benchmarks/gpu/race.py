"""Implementations of the whole loss, forward and backward: compared with an fp64 reference, then timed in turn.

A race is one size with one head, trainable or frozen. The line STAGE/HEAD/SIZE/PEER has a peer's errors, its peak
memory and the seconds of its first step. The line STAGE/HEAD/SIZE/race has the rounds: in each of them every peer and
both ceilings (a large product, a copy) are timed once.

A peer is *wrong*, and not timed, if its loss or a gradient is off by more than bf16 can explain, because then it
computes something else. It is *correct* if moreover every PIR is within 1e-3 of fp64. A peer that is neither is timed
and listed with its error, without a ratio to the floor.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import child as children
from benchmarks.gpu.child import Child
from benchmarks.gpu.clock import HostClock
from benchmarks.gpu.peers import Implementation, Peer, find_peer
from benchmarks.gpu.results import NO_TIME
from benchmarks.gpu.roofline import predict
from benchmarks.gpu.sizes import Size
from benchmarks.implementations import make_inputs, step

PIR_ERROR = 1e-3
"""Largest error of a correct peer's PIR, in nats. bf16 logits of standard deviation 3 cause an error of some 1e-2."""
LOSS_ERROR, GRADIENT_ERROR = 0.01, 0.1
"""With larger relative errors (‖error‖/‖gradient‖ for a gradient), a peer computes something else."""
SAMPLE = 1024  # rows of each gradient that are compared
LONG_STEP = 0.2  # seconds; shorter ones are timed twice
DTYPE = torch.bfloat16
PROBES = 60  # products and copies in a row: some 0.1 s on an H100, so that its clock is that of sustained work
ROUNDS = 7
SIDE = 8192  # of the square matrices whose product is the ceiling
FP64_FLOPS = 40e12  # assumed for the reference's fp64 products on an H100; its data sheet says 67
COLD = 8.0  # more seconds that the first race needs for itself and per peer: libraries load, kernels compile
PREPARATION = 0.7  # of a race's time; the rest is for rounds
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Computes fp32 products in TF32, for the peers whose factors lose nothing by it."""
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
    """The fp64 results, with a sample of the rows of the gradients."""

    loss: float
    pir: Tensor
    rows: Tensor
    vocabulary: Tensor
    dhidden: Tensor
    dlm_head: Tensor

    @classmethod
    def of(cls, inputs: Inputs) -> "Reference":
        from tests.helpers.numerics import Inputs as OracleInputs
        from tests.helpers.oracle import blockwise

        hidden, lm_head, target, hidden_cf = (x.detach() for x in inputs)
        g = torch.Generator().manual_seed(0)
        rows = torch.randperm(len(target), generator=g)[:SAMPLE].to(target.device)
        anywhere = torch.randperm(len(lm_head), generator=g)[: SAMPLE // 2].to(target.device)
        vocabulary = torch.cat([target[rows[: SAMPLE // 2]], anywhere]).unique()
        right = blockwise(OracleInputs(hidden, lm_head, target, hidden_cf), vocabulary_rows=vocabulary)
        dhidden, dlm_head = right.grads["hidden"][rows], right.grads["lm_head"]
        return cls(float(right.loss), right.stats.pir, rows, vocabulary, dhidden, dlm_head)

    def errors(self, implementation: Implementation, loss: Tensor, inputs: Inputs) -> dict[str, float]:
        """Relative errors of loss and gradients, and the largest absolute error of a PIR."""

        def relative(actual: Tensor, expected: Tensor) -> float:
            return float((actual.double() - expected).norm() / expected.norm())

        hidden, lm_head = inputs[:2]
        assert hidden.grad is not None
        errors = {"loss": abs(float(loss) / self.loss - 1), "dhidden": relative(hidden.grad[self.rows], self.dhidden)}
        if lm_head.grad is not None:
            errors["dlm_head"] = relative(lm_head.grad[self.vocabulary], self.dlm_head)
        with torch.no_grad():
            errors["pir"] = float((implementation.pir(*inputs).double() - self.pir).abs().max())
        return errors


@lru_cache(maxsize=8)
def reference_of(size: Size, device: str) -> Reference:
    """The reference for `make_inputs`, which returns the same every time; cached for the race with the other head."""
    return Reference.of(make_inputs(*size, DTYPE, device))


def what_is_wrong(errors: dict[str, float]) -> str | None:
    """Which errors of loss and gradients are too large, if any; NaN counts as too large."""
    limits = {"loss": LOSS_ERROR, "dhidden": GRADIENT_ERROR, "dlm_head": GRADIENT_ERROR}
    wrong = [
        f"{name} off by {errors[name]:.2g}" for name in limits if name in errors and not errors[name] <= limits[name]
    ]
    return f"wrong result: {', '.join(wrong)}" if wrong else None


def clear(inputs: Inputs) -> None:
    for x in inputs:
        x.grad = None


def probes(side: int, device: str) -> dict[str, Callable[[], None]]:
    """The two ceilings, PROBES times each: a product of `side`³, and a copy of 8·side² bytes."""
    a, b, c = (torch.randn(side, side, device=device).to(DTYPE) for _ in range(3))
    source = torch.randint(256, (8 * side**2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def matmul() -> None:
        for _ in range(PROBES):
            torch.mm(a, b, out=c)

    def copy() -> None:
        for _ in range(PROBES):
            target.copy_(source)

    return {"matmul": matmul, "copy": copy}


def ceilings(rounds: list[dict[str, float]], side: int) -> dict[str, float]:
    """FLOP/s and bytes/s of the probes, by the medians over rounds."""
    matmul, copy = (median(seconds[name] for seconds in rounds) for name in ("matmul", "copy"))
    return {"matmul_flops": PROBES * 2 * side**3 / matmul, "bandwidth": PROBES * 16 * side**2 / copy}


def timed(clock: HostClock, run: Callable[[], object]) -> float:
    """Seconds of a step. A short step is timed again, because the first may have to allocate memory that the peer
    before it had."""
    seconds = clock.seconds(run)
    return seconds if seconds > LONG_STEP else clock.seconds(run)


class Prepared(NamedTuple):
    """What the peers of a race share."""

    inputs: Inputs
    checked: Inputs
    """Inputs on which a peer is compared with the reference: the same, or fewer rows."""
    reference: Reference
    ceiling: dict[str, Callable[[], None]]


class Race:
    """One size with one head."""

    def __init__(self, child: Child, head: str, size: Size, until: float):
        self.child, self.until, self.place = child, until, f"{child.request.stage}/{head}/{size}"
        options = child.request.options
        self.side, self.rounds_wanted = options.get("side", SIDE), options.get("rounds", ROUNDS)
        self.checked_size = size._replace(n=min(size.n, options.get("checked_rows", size.n)))
        self.size, self.device, self.head = size, child.request.device, head
        self.ready: dict[str, Callable[[], object]] = {}
        self.rounds: list[dict[str, float]] = []

    def key(self, name: str) -> str:
        return f"{self.place}/{name}"

    def make(self) -> Prepared:
        inputs = make_inputs(*self.size, DTYPE, self.device)
        checked = inputs if self.checked_size == self.size else make_inputs(*self.checked_size, DTYPE, self.device)
        for lm_head in (inputs[1], checked[1]):
            lm_head.requires_grad_(self.head == "trainable")
        reference = reference_of(self.checked_size, self.device)
        self.child.clock.free()
        return Prepared(inputs, checked, reference, probes(self.side, self.device))

    def run(self, names: list[str]) -> None:
        """Prepares every peer, then times all of them in turn, round after round."""
        if not self.child.wants(self.key("race")):
            return
        prepared = self.child.prepared(self.key("reference"), self.make)
        if prepared is None:
            return
        self.round(prepared)
        prepared_by = time.monotonic() + (self.until - time.monotonic()) * PREPARATION
        for name in names:
            self.prepare(name, prepared, prepared_by)
        for _ in range(self.rounds_wanted):
            if time.monotonic() > self.until:
                break
            self.round(prepared)
        self.say(partial=False)
        self.ready.clear()
        clear(prepared.inputs)
        self.child.clock.free()

    def prepare(self, name: str, prepared: Prepared, prepared_by: float) -> None:
        """Loads, runs and compares a peer and measures its memory; if it is not wrong, it takes part in the rounds."""
        child, key = self.child, self.key(name)
        if key in child.request.lost:
            return
        before = [reason for lost, reason in child.request.lost.items() if lost.rpartition("/")[2] == name]
        if before:
            child.line(key, reason=f"left out, as before: {before[0]}")
            return
        if self.ready and time.monotonic() > prepared_by:
            child.line(key, reason=NO_TIME, partial=True)
            return
        child.begin(key)
        peer = find_peer(name)
        child.line(key, **child.attempt(lambda: self.first_steps(peer, prepared)), partial=True)
        clear(prepared.inputs)
        child.clock.free()

    def first_steps(self, peer: Peer, prepared: Prepared) -> dict[str, Any]:
        """One step to compare results, and one for memory and, in case there are no rounds, time."""
        implementation = peer.load()

        def run() -> Tensor:
            with tf32(peer.tf32):
                return step(implementation.loss, prepared.inputs)

        with tf32(peer.tf32):
            loss = step(implementation.loss, prepared.checked)
            errors = prepared.reference.errors(implementation, loss, prepared.checked)
        clear(prepared.checked)
        if wrong := what_is_wrong(errors):
            return {"reason": wrong, "errors": errors}
        if prepared.checked is not prepared.inputs:
            run()
            clear(prepared.inputs)
        seconds: list[float] = []
        peak = self.child.clock.peak_extra_bytes(lambda: seconds.append(self.child.clock.seconds(run)))
        self.ready[peer.name] = run
        correct = errors["pir"] <= PIR_ERROR
        return {"correct": correct, "errors": errors, "peak_extra_bytes": peak, "seconds": seconds[0]}

    def round(self, prepared: Prepared) -> None:
        """Times the ceilings and every ready peer once. Each round begins with another peer, because a GPU slows down
        as it warms up."""
        clock = self.child.clock
        seconds = {name: clock.seconds(run) for name, run in prepared.ceiling.items()}
        first = len(self.rounds) % max(len(self.ready), 1)
        for name, run in [*self.ready.items()][first:] + [*self.ready.items()][:first]:
            self.child.begin(self.key(name))
            outcome = self.child.attempt(lambda run=run: {"seconds": timed(clock, run)})
            clear(prepared.inputs)
            if "seconds" in outcome:
                seconds[name] = outcome["seconds"]
            else:
                self.ready.pop(name)
                self.child.line(self.key(name), **outcome)
        self.rounds.append(seconds)
        self.say(partial=True)

    def say(self, partial: bool) -> None:
        self.child.line(self.key("race"), **ceilings(self.rounds, self.side), rounds=self.rounds, partial=partial)


def expected_seconds(head: str, size: Size, peers: int, checked_rows: int) -> float:
    """Expected seconds of a race, by which the stage's time is divided: the reference, and steps of peers that take
    twice our time."""
    reference = 8 * min(size.n, checked_rows) * size.d * size.v / FP64_FLOPS
    steps = (ROUNDS + 3) * 2 * peers * sum(predict(size, head=head).values())
    return steps + (reference if head == "trainable" else 0.0) + 2.0


def stage(child: Child) -> None:
    """All sizes with the first head, then all with the next.

    Options: peers, heads, rounds, side (of the product that is a ceiling), sizes (how many), checked_rows (compared
    with the reference; default all).
    """
    options = child.request.options
    sizes = child.request.sizes[: options.get("sizes")]
    races = [(head, size) for head in options["heads"] for size in sizes]
    peers, rows = len(options["peers"]), options.get("checked_rows", 2**62)
    expected = [expected_seconds(head, size, peers, rows) for head, size in races]
    expected[0] += COLD * (1 + peers)
    for index, (head, size) in enumerate(races):
        now = time.monotonic()
        share = expected[index] / sum(expected[index:])
        Race(child, head, size, now + (child.until - now) * share).run(options["peers"])


def prepare() -> None:
    """Slow imports. Liger is not among them: it imports the CuTe DSL, which quack, in another process, patches."""
    for module in ("trl.trainer.utils", "cut_cross_entropy"):
        with suppress(ImportError):
            import_module(module)


if __name__ == "__main__":
    children.main(stage, __doc__, prepare)
