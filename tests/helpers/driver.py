"""What the tests of the driver share: a cut into blocks and chunks, and what is counted beneath the op."""

import pytest

from tests.helpers.watch import Watch

pytest.importorskip("triton")
from perce_kernels.gpu import lse_gemm
from perce_kernels.gpu.cut import Cut

CUT = Cut(block=5, chunk=2)  # no multiple of each other, and none of N


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
