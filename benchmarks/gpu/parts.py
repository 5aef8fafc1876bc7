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
from benchmarks.gpu.race import DTYPE, Reference, ceilings, clear, probes, what_is_wrong
from benchmarks.gpu.roofline import Gpu, Work
from benchmarks.gpu.sizes import Size
from benchmarks.gpu.tiles import SUBJECTS
from benchmarks.implementations import make_inputs, step
from perce_kernels import token_logprobs
from perce_kernels.gpu import driver, lse_gemm, steps

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
    device = child.request.device
    for size in child.request.sizes[:2]:
        inputs = make_inputs(min(size.n, CHECKED_ROWS), size.d, size.v, DTYPE, device)
        child.begin(f"{child.request.stage}/{size}/reference")
        reference = Reference.of(inputs)
        for way, peer in WAY_PEERS.items():

            def compared(peer: str = peer, inputs=inputs, reference=reference) -> dict[str, Any]:
                implementation = PEERS[peer].load()
                errors = reference.errors(implementation, step(implementation.loss, inputs), inputs)
                wrong = what_is_wrong(errors)
                return {"errors": errors} | ({"reason": wrong} if wrong else {})

            child.measured(f"{child.request.stage}/{size}/{way}", compared)
            clear(inputs)


def of_a_chunk(size: Size, device: str, gpu: Gpu) -> dict[str, Timing]:
    """The products of one chunk, both passes, as the driver calls them."""
    _, d, v = size
    c = roofline.chunk_of(size, gpu)
    hidden, lm_head, _, hidden_cf = (x.detach() for x in make_inputs(c, d, v, DTYPE, device))
    both = torch.cat([hidden, hidden_cf])
    pitched = both.new_empty((2 * c, steps.pitch(v)), dtype=torch.float32)
    narrow = both.new_empty((2 * c, v))
    dz, dh = both.new_zeros((c, v)).normal_(), both.new_empty((c, d), dtype=torch.float32)
    head_bytes = d * v * 2

    def product(part: str, run: Callable[[], object], flop: float, moved: float) -> Timing:
        work = Work(flop, moved)
        return Timing(run, roofline.product_seconds(part, work, gpu), work=work)

    def to_bf16() -> None:
        if device == "cuda":
            torch.mm(both, lm_head.T, out=narrow)
        else:
            narrow.copy_(both.float() @ lm_head.float().T)

    return {
        "mm to 16 bits": product("logits", to_bf16, 4 * c * d * v, 4 * c * v + head_bytes),
        "mm to fp32": product(
            "logits", lambda: steps.product(both, lm_head.T, pitched[:, :v]), 4 * c * d * v, 8 * c * v + head_bytes
        ),
        "dh": product("dh", lambda: steps.product(dz, lm_head, dh), 2 * c * d * v, 2 * c * v + head_bytes + 4 * c * d),
    }


def of_dw(size: Size, device: str, gpu: Gpu, rows: int) -> dict[str, Timing]:
    """dW of so many tokens, the first time and added to what is there."""
    _, d, v = size
    rows = rows if device == "cuda" else min(rows, size.n)
    dz = torch.randn((rows, v), device=device).to(DTYPE)
    hidden = torch.randn((rows, d), device=device).to(DTYPE)
    out = torch.zeros((v, d), device=device)

    def timing(add: bool) -> Timing:
        work = Work(2 * rows * d * v, 2 * rows * (v + d) + (1 + add) * 4 * d * v)
        return Timing(
            partial(steps.product, dz.T, hidden, out, add=add), roofline.product_seconds("dW", work, gpu), work=work
        )

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
    logits, *outs = (torch.zeros(2 * c, device=device) for _ in range(4))
    gradient = torch.zeros((v, d), device=device)
    scaled = torch.empty_like(gradient, dtype=DTYPE)
    upstream = torch.ones((), device=device)

    def combine() -> None:
        lse_gemm.combine_kernel[(triton.cdiv(2 * c, lse_gemm.BLOCK_COMBINE),)](
            maxima, sums, None, logits, target, *outs, None, None, 2 * c, maxima.shape[0], -100,
            HAS_ENTROPY=False, BLOCK=lse_gemm.BLOCK_COMBINE, num_warps=4,
        )  # fmt: skip

    moved = 6 * d * v
    return {
        "combine": Timing(combine, gpu.combine),
        "scaling of dW": Timing(
            lambda: torch.mul(gradient, upstream, out=scaled), moved / (gpu.bandwidth * roofline.SCALING),
            work=Work(0, moved),
        ),
    }  # fmt: skip


