"""Predicts the op's cost on a GPU, by part: `python -m benchmarks.gpu.roofline [--tflops 740 --bandwidth 3.0e12 …]`.

The operations and bytes of each part are counted (a test compares them with the driver's products and kernels) and
converted to time by these rates:

    product     max(c, m) + o · min(c, m)    c = FLOP ÷ (rate · e), m = bytes ÷ bandwidth; o: share without overlap
    rows        bytes ÷ (bandwidth · .9)     the row kernels, and combining tiles' statistics into rows'; .78 on an
                                             H200, where instructions are the bound (not measured)
    scaling     bytes ÷ (bandwidth · .9)     multiplying by the upstream gradient and casting to the inputs' dtype
    own GEMM    FLOP ÷ (rate · gemm)         for logits that are kept in 16 bits or not at all

`rate` and `bandwidth` default to what an H100 sustains: 60 bf16 products of 8192³ in a row, during which it reaches its
power limit and slows down (a single one runs at 800 TFLOP/s), and a device-to-device copy. e, o and the shares were
chosen so that the prediction of the whole loss, by each way and with either head, is within a tenth of the measured
time. Floor: 8·N·D·V FLOP, 6·N·D·V with a frozen head, at `rate`.

The row kernel reads a row twice, the second time from its end, so what the L2 cache still holds from the first time
does not come from memory. For each row in flight (two programs per multiprocessor), this is assumed to be the row's
share of the cache; a cache that evicts the least recently used holds more (by a simulation in the tests). `--l2 0`
leaves this effect out.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from benchmarks.gpu.sizes import SIZES, Size
from perce_kernels.gpu.cut import Cut, block_of, cut_of
from perce_kernels.gpu.tiles import STATISTICS_COLUMNS, WAYS
from perce_kernels.product import pitch

HEADS = ("trainable", "frozen")
FLOOR_FLOP = {"trainable": 8, "frozen": 6}  # · N·D·V
OPERAND, FP32 = 2, 4  # bytes
PARTS = ("counterfactual", "logits", "rows", "dh", "dW", "scaling")
OURS = {"fused": (), "stored": ("counterfactual", "logits")}
"""Products that our own GEMM computes, by way."""


class Work(NamedTuple):
    """Operations and bytes of a part."""

    flop: float
    bytes: float


class Efficiency(NamedTuple):
    """Share of the matmul rate that a product reaches, and share of the smaller term that does not overlap."""

    rate: float
    overlap: float


PRODUCTS = {
    "counterfactual": Efficiency(1.0, 0.25), "logits": Efficiency(1.0, 0.25), "dh": Efficiency(1.02, 0.15),
    "dW": Efficiency(0.98, 0.35),
}  # fmt: skip
SCALING = 0.9  # of the bandwidth


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU: FLOP/s of a large bf16 product by cuBLAS, bytes/s of a copy, counting reads and writes."""

    flops: float = 740e12
    bandwidth: float = 2.99e12
    rows: float = 0.9
    """Share of the bandwidth that the row kernel reaches."""
    gemm: float = 0.97
    """Share of cuBLAS's rate that our GEMM reaches."""
    l2: float = 50e6
    """Bytes of the L2 cache."""
    multiprocessors: int = 132
    rows_in_flight: int = 2
    """Programs of the row kernel per multiprocessor, limited by the shared memory of its tile."""

    def kept(self, v: int) -> float:
        """Share of a row of so many fp32 logits that the cache holds until it is read again."""
        return min(1.0, self.l2 / (self.multiprocessors * self.rows_in_flight * v * FP32))


H100 = Gpu()
H200 = Gpu(bandwidth=4.3e12, rows=0.78)
"""Not measured: an H100's rate is assumed, because the power is the same; the bandwidth is that of a copy."""


def measured_gpu(matmul_flops: float, bandwidth: float, device: str = "") -> Gpu:
    """The GPU of this name with the measured ceilings; other rates are those assumed for an H200 or an H100."""
    return replace(H200 if "H200" in device else H100, flops=matmul_flops, bandwidth=bandwidth)


def pieces(n: int, size: int) -> list[int]:
    """n divided into pieces of at most `size`."""
    return [min(size, n - start) for start in range(0, n, size)]


