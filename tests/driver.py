"""What the tests of the driver share: several blocks and chunks of a few rows, and what is counted beneath the op."""

from typing import NamedTuple

import pytest
import torch

from tests.device import WAITS, LiveBytes

pytest.importorskip("triton")
from perce_kernels.gpu import driver, lse_gemm
from perce_kernels.gpu.cut import Cut

CUT = Cut(block=5, chunk=2)  # no multiple of each other, and none of N


@pytest.fixture(scope="module")
def several_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "cut_of", lambda *_: CUT)
        patch.setattr(driver, "LOGPROB_ROWS", 5)
        yield


class Product(NamedTuple):
    """One a @ b of (m, k) and (k, n); added: to what the result's place held."""

    m: int
    k: int
    n: int
    added: bool


class Watch(LiveBytes):
    """Every product and its FLOP, operators that wait for the device, and the peak of live bytes, beneath the op."""

    def __init__(self):
        super().__init__()
        self.products: list[Product] = []
        self.gemm_flop = 0
        self.syncs: list[str] = []

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
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture(name="watch")
def watching(monkeypatch):
    """A Watch that also counts the GEMM kernel's products by its launcher; and no target check of the CPU's."""
    watch = Watch()
    launch = lse_gemm.statistics

    def counted(hidden, lm_head, *args, **options):
        watch.gemm_flop += 2 * hidden.shape[0] * hidden.shape[1] * lm_head.shape[0]
        return launch(hidden, lm_head, *args, **options)

    monkeypatch.setattr(lse_gemm, "statistics", counted)
    monkeypatch.setattr("perce_kernels.contract.check_target", lambda *_: None)
    return watch
