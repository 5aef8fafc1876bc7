"""Block sizes of one kernel on this GPU: `python -m benchmarks.tile_search KERNEL N D V [--dtype bfloat16]`.

    row_loss, lse_gemm         the way in use, and log-probabilities without logits
    store_gemm, stored_rows    the way that keeps 16-bit logits; both must be tuned before it is judged

Every candidate is compared with the shipped tile's result and then timed, the shipped tile in turn with it; the last
line is a row for TABLE in perce_kernels/gpu/tiles.py. A candidate that does not compile, or needs more shared memory
than there is, is counted and passed over. `--budget` seconds end the search; the order is random, so that a search cut
short has seen a sample of everything.
"""

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.clock import HostClock, clock_of
from benchmarks.implementations import make_inputs
from perce_kernels import ops
from perce_kernels.gpu import driver, lse_gemm, row_loss, steps, stored_rows, tiles
from perce_kernels.gpu.tiles import Row, Tile

TOLERANCE = 1e-4  # of statistics; another order of the sums moves them by some 1e-6
DZ_TOLERANCE = 2**-5  # of weights up to 5, in bf16: an ulp
PROBABILITY_TOLERANCE = 2**-8
ROUNDS = 7


class Subject(NamedTuple):
    """One kernel with its operands."""

    run: Callable[[], object]
    setup: Callable[[], object] | None  # before each run, untimed
    result: Callable[[], list[Tensor]]  # of the last run
    tolerances: list[float]  # of each


class Timed(NamedTuple):
    """What was found for a tile."""

    tile: Tile
    seconds: float
    ratio: float  # to the shipped tile, timed in turn


@contextmanager
def shipping(kernel: str, arch: str, dtype: torch.dtype, tile: Tile) -> Iterator[None]:
    """The table with this tile in the first place."""
    before = tiles.TABLE
    tiles.TABLE = (Row(kernel, arch, (dtype,), None, tile), *before)
    try:
        yield
    finally:
        tiles.TABLE = before