def work(
    size: Size, way: str, head: str, cut: Cut, *, passes: int = 2, kept: float = 0.0
) -> dict[str, Work]:  # fmt: skip
    """FLOP and bytes of each part of the loss and its backward. kept: share of a row that is read once from memory.

    A product reads both factors and writes its result once; dW is written by the first block, and read and written by
    every later one. The rows' bytes are those of logits and gradients; the few numbers per token are not counted. No
    bytes are counted for our own GEMM, because its rate includes them.
    """
    n, d, v = size
    w, logits = d * v * OPERAND, n * v * FP32
    blocks = pieces(n, cut.block)
    chunks = sum(len(pieces(block, cut.chunk)) for block in blocks)
    read = 0.0  # bytes of both factors for the counterfactual logits, over all blocks
    for block in blocks:
        high, wide = block_of(block, v, min(cut.chunk, n) * pitch(v))
        read += len(pieces(block, high)) * w + len(pieces(v, wide)) * block * d * OPERAND
    by_cublas = {"counterfactual": logits + read, "logits": logits + chunks * w + n * d * OPERAND}
    names = PARTS[2 - passes : 2]
    tiles = n * -(-v // STATISTICS_COLUMNS) * FP32  # bytes of one of the two statistics of tiles
    row_bytes = 2 * tiles * len([name for name in names if name in OURS[way]])
    if way == "stored":
        row_bytes += n * v * 2 * OPERAND + tiles
    else:
        row_bytes += n * v * (FP32 * (2 - kept + (passes == 2)) + OPERAND)
    trained = n + v if head == "trainable" else n
    product = 2 * n * d * v
    parts = {
        name: Work(product, 0.0 if name in OURS[way] else by_cublas[name]) for name in names
    } | {
        "rows": Work(0, row_bytes),
        "dh": Work(product, n * v * OPERAND + len(blocks) * w + n * d * FP32),
        "dW": Work(product, n * v * OPERAND + n * d * OPERAND + (2 * len(blocks) - 1) * d * v * FP32),
        "scaling": Work(0, (FP32 + OPERAND) * d * trained),
    }  # fmt: skip
    return parts if head == "trainable" else {name: part for name, part in parts.items() if name != "dW"}


def product_seconds(part: str, work: Work, gpu: Gpu) -> float:
    """Seconds of one or several products by cuBLAS."""
    efficiency = PRODUCTS[part]
    compute, memory = work.flop / (gpu.flops * efficiency.rate), work.bytes / gpu.bandwidth
    return max(compute, memory) + efficiency.overlap * min(compute, memory)


def cut_for(size: Size, way: str, gpu: Gpu, budget: int | None = None) -> Cut:
    """Tokens per block and chunk, as the driver chooses them; budget: bytes for both."""
    cut = cut_of(*size, OPERAND, way, gpu.multiprocessors, budget)
    return Cut(min(cut.block, size.n), min(cut.chunk, size.n))


def predict(
    size: Size, way: str = "fused", head: str = "trainable", gpu: Gpu = H100, budget: int | None = None
) -> dict[str, float]:
    """Seconds of each part."""
    cut = cut_for(size, way, gpu, budget)
    seconds = {}
    for name, part in work(size, way, head, cut, kept=gpu.kept(size.v)).items():
        if name == "rows":
            seconds[name] = part.bytes / (gpu.bandwidth * gpu.rows)
        elif name == "scaling":
            seconds[name] = part.bytes / (gpu.bandwidth * SCALING)
        elif name in OURS[way]:
            seconds[name] = own_gemm_seconds(part.flop, gpu)
        else:
            seconds[name] = product_seconds(name, part, gpu)
    return seconds


def own_gemm_seconds(flop: float, gpu: Gpu) -> float:
    """Seconds of our GEMM."""
    return flop / (gpu.flops * gpu.gemm)


def floor_seconds(size: Size, head: str, gpu: Gpu) -> float:
    return FLOOR_FLOP[head] * size.n * size.d * size.v / gpu.flops


def break_even(size: Size, way: str, head: str, gpu: Gpu) -> float:
    """FLOP/s that our GEMM must reach for a way that uses it to be faster than "fused", which uses cuBLAS."""
    fused, other = predict(size, "fused", head, gpu), predict(size, way, head, gpu)
    gemm = own_gemm_seconds(len(OURS[way]) * 2.0 * size.n * size.d * size.v, gpu)
    left = sum(fused.values()) - (sum(other.values()) - gemm)
    return gemm * gpu.flops * gpu.gemm / left


def table(gpu: Gpu, budget: int | None = None) -> Iterator[str]:
    """Milliseconds of each part, as Markdown."""
    yield f"| N × D × V | head | way | tokens per block, chunk | {' | '.join(PARTS)} | total, ms | ÷ floor |"
    yield "| --- " * (len(PARTS) + 6) + "|"
    for size in SIZES:
        for head in HEADS:
            floor = floor_seconds(size, head, gpu)
            for way in WAYS:
                parts = predict(size, way, head, gpu, budget)
                cells = [f"{1000 * parts[name]:.1f}" if name in parts else "–" for name in PARTS]
                total, cut = sum(parts.values()), cut_for(size, way, gpu, budget)
                cells += [f"{1000 * total:.1f}", f"{total / floor:.2f}"]
                place = f"{size.n} × {size.d} × {size.v} | {head} | {way} | {cut.block}, {cut.chunk}"
                yield f"| {place} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--tflops", type=float, default=H100.flops / 1e12, help="rate of a large product (default %(default)s)"
    )
    parser.add_argument("--bandwidth", type=float, default=H100.bandwidth, help="bytes/s (default %(default).1e)")
    parser.add_argument(
        "--rows", type=float, default=H100.rows, help="row kernel's share of that (default %(default)s)"
    )
    parser.add_argument(
        "--gemm", type=float, default=H100.gemm, help="our GEMM's rate ÷ cuBLAS's (default %(default)s)"
    )
    parser.add_argument("--l2", type=float, default=H100.l2, help="bytes of the L2 cache (default %(default).1e)")
    parser.add_argument("--budget", type=float, help="GiB for a block's dz and a chunk's logits (default: 2)")
    options = parser.parse_args(arguments)
    for name in ("tflops", "bandwidth", "rows", "gemm"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name}: expected a number > 0, got {getattr(options, name)}")
    gpu = Gpu(options.tflops * 1e12, options.bandwidth, options.rows, options.gemm, options.l2)
    budget = None if options.budget is None else int(options.budget * 2**30)
    print("Predicted, not measured: milliseconds of the loss and its backward, bf16.\n")
    print(*table(gpu, budget), *(f"\n{way}: {title}" for way, title in WAYS.items()), sep="\n")
    rates = ", ".join(f"{break_even(size, 'stored', 'trainable', gpu) / 1e12:.0f}" for size in SIZES)
    print(f"\nstored: faster than fused if our GEMM reaches {rates} TFLOP/s (trainable head, one number per size).")


if __name__ == "__main__":
    main()
