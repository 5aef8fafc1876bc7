"""The sizes that everything on a GPU is measured at, and their tiny doubles for Triton's interpreter on a CPU."""

from typing import NamedTuple


class Size(NamedTuple):
    """N tokens, hidden size D, vocabulary V."""

    n: int
    d: int
    v: int

    def __str__(self) -> str:
        return f"{self.n}x{self.d}x{self.v}"

    @classmethod
    def parse(cls, text: str) -> "Size":
        return cls(*map(int, text.split("x")))


SIZES = (Size(4096, 4096, 128256), Size(8192, 2560, 151936), Size(16384, 2304, 262144), Size(32768, 8192, 128256))
"""Llama-3-8B's head, Qwen3-4B's, Gemma-2's and Llama-3-70B's."""
BY_IMPORTANCE = (SIZES[0], SIZES[2], SIZES[1], SIZES[3])
"""The order of measurement: the smallest and the one furthest from the floor first."""
TINY = (Size(12, 16, 61), Size(8, 24, 70))
"""Takes the place of both tuples where there is no GPU."""
