"""Records what the op does below its registration, where dispatch modes see it; and what its products should cost."""

from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.helpers.device import WAITS, LiveBytes

NEEDED_AND_COST = pytest.mark.parametrize(
    ("needed", "per_token"),
    [((True, True, True), 8), ((True, False, False), 6), ((False, True, False), 6), ((False, False, False), 4),
     ((False, False, True), 4)],
    ids=["trainable", "frozen head", "frozen hidden", "statistics only", "bias only"],
)  # fmt: skip
"""Which gradients are needed, and the floor: FLOP per token, hidden size and vocabulary entry."""


class Product(NamedTuple):
    """One product a @ b of (m, k) and (k, n); added: whether it is added to the previous contents of the result."""

    m: int
    k: int
    n: int
    added: bool


class Watch(LiveBytes):
    """Records inside the op every product and its FLOP, operators that wait for the device, the peak of live bytes and
    the largest storage."""

    def __init__(self):
        super().__init__()
        self.products: list[Product] = []
        self.gemm_flop = 0
        self.syncs: list[str] = []
        self.largest_bytes = 0

    @property
    def flop(self) -> int:
        return self.gemm_flop + sum(2 * product.m * product.k * product.n for product in self.products)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("bmm", "baddbmm", "linear", "matmul"), f"{name} is not counted"
        if name in ("mm", "addmm", "addmm_"):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.products.append(Product(a.shape[0], a.shape[1], b.shape[1], name != "mm"))
        if name in WAITS:
            self.syncs.append(name)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.largest_bytes = max([self.largest_bytes, *(x.untyped_storage().nbytes() for x in tensors)])
        return result
