"""Times block sizes of each kernel on this GPU: `python -m benchmarks.gpu.tiles KERNEL N D V [--dtype bfloat16]`.

    row_loss, row_parts        the factual rows of way "fused", and a block of its counterfactual ones
    lse_gemm                   log-probabilities without logits: token_logprobs, and counterfactual rows of other ways
    store_gemm, stored_rows    the factual rows of way "stored", which keeps 16-bit logits

Each kernel has about ten tiles with names such as 128x256x64-w8-s3-g8-tma-p (rows × columns × depth, warps, stages,
group_m, by descriptors, persistent). Each tile's result is compared with that of the tile in use; then both are timed
in turn, on the rows of one chunk or block. The last line is a row for TABLE in perce_kernels/gpu/tiles.py. For a tile
that does not compile, or needs too much shared memory, a line gives the reason.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import child as children
from benchmarks.gpu.child import Child, Unable
from benchmarks.gpu.clock import clock_of
from benchmarks.gpu.sizes import Size
from benchmarks.implementations import make_inputs
from perce_kernels import backends
from perce_kernels.gpu import lse_gemm, row_halves, row_loss, stored_rows, tiles
from perce_kernels.gpu.combine import Statistics
from perce_kernels.gpu.cut import Cut, block_of, cut_of
from perce_kernels.gpu.tiles import Row, Tile
from perce_kernels.product import pitch

TOLERANCE = 1e-4  # for statistics; another order of summation changes them by some 1e-6
DZ_TOLERANCE = 2**-5  # one ulp in bf16, for weights up to 5
PROBABILITY_TOLERANCE = 2**-8


class Subject(NamedTuple):
    """One kernel with its operands."""

    run: Callable[[], object]
    setup: Callable[[], object] | None  # before each run, untimed
    result: Callable[[], list[Tensor]]  # of the last run
    tolerances: list[float]  # one per tensor of the result


@contextmanager
def shipping(kernel: str, arch: str, dtype: torch.dtype, tile: Tile) -> Iterator[None]:
    """Puts this tile first in the table while the context is open."""
    before = tiles.TABLE
    tiles.TABLE = (Row(kernel, arch, (dtype,), tile), *before)
    try:
        yield
    finally:
        tiles.TABLE = before


def cut_for(n: int, d: int, v: int, dtype: torch.dtype, device: str, way: str) -> Cut:
    """Tokens per block and chunk, as the driver would choose them for n tokens."""
    cut = cut_of(n, d, v, dtype.itemsize, way, tiles.multiprocessors(torch.device(device)))
    return Cut(min(n, cut.block), min(n, cut.chunk))


def random_logits(rows: int, v: int, device: str) -> tuple[Tensor, Tensor]:
    """Raw products (rows, pitch) and targets (rows,)."""
    g = torch.Generator(device).manual_seed(0)
    raw = torch.randn(rows, pitch(v), generator=g, device=device).mul_(3)
    return raw, torch.randint(0, v, (rows,), generator=g, device=device)


def row_loss_subject(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> Subject:
    """A chunk of factual rows."""
    z, target = random_logits(cut_for(n, d, v, dtype, device, "fused").chunk, v, device)
    statistics = [z.new_empty(len(z)) for _ in range(3)]
    dz, logp_cf = torch.empty_like(z, dtype=dtype), torch.full_like(statistics[0], -3.0)

    def run() -> None:
        row_loss.row_loss(
            z, target, logp_cf, None, None, dz, *statistics, v=v, source="logp_cf", clip_min=0.8, clip_max=5.0
        )

    return Subject(run, None, lambda: [*statistics, dz[:, :v].float()], [TOLERANCE] * 3 + [DZ_TOLERANCE])


def row_parts_subject(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> Subject:
    """A block of columns of counterfactual rows."""
    cut = cut_for(n, d, v, dtype, device, "fused")
    rows, columns = block_of(cut.block, v, cut.chunk * pitch(v))
    z, target = random_logits(rows, columns, device)
    parts = [z.new_empty(rows) for _ in range(3)]

    def run() -> None:
        row_halves.row_parts(z, target, None, *parts, v=columns)

    return Subject(run, None, lambda: [parts[0], parts[1].log(), parts[2]], [TOLERANCE] * 3)


class Stored(NamedTuple):
    """A block of tokens for way "stored", which keeps 16-bit logits."""

    hidden: Tensor  # (K, D)
    lm_head: Tensor  # (V, D)
    target: Tensor  # (K,)
    logits: Tensor  # (K, pitch)

    @classmethod
    def of(cls, n: int, d: int, v: int, dtype: torch.dtype, device: str) -> "Stored":
        rows = cut_for(n, d, v, dtype, device, "stored").block
        hidden, lm_head, target, _ = (x.detach() for x in make_inputs(rows, d, v, dtype, device))
        return cls(hidden, lm_head, target, lm_head.new_empty(rows, pitch(v)))

    def statistics(self) -> Statistics:
        return lse_gemm.statistics(self.hidden, self.lm_head, self.target, None, stored=self.logits)


def lse_gemm_subject(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> Subject:
    block = Stored.of(n, d, v, dtype, device)
    last: list[Tensor] = []

    def run() -> None:
        last[:] = [lse_gemm.logprobs(block.hidden, block.lm_head, block.target, None)[0]]

    return Subject(run, None, lambda: last, [TOLERANCE])


def store_gemm_subject(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> Subject:
    """Compares statistics, and probabilities by the stored logits, whose offsets depend on a tile's width."""
    block, rows = Stored.of(n, d, v, dtype, device), []

    def result() -> list[Tensor]:
        (last,) = rows
        tile_max = last.tile_max.repeat_interleave(last.columns, 0)[:v].T
        return [last.logp, (block.logits[:, :v].float() + tile_max - last.row_max[:, None]).exp()]

    def run() -> None:
        rows[:] = [block.statistics()]

    return Subject(run, None, result, [TOLERANCE, PROBABILITY_TOLERANCE])


