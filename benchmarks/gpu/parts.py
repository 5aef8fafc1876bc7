"""The parts of the op, each by itself, beside what roofline.py predicts of it; and which kernels cuBLAS takes.

check     every way on 512 rows against fp64: wrong kernels need no timing
parts     every product and kernel of a chunk, at all sizes: seconds, and predicted ones by the ceilings of this GPU
budgets   the whole loss by the bytes of a chunk's logits, each way
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from benchmarks.gpu import child as children
from benchmarks.gpu import roofline
from benchmarks.gpu.child import Child
from benchmarks.gpu.peers import PEERS, WAY_PEERS
from benchmarks.gpu.race import (
    DTYPE,
    PIR_ERROR,
    SIDE,
    Inputs,
    Reference,
    ceilings,
    clear,
    probes,
    what_is_wrong,
)  # fmt: skip
from benchmarks.gpu.roofline import Gpu, Work
from benchmarks.gpu.sizes import Size
from benchmarks.gpu.tiles import SUBJECTS
from benchmarks.implementations import make_inputs, step
from perce_kernels import token_logprobs
from perce_kernels.gpu import driver, lse_gemm, row_loss, steps

CHECKED_ROWS = 512
DW_ROWS = (1024, 2048, 4096)
"""Tokens of one dW product: the more, the less often dW is read and written."""
REPETITIONS = 5
BUDGETS = (1, 2, 4, 8)  # GiB


class Timing(NamedTuple):
    """One thing to time."""

    run: Callable[[], object]
    predicted: float | None = None
    setup: Callable[[], object] | None = None
    work: Work | None = None


def check(child: Child) -> None:
    """Loss, PIR and gradients of every way at the first two sizes."""
    device, stage = child.request.device, child.request.stage
    for size in child.request.sizes[:2]:

        def make(size: Size = size) -> tuple[Inputs, Reference]:
            inputs = make_inputs(min(size.n, CHECKED_ROWS), size.d, size.v, DTYPE, device)
            return inputs, Reference.of(inputs)

        prepared = child.prepared(f"{stage}/{size}/reference", make)
        if prepared is None:
            continue
        inputs, reference = prepared
        for way, peer in WAY_PEERS.items():

            def compared(peer: str = peer, inputs=inputs, reference=reference) -> dict[str, Any]:
                implementation = PEERS[peer].load()
                errors = reference.errors(implementation, step(implementation.loss, inputs), inputs)
                wrong = what_is_wrong(errors)
                return {"errors": errors, "correct": errors["pir"] <= PIR_ERROR} | ({"reason": wrong} if wrong else {})

            child.measured(f"{stage}/{size}/{way}", compared)
            clear(inputs)


def pitched(rows: int, v: int, device: str) -> Tensor:
    """(rows, V) gradients of logits as the driver's products read them: over fp32 rows of its pitch."""
    z = torch.empty((rows, steps.pitch(v)), device=device)
    return row_loss.overlay(z, v, DTYPE).normal_()


def timing_of(part: str, run: Callable[[], object], flop: float, moved: float, gpu: Gpu) -> Timing:
    """Of one of cuBLAS's products."""
    work = Work(flop, moved)
    return Timing(run, roofline.product_seconds(part, work, gpu), work=work)


def of_a_chunk(size: Size, device: str, gpu: Gpu) -> dict[str, Timing]:
    """The products of one chunk, both passes, as the driver calls them; and logits in 16 bits for comparison."""
    _, d, v = size
    c = roofline.chunk_of(size, gpu)
    hidden, lm_head, _, hidden_cf = (x.detach() for x in make_inputs(c, d, v, DTYPE, device))
    both = torch.cat([hidden, hidden_cf])
    logits = both.new_empty((2 * c, steps.pitch(v)), dtype=torch.float32)[:, :v]
    narrow = both.new_empty((2 * c, v))
    dz, dh = pitched(c, v, device), both.new_empty((c, d), dtype=torch.float32)
    factors = 2 * d * v + 4 * c * d

    def to_16_bits() -> None:
        if device == "cuda":
            torch.mm(both, lm_head.T, out=narrow)
        else:
            narrow.copy_(both.float() @ lm_head.float().T)

    flop = 4 * c * d * v
    return {
        "mm to 16 bits": timing_of("logits", to_16_bits, flop, 4 * c * v + factors, gpu),
        "mm to fp32": timing_of(
            "logits", partial(steps.product, both, lm_head.T, logits), flop, 8 * c * v + factors, gpu
        ),
        "dh": timing_of("dh", partial(steps.product, dz, lm_head, dh), flop / 2, 2 * c * v + factors, gpu),
    }


