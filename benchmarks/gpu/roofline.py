"""What the op should cost on a GPU, by part: `python -m benchmarks.gpu.roofline [--tflops 798 --bandwidth 3.0e12 …]`.

The operations and bytes of each part are counted (a test holds them to what the driver's products and kernels do), and
turned into time by rates:

    product     max(c, m) + o · min(c, m)    c = FLOP ÷ (rate · e), m = bytes ÷ bandwidth; o: what does not overlap
    rows        bytes ÷ (bandwidth · .88)    the row kernel; .78 on an H200, where instructions are the bound
    scaling     bytes ÷ (bandwidth · .9)     the upstream gradient on the way to the inputs' dtype
    own GEMM    FLOP ÷ (rate · gemm) + combine · chunks, where logits are kept in 16 bits or not at all

e and o are guesses that the first measurement replaces; `rate` and `bandwidth` default to what was read off an H100 (a
bf16 product of 8192³, a device-to-device copy). Floor: 8·N·D·V FLOP, 6 with a frozen head, at `rate`.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from benchmarks.gpu.sizes import SIZES, Size

WAYS = {"fused": "fp32 logits by cuBLAS", "stored": "16-bit logits by our GEMM"}
"""steps.FusedRows and steps.StoredLogits."""
HEADS = ("trainable", "frozen")
FLOOR_FLOP = {"trainable": 8, "frozen": 6}  # · N·D·V
STORED_TILE = 128
"""Columns of a tile of the GEMM that stores 16-bit logits: each has a maximum, which the row kernel reads."""
OPERAND, FP32 = 2, 4  # bytes


class Work(NamedTuple):
    """What a part must do."""

    flop: float
    bytes: float


class Efficiency(NamedTuple):
    """Share of the matmul rate that a product reaches, and share of the smaller term that does not overlap."""

    rate: float
    overlap: float


PRODUCTS = {"logits": Efficiency(0.96, 0.35), "dh": Efficiency(0.94, 0.15), "dW": Efficiency(0.93, 0.35)}
SCALING = 0.9  # of the bandwidth


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU: FLOP/s of a large bf16 product by cuBLAS, bytes/s of a copy, read and written ones counted."""

    flops: float = 798e12
    bandwidth: float = 3.0e12
    rows: float = 0.88
    """Of the bandwidth, that the row kernel reaches."""
    gemm: float = 0.7
    """Of the rate of cuBLAS, that our GEMM reaches."""
    combine: float = 0.2e-3
    """Seconds that a chunk's tile statistics take to become a row's."""
    multiprocessors: int = 132


H100 = Gpu()
H200 = Gpu(flops=788e12, bandwidth=4.3e12, rows=0.78)


def measured_gpu(matmul_flops: float, bandwidth: float, device: str = "") -> Gpu:
    """The GPU of this name at the ceilings that were measured; what was not is guessed as for an H200 or an H100."""
    return replace(H200 if "H200" in device else H100, flops=matmul_flops, bandwidth=bandwidth)


