"""How many tokens the logits buffer holds (a chunk) and how many the dz buffer holds (a block), under one budget of
bytes; and how many columns of how many rows of counterfactual logits the logits buffer holds at once.

A token's logits take 4 bytes per entry for the time of one kernel. Its dz takes 2 bytes per entry, and is kept until dz
of as many tokens as possible is there: each product dW += dzᵀ h reads and writes all of dW, 8 bytes per entry, while
reading W for a product takes 2. So a block has several chunks. The costs of a cut beyond the minimum:

    bytes ÷ D·V    2 per chunk (W, for the factual logits), 2 + 2 + 8 per block (W, for the counterfactual logits and
                   for dh; dW)
    FLOP           of dh = dz W, which has few tiles (K/128 · D/256): with an unsuitable K, most multiprocessors are
                   idle in the last wave

One byte is counted as 256 FLOP (an H100: 247). One effect is not counted: on an H100, dh = dz W is slower for many
rows, at D = 8192 760 TFLOP/s for 4096 rows and 563 for 16384.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from perce_kernels.gpu.tiles import STATISTICS_COLUMNS
from perce_kernels.product import PITCH, pitch

BUDGET = 2 * 2**30
"""Bytes for the dz of a block and the logits of a chunk together."""
GEMM_TILE = (128, 256)
"""Rows and columns of the output tile that cuBLAS prefers for large 16-bit products."""
FLOP_PER_BYTE = 256
FEWEST, ENOUGH = 16, 512
"""The fewest tokens of a chunk, whatever the budget; and the number from which reading W takes less time than the
product with it."""
TRIED = 32
COLUMNS = 4096
"""Fewest columns of a block, if V has as many: a product of fewer is bound by reading h and by its launch."""


class Cut(NamedTuple):
    """Numbers of tokens that are computed at once."""

    block: int  # in the dz buffer: rows of dh = dz W, and terms of dW += dzᵀ h
    chunk: int  # in the logits buffer


def cut_of(n: int, d: int, v: int, itemsize: int, way: str, multiprocessors: int, budget: int | None = None) -> Cut:
    """The cut of n tokens, into blocks of one size. It depends on the arguments only, never on free memory, so that the
    same call gives the same bits anywhere.

    itemsize: bytes of an operand's element. v: size of the whole vocabulary, even if it is sharded.
    """
    return _cut_of(max(n, 1), d, v, itemsize, way, multiprocessors, BUDGET if budget is None else budget)


@lru_cache(maxsize=256)
def _cut_of(n: int, d: int, v: int, itemsize: int, way: str, multiprocessors: int, budget: int) -> Cut:
    rows = GEMM_TILE[0]
    of_dz, of_logits = pitch(v) * itemsize, 4 * pitch(v)
    if way == "stored":  # logits are stored where dz will be; there are also statistics of tiles
        of_dz, of_logits = of_dz + 8 * -(-v // STATISTICS_COLUMNS) + 16, 0
    one_chunk = budget // (of_dz + of_logits)  # tokens of a block that is one chunk
    if one_chunk < rows:
        return Cut(max(FEWEST, one_chunk), max(FEWEST, one_chunk))
    most = max((budget - min(ENOUGH, one_chunk) * of_logits) // of_dz, rows)
    fewest, many = -(-n // most), -(-n // one_chunk) * (2 if way == "stored" else 1)

    def cut_into(blocks: int) -> Cut:
        block = min(_round_up(-(-n // blocks), rows), most // rows * rows)
        if way == "stored":
            return Cut(block, block)
        chunk = (budget - block * of_dz) // of_logits
        return Cut(block, min(_round_up(-(-block // -(-block // chunk)), rows), chunk // rows * rows, block))

    counts = range(max(fewest, 1), max(many, fewest, 1) + 1, max(1, (many - fewest) // TRIED))
    return min(map(cut_into, counts), key=lambda cut: _cost(n, cut, d, multiprocessors))


def block_of(n: int, v: int, elements: int) -> tuple[int, int]:
    """(rows, columns) of the blocks, of at most `elements`, in which n rows of v logits are computed."""
    assert elements >= PITCH
    rows = max(1, min(n, elements // min(pitch(v), COLUMNS)))
    most = elements // rows // PITCH * PITCH
    blocks = -(-pitch(v) // most)
    return rows, -(-pitch(v) // (blocks * PITCH)) * PITCH  # equal widths: no narrow block at the end


def _cost(n: int, cut: Cut, d: int, multiprocessors: int) -> float:
    """The cost of a cut, in bytes ÷ D·V."""
    rows, columns = GEMM_TILE
    whole, rest = divmod(n, cut.block)

    def of_blocks(cost: Callable[[int], int]) -> int:
        return whole * cost(cut.block) + (cost(rest) if rest else 0)

    chunks = of_blocks(lambda block: -(-block // cut.chunk))
    waves = of_blocks(lambda block: -(-(-(-block // rows) * -(-d // columns)) // multiprocessors))
    idle = waves * multiprocessors * rows * columns / d - n
    return 2 * chunks + 12 * (whole + (rest > 0)) + 2 * idle / FLOP_PER_BYTE


def _round_up(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple
