"""cuBLAS's products with fp32 results, and the distance between rows of logits."""

from typing import Any

import torch
from torch import Tensor

PITCH = 64
"""Rows of logits and of their gradient start at multiples of this many elements (256 bytes in fp32, 128 in 16 bits), as
vector loads, the copy engine and cuBLAS need, whatever V is."""


def pitch(v: int) -> int:
    """Elements from one row of the logits to the next; it is not 0 for an empty shard."""
    return -(-max(v, 1) // PITCH) * PITCH


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out (+)= a @ b with fp32 accumulation and output. On a CPU, which has no out_dtype, the operands are upcast."""
    if a.device.type == "cpu":
        a, b = a.to(out.dtype), b.to(out.dtype)
    mixed: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if 0 in a.shape or 0 in b.shape:  # an empty shard
        if not add:
            out.zero_()
    elif add:
        torch.addmm(out, a, b, out=out, **mixed)
    else:
        torch.mm(a, b, out=out, **mixed)
