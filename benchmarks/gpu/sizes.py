"""The sizes of all measurements on a GPU, and tiny ones for Triton's interpreter on a CPU."""

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
"""The heads of Llama-3-8B, Qwen3-4B, Gemma-2 and Llama-3-70B."""
BY_IMPORTANCE = (SIZES[0], SIZES[2], SIZES[1], SIZES[3])
"""The order of measurement: first the smallest and the one furthest from the floor."""
TINY = (Size(12, 16, 61), Size(8, 24, 70))
"""Replaces both tuples if there is no GPU."""
