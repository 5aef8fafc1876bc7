"""cuBLAS's products with fp32 results, and where rows of logits start."""

from typing import Any

import torch
from torch import Tensor

PITCH = 64
"""Rows of logits and of their gradient start at multiples of this many elements: 256 bytes of fp32, 128 of 16 bits,
what vector loads, the copy engine and cuBLAS want of any V."""


def pitch(v: int) -> int:
    """Elements from one row of the logits to the next; an empty shard has rows of some length too."""
    return -(-max(v, 1) // PITCH) * PITCH


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out (+)= a @ b with fp32 accumulation and output. CPU products have no out_dtype: operands are upcast there."""
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