def of_dw(size: Size, device: str, gpu: Gpu, rows: int) -> dict[str, Timing]:
    """dW of so many tokens, the first time and added to what is there."""
    _, d, v = size
    rows = rows if device == "cuda" else min(rows, size.n)
    dz, hidden = pitched(rows, v, device), torch.randn((rows, d), device=device).to(DTYPE)
    out = torch.zeros((v, d), device=device)

    def timing(add: bool) -> Timing:
        run = partial(steps.product, dz.T, hidden, out, add=add)
        return timing_of("dW", run, 2 * rows * d * v, 2 * rows * (v + d) + (1 + add) * 4 * d * v, gpu)

    return {f"dW of {rows}": timing(False), f"dW of {rows}, added": timing(True)}


def of_kernels(size: Size, device: str, gpu: Gpu) -> dict[str, Timing]:
    """Our own, on one chunk of both passes."""
    (_, d, v), c = size, roofline.chunk_of(size, gpu)
    works = {way: roofline.work(Size(c, d, v), way, "trainable", c) for way in roofline.WAYS}
    rows = gpu.bandwidth * gpu.rows
    gemm = roofline.own_gemm_seconds(works["stored"]["logits"].flop, gpu) + gpu.combine
    predicted = {
        "row_loss": works["fused"]["rows"].bytes / rows, "lse_gemm": gemm, "store_gemm": gemm,
        "stored_rows": works["stored"]["rows"].bytes / rows,
    }  # fmt: skip
    found = {}
    for name, make in SUBJECTS.items():
        subject = make(c, d, v, DTYPE, device)
        found[name] = Timing(subject.run, predicted[name], subject.setup)
    return found


def of_the_rest(size: Size, device: str, gpu: Gpu) -> dict[str, Timing]:
    """What tiles' statistics take to become rows', and the gradients to be scaled."""
    (_, d, v), c = size, roofline.chunk_of(size, gpu)
    maxima = torch.randn((triton.cdiv(v, roofline.STORED_TILE), 2 * c), device=device)
    sums = torch.rand_like(maxima)
    target = torch.zeros(2 * c, dtype=torch.int64, device=device)
    outs = {name: torch.zeros(2 * c, device=device) for name in ("logp", "row_max", "total", "z_target")}
    rows = lse_gemm.Statistics(**outs, entropy=None, moment=None, tile_max=maxima, tile_columns=roofline.STORED_TILE)
    gradient = torch.zeros((v, d), device=device)
    scaled = torch.empty_like(gradient, dtype=DTYPE)
    upstream = torch.ones((), device=device)

    moved = 6 * d * v
    return {
        "combine": Timing(partial(lse_gemm.combine, rows, sums, None, target, -100), gpu.combine),
        "scaling of dW": Timing(
            lambda: torch.mul(gradient, upstream, out=scaled), moved / (gpu.bandwidth * roofline.SCALING),
            work=Work(0, moved),
        ),
    }  # fmt: skip


def measured(child: Child, timing: Timing) -> dict[str, Any]:
    seconds = median([child.clock.seconds(timing.run, timing.setup) for _ in range(REPETITIONS + 1)][1:])
    found: dict[str, Any] = {"seconds": seconds, "predicted": timing.predicted}
    if timing.work is not None and timing.work.flop:
        found["tflops"] = timing.work.flop / seconds / 1e12
    elif timing.work is not None:
        found["bandwidth"] = timing.work.bytes / seconds
    return found


Groups = dict[str, Callable[[], dict[str, Timing]]]


def groups_of(size: Size, device: str, gpu: Gpu) -> Groups:
    """Parts by the operands that they share."""
    return {
        "products": partial(of_a_chunk, size, device, gpu),
        **{f"dW of {rows}": partial(of_dw, size, device, gpu, rows) for rows in DW_ROWS},
        "kernels": partial(of_kernels, size, device, gpu),
        "the rest": partial(of_the_rest, size, device, gpu),
    }


