"""Shared by the tests of the driver: sizes of blocks and chunks, and counters of the operations inside the op."""

import pytest

from tests.helpers.watch import Watch

pytest.importorskip("triton")
from perce_kernels.gpu import lse_gemm
from perce_kernels.gpu.cut import Cut

CUT = Cut(block=5, chunk=2)  # not multiples of each other, and not divisors of N


@pytest.fixture(name="watch")
def watching(monkeypatch):
    """A Watch that also counts the GEMM kernel's products, by its launcher. The CPU's check of targets is off."""
    watch = Watch()
    launch = lse_gemm.statistics

    def counted(hidden, lm_head, *args, **options):
        watch.gemm_flop += 2 * hidden.shape[0] * hidden.shape[1] * lm_head.shape[0]
        return launch(hidden, lm_head, *args, **options)

    monkeypatch.setattr(lse_gemm, "statistics", counted)
    monkeypatch.setattr("perce_kernels.contract.check_target", lambda *_: None)
    return watch