def row_loss_subject(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> Subject:
    """A chunk of the size that the driver would take of n tokens; its logits are restored before each run."""
    torch_device = torch.device(device)
    rows = min(n, driver.chunk_rows(d, v, 2, driver._multiprocessors(torch_device)))
    g = torch.Generator(device).manual_seed(0)
    raw = torch.randn(2 * rows, driver.pitch(v), generator=g, device=device).mul_(3)
    z = torch.empty_like(raw)
    target = torch.randint(0, v, (rows,), generator=g, device=device)
    statistics = [raw.new_empty(rows) for _ in range(3)]
    dz = row_loss.overlay(z[:rows], v, dtype)

    def run() -> None:
        row_loss.row_loss(
            z[:rows], z[rows:], target, None, None, None, dz, *statistics, v=v, source="hidden_cf", clip_min=0.8,
            clip_max=5.0,
        )  # fmt: skip

    return Subject(run, lambda: z.copy_(raw), lambda: [*statistics, dz.float()], [TOLERANCE] * 3 + [DZ_TOLERANCE])


def lse_gemm_subject(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> Subject:
    hidden, lm_head, target, _ = (x.detach() for x in make_inputs(n, d, v, dtype, device))
    last: list[Tensor] = []

    def run() -> None:
        last[:] = [lse_gemm.logprobs(hidden, lm_head, target, None)[0]]

    return Subject(run, None, lambda: last, [TOLERANCE])


class Stored(NamedTuple):
    """A chunk for the way that keeps 16-bit logits: operands of both passes, targets of one."""

    operands: Tensor  # (2C, D)
    lm_head: Tensor  # (V, D)
    target: Tensor  # (C,)
    logits: Tensor  # (C, pitch)

    @classmethod
    def of(cls, n: int, d: int, v: int, dtype: torch.dtype, device: str) -> "Stored":
        rows = min(n, driver.chunk_rows(d, v, 2, driver._multiprocessors(torch.device(device))))
        hidden, lm_head, target, hidden_cf = (x.detach() for x in make_inputs(rows, d, v, dtype, device))
        return cls(torch.cat([hidden, hidden_cf]), lm_head, target, lm_head.new_empty(rows, steps.pitch(v)))

    def statistics(self) -> lse_gemm.Statistics:
        return lse_gemm.statistics(self.operands, self.lm_head, self.target.repeat(2), None, stored=self.logits)


def store_gemm_subject(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> Subject:
    """Statistics, and the probabilities that the stored logits stand for: these depend on the width of a tile."""
    chunk, rows = Stored.of(n, d, v, dtype, device), []

    def result() -> list[Tensor]:
        (last,) = rows
        count = chunk.target.shape[0]
        tile_max = last.tile_max[:, :count].repeat_interleave(last.tile_columns, 0)[:v].T
        return [last.logp, (chunk.logits[:, :v].float() + tile_max - last.row_max[:count, None]).exp()]

    def run() -> None:
        rows[:] = [chunk.statistics()]

    return Subject(run, None, result, [TOLERANCE, PROBABILITY_TOLERANCE])


def stored_rows_subject(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> Subject:
    chunk = Stored.of(n, d, v, dtype, device)
    rows, kept = chunk.statistics(), chunk.logits.clone()
    count = chunk.target.shape[0]
    logp, weight = rows.logp[:count].contiguous(), torch.ones(count, device=device)

    def run() -> None:
        stored_rows.stored_gradient(chunk.logits, rows, chunk.target, logp, weight, None, v=v)

    return Subject(run, lambda: chunk.logits.copy_(kept), lambda: [chunk.logits[:, :v].float()], [DZ_TOLERANCE])


SUBJECTS = {
    "row_loss": row_loss_subject, "lse_gemm": lse_gemm_subject, "store_gemm": store_gemm_subject,
    "stored_rows": stored_rows_subject,
}  # fmt: skip
ROW_KERNELS = ("row_loss", "stored_rows")  # one program a row of logits, whatever D is


def candidates(kernel: str, arch: str, dtype: torch.dtype) -> list[Tile]:
    """All combinations whose operands fit into shared memory."""
    if arch == tiles.INTERPRETER:  # a tiny grid, for the tests
        sizes = [(1, n, 0) for n in (64, 128)] if kernel in ROW_KERNELS else [(m, 32, 16) for m in (16, 32)]
        return [Tile(*size, 1, 1) for size in sizes]
    if kernel in ROW_KERNELS:
        grid = itertools.product((1024, 2048, 4096, 8192), (4, 8, 16, 32), (1, 2, 3, 4))
        return [Tile(1, block_n, 0, warps, stages) for block_n, warps, stages in grid]
    descriptors = (True, False) if arch in ("sm_90", "sm_100") and dtype != torch.float32 else (False,)
    grid = itertools.product((64, 128, 256), (64, 128, 256), (16, 32, 64, 128), (4, 8), (2, 3, 4, 5), descriptors)
    limit = tiles.SHARED_MEMORY_LIMIT[arch]
    return [
        Tile(m, n, k, warps, stages, tma)
        for m, n, k, warps, stages, tma in grid
        if (m + n) * k * dtype.itemsize * stages <= limit and m * n <= 128 * 256
    ]


def seconds_of(subject: Subject, clock: HostClock) -> float:
    return clock.seconds(subject.run, subject.setup)


def compare(subject: Subject, clock: HostClock, expected: list[Tensor]) -> float:
    """Largest difference from the shipped tile's result, in tolerances; a NaN gives a NaN."""
    seconds_of(subject, clock)
    results = zip(subject.result(), expected, subject.tolerances, strict=True)
    return float(torch.stack([(a - b).abs().max() / tolerance for a, b, tolerance in results]).max())


def search(
    kernel: str, n: int, d: int, v: int, dtype: torch.dtype, device: str, *, budget: float, say: Callable = print
) -> list[Timed]:
    """Tiles that give the shipped tile's result, the fastest first; the shipped tile is among them."""
    arch, clock, until = tiles.architecture(torch.device(device)), clock_of(device), time.monotonic() + budget
    subject = SUBJECTS[kernel](n, d, v, dtype, device)
    looked_up = torch.float32 if kernel == "row_loss" else dtype  # row_loss is looked up by its logits
    shipped = tiles.find(kernel, arch, looked_up, d)
    seconds_of(subject, clock)
    expected = [x.clone() for x in subject.result()]
    found, passed_over = [Timed(shipped, median(seconds_of(subject, clock) for _ in range(ROUNDS)), 1.0)], 0
    grid = [tile for tile in candidates(kernel, arch, dtype) if tile != shipped]
    random.Random(0).shuffle(grid)
    for index, tile in enumerate(grid):
        if time.monotonic() > until:
            say(f"out of time: {len(grid) - index} of {len(grid)} candidates were not tried")
            break
        try:
            with shipping(kernel, arch, looked_up, tile):
                difference = compare(subject, clock, expected)
        except Exception as error:  # the compiler's, of many kinds
            passed_over += 1
            if not clock.is_alive():
                say(f"{tuple(tile)} lost the device: {error}")
                break
            continue
        if not difference <= 1:
            say(f"{tuple(tile)} is wrong, by {difference:.2g} times what is allowed")
            continue
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(ROUNDS):
            times[True].append(seconds_of(subject, clock))
            with shipping(kernel, arch, looked_up, tile):
                times[False].append(seconds_of(subject, clock))
        found.append(Timed(tile, median(times[False]), median(times[False]) / median(times[True])))
        if found[-1].ratio < min(timed.ratio for timed in found[:-1]):
            say(f"{tuple(tile)}: {1000 * found[-1].seconds:.3f} ms, {found[-1].ratio:.3f} of the shipped tile")
    say(f"{len(found)} tiles right, {passed_over} that do not compile or do not fit")
    return sorted(found, key=lambda timed: timed.ratio)


def row_of(kernel: str, arch: str, dtype: torch.dtype, n: int, d: int, v: int, best: Timed) -> str:
    """A line of tiles.TABLE; of the kernel that knows D, for D up to this one."""
    dtypes = "HALF + FULL" if kernel == "row_loss" else "FULL" if dtype == torch.float32 else "HALF"
    unused = ", False" if kernel == "store_gemm" else ""  # whether this way is the faster is another question
    tma = ", True" if best.tile.use_tma else ""
    numbers = ", ".join(map(str, best.tile[:5]))
    d_max = None if kernel in ROW_KERNELS else d
    return (
        f'    Row("{kernel}", "{arch}", {dtypes}, {d_max}, Tile({numbers}{tma}){unused}),'
        f"  # {1000 * best.seconds:.2f} ms at {n} × {d} × {v}, {1 / best.ratio:.2f} × the speed before"
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=SUBJECTS)
    for name in ("n", "d", "v"):
        parser.add_argument(name, type=int)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds (default 300)")
    parser.add_argument("--show", type=int, default=5, help="tiles to list (default 5)")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if needed := ops.triton_needs(torch.device(device)):
        sys.exit(f"benchmarks.tile_search: expected {needed}")
    if options.kernel.startswith("store") and options.dtype == "float32":
        sys.exit(f"benchmarks.tile_search: {options.kernel} keeps 16-bit logits; expected --dtype bfloat16 or float16")
    size, dtype = (options.n, options.d, options.v), getattr(torch, options.dtype)
    found = search(options.kernel, *size, dtype, device, budget=options.budget)
    for timed in found[: options.show]:
        print(f"{tuple(timed.tile)}: {1000 * timed.seconds:.3f} ms, {timed.ratio:.3f} of the shipped tile")
    print(row_of(options.kernel, tiles.architecture(torch.device(device)), dtype, *size, found[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
