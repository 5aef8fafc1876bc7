"""The parts of the op, each timed separately and compared with roofline.py; and where the time of a whole call goes.

check     every way on 512 rows compared with fp64: wrong kernels need no timing
parts     every product and kernel of a chunk, at all sizes: seconds, measured and predicted by this GPU's ceilings
budgets   the whole loss by each way, with different budgets for a block's dz and a chunk's logits
profiles  the kernels of the whole loss by each way, by name: how often they run, and total seconds
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import child as children
from benchmarks.gpu import roofline
from benchmarks.gpu.child import Child
from benchmarks.gpu.clock import seconds_of_kernels
from benchmarks.gpu.peers import WAY_PEERS, Peer
from benchmarks.gpu.race import DTYPE, PIR_ERROR, SIDE, Inputs, Reference, ceilings, clear, probes, what_is_wrong
from benchmarks.gpu.roofline import Gpu, Work
from benchmarks.gpu.sizes import Size
from benchmarks.gpu.tiles import SUBJECTS
from benchmarks.implementations import make_inputs, step
from perce_kernels import token_logprobs
from perce_kernels.gpu import cut, tiles
from perce_kernels.gpu.combine import TileStatistics, combine
from perce_kernels.gpu.cut import block_of
from perce_kernels.gpu.scale import scale
from perce_kernels.gpu.tiles import STATISTICS_COLUMNS
from perce_kernels.product import pitch, product

CHECKED_ROWS = 512
BLOCKS = (2048, 4096, 8192, 16384)
"""Tokens of the products with dz; with more of them, dW is read and written less often."""
REPETITIONS = 5
BUDGETS: dict[str, tuple[float, ...]] = {"trainable": (1, 2, 4, 8), "frozen": (0.5, 2)}
"""GiB by head: without dW, which is read and written once per block, less should do."""


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

            def compared(peer: Peer = peer, inputs=inputs, reference=reference) -> dict[str, Any]:
                implementation = peer.load()
                errors = reference.errors(implementation, step(implementation.loss, inputs), inputs)
                wrong = what_is_wrong(errors)
                return {"errors": errors, "correct": errors["pir"] <= PIR_ERROR} | ({"reason": wrong} if wrong else {})

            child.measured(f"{stage}/{size}/{way}", compared)
            clear(inputs)


def gradients(rows: int, v: int, device: str) -> Tensor:
    """(rows, V) gradients of logits, with the row pitch that the driver's products read."""
    return torch.randn((rows, pitch(v)), device=device, dtype=DTYPE)[:, :v]


def timing_of(part: str, run: Callable[[], object], flop: float, moved: float, gpu: Gpu) -> Timing:
    """The timing of one product by cuBLAS."""
    work = Work(flop, moved)
    return Timing(run, roofline.product_seconds(part, work, gpu), work=work)


def of_a_block(size: Size, device: str, gpu: Gpu) -> dict[str, Timing]:
    """The products of one block by cuBLAS, as the driver calls them; and logits in 16 bits for comparison."""
    _, d, v = size
    cut = roofline.cut_for(size, "fused", gpu)
    hidden, lm_head, _, _ = (x.detach() for x in make_inputs(cut.block, d, v, DTYPE, device))
    rows, columns = block_of(cut.block, v, cut.chunk * pitch(v))
    logits = torch.empty((cut.chunk, pitch(v)), device=device)
    block = logits.view(-1)[: rows * columns].view(rows, columns)
    narrow = hidden.new_empty((cut.chunk, v))
    chunk, columns = hidden[: cut.chunk], min(columns, v)

    def to_16_bits() -> None:
        if device == "cuda":
            torch.mm(chunk, lm_head.T, out=narrow)
        else:
            narrow.copy_(chunk.float() @ lm_head.float().T)

    def timing(part: str, m: int, k: int, n: int, result: int, run: Callable[[], object]) -> Timing:
        return timing_of(part, run, 2 * m * k * n, 2 * (m * k + k * n) + result * m * n, gpu)

    return {
        "mm to 16 bits": timing("logits", cut.chunk, d, v, 2, to_16_bits),
        "mm to fp32": timing("logits", cut.chunk, d, v, 4, partial(product, chunk, lm_head.T, logits[:, :v])),
        "mm of a block of columns": timing(
            "counterfactual", rows, d, columns, 4,
            partial(product, hidden[:rows], lm_head[:columns].T, block[:, :columns]),
        ),
    }  # fmt: skip


def of_dz(size: Size, device: str, gpu: Gpu, rows: int) -> dict[str, Timing]:
    """Products with dz of so many tokens: dh; dW, written for the first time, and added to earlier blocks' dW."""
    _, d, v = size
    rows = rows if device == "cuda" else min(rows, size.n)
    dz, hidden = gradients(rows, v, device), torch.randn((rows, d), device=device).to(DTYPE)
    out, lm_head = torch.zeros((v, d), device=device), torch.randn((v, d), device=device).to(DTYPE)
    dh = torch.empty((rows, d), device=device)

    def timing(add: bool) -> Timing:
        run = partial(product, dz.T, hidden, out, add=add)
        return timing_of("dW", run, 2 * rows * d * v, 2 * rows * (v + d) + (1 + add) * 4 * d * v, gpu)

    flop, moved = 2 * rows * d * v, 2 * (rows + d) * v + 4 * rows * d
    return {
        f"dh of {rows}": timing_of("dh", partial(product, dz, lm_head, dh), flop, moved, gpu),
        f"dW of {rows}": timing(False), f"dW of {rows}, added": timing(True),
    }  # fmt: skip