def work(
    size: Size, way: str, head: str, chunk: int, passes: int = 2, stored_tile: int = STORED_TILE
) -> dict[str, Work]:
    """FLOP and bytes of each part of the loss and its backward, in chunks of `chunk` tokens.

    A product reads both factors and writes its result once; dW is written by the first chunk, and read and written by
    every later one. The rows' bytes are those of logits and gradients; a token's own few numbers are not counted.
    """
    n, d, v = size
    chunks = -(-n // chunk)
    head_bytes = chunks * d * v * OPERAND
    rows_bytes = {
        "fused": n * v * (FP32 * (passes + 1) + OPERAND),
        "stored": n * v * 2 * OPERAND + n * -(-v // stored_tile) * FP32,
    }
    logits_bytes = {"fused": passes * n * v * FP32, "stored": n * v * OPERAND}
    trained = n + v if head == "trainable" else n
    parts = {
        "logits": Work(2 * passes * n * d * v, logits_bytes[way] + head_bytes + passes * n * d * OPERAND),
        "rows": Work(0, rows_bytes[way]),
        "dh": Work(2 * n * d * v, n * v * OPERAND + head_bytes + n * d * FP32),
        "dW": Work(2 * n * d * v, n * v * OPERAND + n * d * OPERAND + (2 * chunks - 1) * d * v * FP32),
        "scaling": Work(0, (FP32 + OPERAND) * d * trained),
    }
    return parts if head == "trainable" else {name: part for name, part in parts.items() if name != "dW"}


def product_seconds(part: str, work: Work, gpu: Gpu) -> float:
    """Of one of cuBLAS's products, or of several."""
    efficiency = PRODUCTS[part]
    compute, memory = work.flop / (gpu.flops * efficiency.rate), work.bytes / gpu.bandwidth
    return max(compute, memory) + efficiency.overlap * min(compute, memory)


def chunk_of(size: Size, gpu: Gpu, budget: int | None = None) -> int:
    """Tokens a chunk, as the driver cuts them; budget: bytes of its fp32 logits."""
    from perce_kernels.gpu.driver import chunk_rows  # here: tables of a CPU are printed where there is no Triton

    return min(size.n, chunk_rows(size.d, size.v, 2, gpu.multiprocessors, budget))


def predict(
    size: Size, way: str = "fused", head: str = "trainable", gpu: Gpu = H100, budget: int | None = None
) -> dict[str, float]:
    """Seconds of each part."""
    chunk = chunk_of(size, gpu, budget)
    seconds = {}
    for name, part in work(size, way, head, chunk).items():
        if name == "rows":
            seconds[name] = part.bytes / (gpu.bandwidth * gpu.rows)
        elif name == "scaling":
            seconds[name] = part.bytes / (gpu.bandwidth * SCALING)
        elif name == "logits" and way == "stored":
            seconds[name] = own_gemm_seconds(part.flop, gpu) + gpu.combine * -(-size.n // chunk)
        else:
            seconds[name] = product_seconds(name, part, gpu)
    return seconds


def own_gemm_seconds(flop: float, gpu: Gpu) -> float:
    """Of our GEMM, without the combination of its tiles' statistics."""
    return flop / (gpu.flops * gpu.gemm)


def floor_seconds(size: Size, head: str, gpu: Gpu) -> float:
    return FLOOR_FLOP[head] * size.n * size.d * size.v / gpu.flops


def break_even(size: Size, head: str, gpu: Gpu) -> float:
    """FLOP/s of our GEMM from which 16-bit logits are the faster way."""
    fused, stored = predict(size, "fused", head, gpu), predict(size, "stored", head, gpu)
    gemm = own_gemm_seconds(work(size, "stored", head, size.n)["logits"].flop, gpu)
    left = sum(fused.values()) - (sum(stored.values()) - gemm)
    return gemm * gpu.flops * gpu.gemm / left


def table(gpu: Gpu, budget: int | None = None) -> Iterator[str]:
    """Milliseconds of each part, as Markdown."""
    names = ("logits", "rows", "dh", "dW", "scaling")
    yield f"| N × D × V | head | way | tokens a chunk | {' | '.join(names)} | total, ms | ÷ floor |"
    yield "| --- " * (len(names) + 6) + "|"
    for size in SIZES:
        for head in HEADS:
            floor = floor_seconds(size, head, gpu)
            for way, title in WAYS.items():
                parts = predict(size, way, head, gpu, budget)
                cells = [f"{1000 * parts[name]:.1f}" if name in parts else "–" for name in names]
                total, chunk = sum(parts.values()), chunk_of(size, gpu, budget)
                cells += [f"{1000 * total:.1f}", f"{total / floor:.2f}"]
                yield f"| {size.n} × {size.d} × {size.v} | {head} | {title} | {chunk} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--tflops", type=float, default=H100.flops / 1e12, help="of a large product (default %(default)s)"
    )
    parser.add_argument("--bandwidth", type=float, default=H100.bandwidth, help="bytes/s (default %(default).1e)")
    parser.add_argument(
        "--rows", type=float, default=H100.rows, help="row kernel's share of that (default %(default)s)"
    )
    parser.add_argument(
        "--gemm", type=float, default=H100.gemm, help="our GEMM's rate ÷ cuBLAS's (default %(default)s)"
    )
    parser.add_argument("--combine", type=float, default=H100.combine, help="seconds a chunk (default %(default)s)")
    parser.add_argument("--budget", type=float, help="GiB of a chunk's fp32 logits (default: the driver's, 2)")
    options = parser.parse_args(arguments)
    for name in ("tflops", "bandwidth", "rows", "gemm"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name}: expected a number > 0, got {getattr(options, name)}")
    gpu = Gpu(options.tflops * 1e12, options.bandwidth, options.rows, options.gemm, options.combine)
    budget = None if options.budget is None else int(options.budget * 2**30)
    print("Predicted, not measured: milliseconds of the loss and its backward, bf16.\n")
    print(*table(gpu, budget), sep="\n")
    rates = ", ".join(f"{break_even(size, 'trainable', gpu) / 1e12:.0f}" for size in SIZES)
    print(f"\n16-bit logits are the faster way from a GEMM of {rates} TFLOP/s (trainable head, one number a size).")


if __name__ == "__main__":
    main()