def measured(child: Child, timing: Timing) -> dict[str, Any]:
    seconds = [child.clock.seconds(timing.run, timing.setup) for _ in range(REPETITIONS + 1)][1:]
    found: dict[str, Any] = {"seconds": median(seconds), "fastest": min(seconds), "predicted": timing.predicted}
    if timing.work is not None and timing.work.flop:
        found["tflops"] = timing.work.flop / median(seconds) / 1e12
    elif timing.work is not None:
        found["bandwidth"] = timing.work.bytes / median(seconds)
    return found


def parts(child: Child) -> None:
    """Ceilings, then every part at every size."""
    device, stage = child.request.device, child.request.stage
    side = child.request.options.get("side", 8192)
    runs = probes(side, device)
    rounds = [{name: child.clock.seconds(run) for name, run in runs.items()} for _ in range(3)]
    found = ceilings(rounds, side)
    child.line(f"{stage}/ceilings", **found, partial=True)
    del runs
    gpu = Gpu(found["matmul_flops"], found["bandwidth"], multiprocessors=driver._multiprocessors(torch.device(device)))
    for index, size in enumerate(child.request.sizes):
        groups: dict[str, Callable[[], dict[str, Timing]]] = {
            "products": partial(of_a_chunk, size, device, gpu),
            **{f"dW of {rows}": partial(of_dw, size, device, gpu, rows) for rows in DW_ROWS},
            "kernels": partial(of_kernels, size, device, gpu),
            "the rest": partial(of_the_rest, size, device, gpu),
        }
        for group, make in groups.items():
            a_group(child, f"{stage}/{size}", group, make, named=index < 2)
            child.clock.free()
        child.measured(f"{stage}/{size}/token_logprobs", lambda size=size: logprobs(child, size))


def a_group(child: Child, place: str, group: str, make: Callable[[], dict[str, Timing]], named: bool) -> None:
    """Parts that share their operands; named: also which kernels they are."""
    if not child.wants(f"{place}/operands of {group}"):
        return
    child.begin(f"{place}/operands of {group}")
    timings: dict[str, Timing] = {}
    outcome = child.attempt(lambda: timings.update(make()) or {})
    for name, timing in timings.items():
        child.measured(f"{place}/{name}", lambda timing=timing: measured(child, timing))
    if named and timings:
        child.measured(f"{place}/names of {group}", lambda: names_of_kernels(timings))
    child.line(f"{place}/operands of {group}", timed=len(timings), **outcome)


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
        keys = {(way, gib): f"{stage}/{size}/{way}/{gib} GiB" for way in WAY_PEERS for gib in BUDGETS}
        if not any(child.wants(key) for key in keys.values()):
            continue
        inputs = make_inputs(*size, DTYPE, device)
        for (way, gib), key in keys.items():
            child.measured(
                key, lambda way=way, gib=gib, inputs=inputs, size=size: budget(child, size, inputs, way, gib)
            )
            clear(inputs)
            child.clock.free()


def budget(child: Child, size: Size, inputs: tuple[Tensor, ...], way: str, gib: int) -> dict[str, Any]:
    run, shipped, wanted = PEERS[WAY_PEERS[way]].load().loss, driver.LOGITS_BYTES, gib * 2**30
    gpu = Gpu(multiprocessors=driver._multiprocessors(inputs[0].device))
    driver.LOGITS_BYTES = wanted
    try:
        seconds = [child.clock.seconds(lambda: step(run, inputs)) for _ in range(4)][1:]
    finally:
        driver.LOGITS_BYTES = shipped
    return {"seconds": median(seconds), "rows": roofline.chunk_of(size, gpu, wanted), "shipped": wanted == shipped}


def stage(child: Child) -> None:
    {"check": check, "parts": parts, "budgets": budgets}[child.request.options["what"]](child)


if __name__ == "__main__":
    children.main(stage, __doc__)