def of_kernels(size: Size, device: str, gpu: Gpu) -> dict[str, Timing]:
    """Our own kernels, on one chunk or block."""
    _, d, v = size
    predicted: dict[str, float] = {}
    for way, passes, name in (("fused", 1, "row_loss"), ("stored", 1, "stored_rows")):
        cut = roofline.cut_for(size, way, gpu)
        rows = cut.chunk if way == "fused" else cut.block
        part = roofline.work(Size(rows, d, v), way, "trainable", cut, passes=passes, kept=gpu.kept(v))
        predicted[name] = part["rows"].bytes / (gpu.bandwidth * gpu.rows)
    cut = roofline.cut_for(size, "fused", gpu)
    high, wide = block_of(cut.block, v, cut.chunk * pitch(v))
    predicted["row_parts"] = 4 * high * wide / (gpu.bandwidth * gpu.rows)
    flop = 2 * roofline.cut_for(size, "stored", gpu).block * d * v
    predicted["lse_gemm"] = predicted["store_gemm"] = roofline.own_gemm_seconds(flop, gpu)
    found = {}
    for name, make in SUBJECTS.items():
        subject = make(*size, DTYPE, device)
        found[name] = Timing(subject.run, predicted[name], subject.setup)
    return found


def of_the_rest(size: Size, device: str, gpu: Gpu) -> dict[str, Timing]:
    """Combining the statistics of tiles into those of rows, and scaling gradients."""
    (_, d, v), rows = size, roofline.cut_for(size, "stored", gpu).block
    parts = TileStatistics.empty(v, STATISTICS_COLUMNS, rows, torch.device(device))
    parts.row_max.normal_(), parts.total.uniform_(1, 2)
    target = torch.zeros(rows, dtype=torch.int64, device=device)
    gradient = torch.zeros((v, d), device=device)
    upstream = torch.ones((), device=device)

    moved = 6 * d * v
    return {
        "combine": Timing(
            partial(combine, parts, target, -100), 8 * parts.row_max.numel() / (gpu.bandwidth * gpu.rows)
        ),
        "scaling of dW": Timing(
            partial(scale, gradient, upstream, DTYPE), moved / (gpu.bandwidth * roofline.SCALING), work=Work(0, moved),
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
    """Parts, grouped by the operands that they share."""
    return {
        "products": partial(of_a_block, size, device, gpu),
        **{f"dz of {rows}": partial(of_dz, size, device, gpu, rows) for rows in BLOCKS},
        "kernels": partial(of_kernels, size, device, gpu),
        "the rest": partial(of_the_rest, size, device, gpu),
    }


def parts(child: Child) -> None:
    """Ceilings, then every part at every size."""
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


def a_group(child: Child, place: str, group: str, make: Callable[[], dict[str, Timing]]) -> None:
    """Measures the parts of one group, which share their operands."""
    operands = f"{place}/operands of {group}"
    timings = child.prepared(operands, make)
    if timings is not None:
        for name, timing in timings.items():
            child.measured(f"{place}/{name}", lambda timing=timing: measured(child, timing))
        child.line(operands, parts=len(timings))


@torch.no_grad()
def logprobs(child: Child, size: Size) -> dict[str, Any]:
    """token_logprobs forward, and the cuBLAS products that it replaces, with logits written in the inputs' dtype."""
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
    """The loss and its backward with different budgets for dz and logits, which the driver turns into token counts."""
    device, stage = child.request.device, child.request.stage
    first, second, *others = child.request.sizes
    for size in (second, first, *others):  # the largest vocabulary needs large chunks most
        operands = f"{stage}/{size}/operands"
        inputs = child.prepared(operands, lambda size=size: make_inputs(*size, DTYPE, device))
        if inputs is None:
            continue
        cases = [(way, head, gib) for way in WAY_PEERS for head, several in BUDGETS.items() for gib in several]
        for way, head, gib in cases:
            if [size] == others[-1:] and gib in (1, 4):
                continue  # it takes long
            inputs[1].requires_grad_(head == "trainable")
            key = f"{stage}/{size}/{way}/{gib} GiB" + ", frozen head" * (head == "frozen")
            child.measured(key, partial(by_budget, child, size, inputs, way, gib))
            clear(inputs)
            child.clock.free()
        child.line(operands, ways=len(WAY_PEERS))


def by_budget(child: Child, size: Size, inputs: Inputs, way: str, gib: float) -> dict[str, Any]:
    run, shipped, wanted = WAY_PEERS[way].load().loss, cut.BUDGET, int(gib * 2**30)
    gpu = Gpu(multiprocessors=tiles.multiprocessors(inputs[0].device))
    cut.BUDGET = wanted
    try:
        seconds = [child.clock.seconds(lambda: step(run, inputs)) for _ in range(3)][1:]
    finally:
        cut.BUDGET = shipped
    block, chunk = roofline.cut_for(size, way, gpu, wanted)
    return {"seconds": min(seconds), "rows": block, "chunk": chunk, "shipped": wanted == shipped}


def profiles(child: Child) -> None:
    """Kernels of one step, after a warm-up step."""
    device, stage = child.request.device, child.request.stage
    for size in child.request.sizes:
        inputs = child.prepared(f"{stage}/{size}/operands", lambda size=size: make_inputs(*size, DTYPE, device))
        if inputs is None:
            continue
        for way, peer in WAY_PEERS.items():

            def profiled(peer: Peer = peer, inputs=inputs) -> dict[str, Any]:
                run = partial(step, peer.load().loss, inputs)
                run()
                return {"kernels": seconds_of_kernels(run)}

            child.measured(f"{stage}/{size}/{way}", profiled)
        child.line(f"{stage}/{size}/operands", ways=len(WAY_PEERS))
        child.clock.free()


def stage(child: Child) -> None:
    {"check": check, "parts": parts, "budgets": budgets, "profiles": profiles}[child.request.options["what"]](child)


if __name__ == "__main__":
    children.main(stage, __doc__)