def parts(child: Child) -> None:
    """Ceilings, then every part at every size; cuBLAS's kernels by name last, as a profiler slows what follows it."""
    device, stage = child.request.device, child.request.stage
    side = child.request.options.get("side", SIDE)
    runs = child.prepared(f"{stage}/probes", partial(probes, side, device))
    if runs is None:
        return
    found = ceilings([{name: child.clock.seconds(run) for name, run in runs.items()} for _ in range(3)], side)
    child.line(f"{stage}/ceilings", **found, partial=True)
    del runs
    gpu = roofline.measured_gpu(**found, device=torch.cuda.get_device_name() if device == "cuda" else "")
    for size in child.request.sizes:
        for group, make in groups_of(size, device, gpu).items():
            a_group(child, f"{stage}/{size}", group, make)
            child.clock.free()
        child.measured(f"{stage}/{size}/token_logprobs", lambda size=size: logprobs(child, size))
    for size in child.request.sizes[:2]:
        for group in ("products", f"dW of {DW_ROWS[1]}"):
            make = groups_of(size, device, gpu)[group]
            child.measured(f"{stage}/{size}/names of {group}", lambda make=make: names_of_kernels(make()))
            child.clock.free()


def a_group(child: Child, place: str, group: str, make: Callable[[], dict[str, Timing]]) -> None:
    """Parts that share their operands."""
    operands = f"{place}/operands of {group}"
    timings = child.prepared(operands, make)
    if timings is not None:
        for name, timing in timings.items():
            child.measured(f"{place}/{name}", lambda timing=timing: measured(child, timing))
        child.line(operands, parts=len(timings))


def names_of_kernels(timings: dict[str, Timing]) -> dict[str, Any]:
    """Which kernels ran on the device, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    found: dict[str, Any] = {}
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    for name, timing in timings.items():
        with profile(activities=activities) as profiler:
            timing.run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        on_device = [event for event in profiler.events() if event.device_type != torch.autograd.DeviceType.CPU]
        found[name] = [event.name for event in on_device]
    return {"kernels": found}


@torch.no_grad()
def logprobs(child: Child, size: Size) -> dict[str, Any]:
    """token_logprobs forward against the cuBLAS products that it replaces, logits written in the inputs' dtype."""
    device = child.request.device
    hidden, lm_head, target, _ = make_inputs(*size, DTYPE, device)
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
    for _ in range(4):
        for name, run in runs.items():
            times[name].append(child.clock.seconds(run))
    return {name: median(values[1:]) for name, values in times.items()}


def budgets(child: Child) -> None:
    """The loss and its backward by the budget of a chunk's logits, which the driver turns into a number of tokens."""
    device, stage = child.request.device, child.request.stage
    first, second, *others = child.request.sizes
    for size in (second, first, *others):  # the largest vocabulary asks most for large chunks
        operands = f"{stage}/{size}/operands"
        inputs = child.prepared(operands, lambda size=size: make_inputs(*size, DTYPE, device))
        if inputs is None:
            continue
        for way in WAY_PEERS:
            for gib in BUDGETS[1::2] if [size] == others[-1:] else BUDGETS:  # the last size takes long
                key = f"{stage}/{size}/{way}/{gib} GiB"
                child.measured(key, partial(by_budget, child, size, inputs, way, gib))
                clear(inputs)
                child.clock.free()
        child.line(operands, ways=len(WAY_PEERS))


def by_budget(child: Child, size: Size, inputs: Inputs, way: str, gib: int) -> dict[str, Any]:
    run, shipped, wanted = PEERS[WAY_PEERS[way]].load().loss, driver.LOGITS_BYTES, gib * 2**30
    gpu = Gpu(multiprocessors=driver._multiprocessors(inputs[0].device))
    driver.LOGITS_BYTES = wanted
    try:
        seconds = [child.clock.seconds(lambda: step(run, inputs)) for _ in range(3)][1:]
    finally:
        driver.LOGITS_BYTES = shipped
    return {"seconds": min(seconds), "rows": roofline.chunk_of(size, gpu, wanted), "shipped": wanted == shipped}


def stage(child: Child) -> None:
    {"check": check, "parts": parts, "budgets": budgets}[child.request.options["what"]](child)


if __name__ == "__main__":
    children.main(stage, __doc__)