def stored_rows_subject(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> Subject:
    block = Stored.of(n, d, v, dtype, device)
    rows, kept = block.statistics(), block.logits.clone()
    weight = torch.ones_like(rows.logp)

    def run() -> None:
        stored_rows.stored_gradient(block.logits, rows, block.target, rows.logp, weight, None, v=v)

    return Subject(run, lambda: block.logits.copy_(kept), lambda: [block.logits[:, :v].float()], [DZ_TOLERANCE])


SUBJECTS = {
    "row_loss": row_loss_subject, "row_parts": row_parts_subject, "lse_gemm": lse_gemm_subject,
    "store_gemm": store_gemm_subject, "stored_rows": stored_rows_subject,
}  # fmt: skip
TABLED = {"row_loss": "rows", "row_parts": "rows"}  # kernels that have another name in the table
FP32_ROWS = ("row_loss", "row_parts")  # looked up by the dtype of their logits
ROW_KERNELS = (*FP32_ROWS, "stored_rows")  # one program per row of logits; they do not depend on D
ROW_TILES = tuple(
    Tile(1, columns, 0, warps, stages)
    for columns, warps, stages in (
        (4096, 16, 6), (4096, 16, 9), (4096, 16, 3), (4096, 16, 1), (4096, 8, 3), (2048, 8, 3), (2048, 8, 6),
        (2048, 8, 1), (2048, 4, 3), (1024, 4, 4),
    )
)  # fmt: skip
GEMM_TILES = tuple(
    Tile(m, n, k, warps, stages, group_m=group, persistent=persistent)
    for m, n, k, warps, stages, group, persistent in (
        (128, 256, 64, 8, 3, 8, True), (128, 256, 64, 8, 4, 8, True), (128, 256, 64, 8, 3, 16, True),
        (128, 256, 64, 8, 4, 16, True), (128, 256, 64, 8, 3, 32, True), (128, 256, 32, 8, 6, 16, True),
        (128, 256, 128, 8, 2, 16, True), (256, 128, 64, 8, 3, 16, True), (128, 128, 64, 8, 3, 16, True),
        (256, 128, 64, 8, 3, 8, False), (128, 256, 64, 8, 3, 8, False),
    )
)  # fmt: skip
TINY_TILES = {True: (Tile(1, 64, 0, 1, 1), Tile(1, 128, 0, 1, 1)),
              False: (Tile(16, 32, 16, 1, 1), Tile(32, 32, 16, 1, 1, group_m=2, persistent=True))}  # fmt: skip
"""Tiles for the interpreter, by whether the kernel is in ROW_KERNELS."""


def named(tile: Tile) -> str:
    sizes = "x".join(str(size) for size in tile[:3] if size > 1)
    group = f"-g{tile.group_m}" if tile.block_k else ""
    forms = "-tma" * tile.use_tma + "-p" * tile.persistent
    return f"{sizes}-w{tile.num_warps}-s{tile.num_stages}{group}{forms}"


def candidates(kernel: str, arch: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The tiles of a kernel, which read operands as the tile in use does; that one comes first."""
    shipped = tiles.find(TABLED.get(kernel, kernel), arch, torch.float32 if kernel in FP32_ROWS else dtype)
    if arch == tiles.INTERPRETER:
        found = TINY_TILES[kernel in ROW_KERNELS]
    else:
        found = ROW_TILES if kernel in ROW_KERNELS else GEMM_TILES
    found = tuple(tile._replace(use_tma=shipped.use_tma) for tile in found)
    return (shipped, *(tile for tile in found if tile != shipped))


class Contest:
    """Compares tiles of one kernel at one size with the tile in use."""

    def __init__(self, kernel: str, size: Size, dtype: torch.dtype, device: str):
        self.kernel, self.size, self.dtype, self.clock = kernel, size, dtype, clock_of(device)
        self.arch = tiles.architecture(torch.device(device))
        self.looked_up = torch.float32 if kernel in FP32_ROWS else dtype
        self.subject = SUBJECTS[kernel](*size, dtype, device)
        self.seconds()
        self.expected = [x.clone() for x in self.subject.result()]

    def seconds(self) -> float:
        return self.clock.seconds(self.subject.run, self.subject.setup)

    def shipping(self, tile: Tile):
        return shipping(TABLED.get(self.kernel, self.kernel), self.arch, self.looked_up, tile)

    def difference(self, tile: Tile) -> float:
        """Largest difference from the result of the tile in use, divided by the tolerance; NaN if there is one."""
        with self.shipping(tile):
            self.seconds()
        results = zip(self.subject.result(), self.expected, self.subject.tolerances, strict=True)
        return float(torch.stack([(a - b).abs().max() / tolerance for a, b, tolerance in results]).max())

    def measure(self, tile: Tile, rounds: int = 7) -> dict[str, float]:
        """Seconds, and the ratio to the tile in use, timed in turn with it. Unable if the results differ."""
        difference = self.difference(tile)
        if not difference <= 1:
            raise Unable(f"wrong, by {difference:.2g} times the tolerance")
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(rounds):
            times[True].append(self.seconds())
            with self.shipping(tile):
                times[False].append(self.seconds())
        return {"seconds": median(times[False]), "ratio": median(times[False]) / median(times[True])}


def stage(child: Child) -> None:
    """Measures all tiles of every kernel at the first sizes. Options: kernels, sizes (how many)."""
    options, device = child.request.options, child.request.device
    dtype = torch.bfloat16
    arch = tiles.architecture(torch.device(device))
    for kernel in options["kernels"]:
        for size in child.request.sizes[: options["sizes"]]:
            keys = {f"{child.request.stage}/{kernel}/{size}/{named(tile)}": tile
                    for tile in candidates(kernel, arch, dtype)}  # fmt: skip
            operands = f"{child.request.stage}/{kernel}/{size}/operands"
            contest = child.prepared(operands, partial(Contest, kernel, size, dtype, device))
            if contest is None:
                continue
            for key, tile in keys.items():
                child.measured(key, lambda tile=tile, contest=contest: contest.measure(tile))
            del contest
            child.clock.free()
            child.line(operands, tiles=len(keys))


def row_of(kernel: str, arch: str, dtype: torch.dtype, size: Size, tile: Tile, found: dict[str, float]) -> str:
    """A line of tiles.TABLE."""
    dtypes = "FULL" if kernel in FP32_ROWS else "HALF"
    numbers = ", ".join(map(str, tile[:5])) + (", True" if tile.use_tma else "")
    group = "" if tile.group_m == Tile._field_defaults["group_m"] else f", group_m={tile.group_m}"
    group += ", persistent=True" if tile.persistent else ""
    return (
        f'    Row("{TABLED.get(kernel, kernel)}", "{arch}", {dtypes}, Tile({numbers}{group})),'
        f"  # {1000 * found['seconds']:.2f} ms at {size}, {1 / found['ratio']:.2f} × the speed before"
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=SUBJECTS)
    for name in ("n", "d", "v"):
        parser.add_argument(name, type=int)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if needed := backends.triton_lacks(torch.device(device)):
        sys.exit(f"benchmarks.gpu.tiles: expected {needed}")
    size, dtype = Size(options.n, options.d, options.v), getattr(torch, options.dtype)
    contest = Contest(options.kernel, size, dtype, device)
    found: dict[Tile, dict[str, float]] = {}
    for tile in candidates(options.kernel, contest.arch, dtype):
        try:
            found[tile] = contest.measure(tile)
        except Exception as error:  # compilers raise errors of many kinds
            print(f"{named(tile)}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            if not contest.clock.is_alive():
                sys.exit("the device is lost")
            continue
        print(f"{named(tile)}: {1000 * found[tile]['seconds']:.3f} ms, {found[tile]['ratio']:.3f} of the tile in use")
    best = min(found, key=lambda tile: found[tile]["ratio"])
    print(row_of(options.kernel, contest.arch, dtype, size, best, found[best]))


if __name__ == "__main__":
    if children.is_asked():
        children.main(stage, __doc__)
    else:
        main(sys.argv[1:])
