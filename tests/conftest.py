"""Fixtures of the op's tests, hypothesis profiles, and Triton's interpreter where there is no GPU."""

import os

import pytest
import torch
from hypothesis import settings

# Before anything imports Triton, or perce_kernels, which both read it once. torch alone does not import Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("PERCE_BACKEND", None)  # the developer's own choice is not what is tested

from perce_kernels import chunked, row_pass

settings.register_profile("ci", deadline=None, derandomize=True, database=None, max_examples=60)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(config, items):
    """With several processes on one GPU, the cases whose tensors fill it run in one of them (--dist loadgroup)."""
    if config.pluginmanager.hasplugin("xdist"):
        from tests.cases import Case

        for item in items:
            case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
            if isinstance(case, Case) and max(case.v * case.d, case.n * case.v) > 6e8:
                item.add_marker(pytest.mark.xdist_group("large"))


@pytest.fixture(scope="module")
def poisoned_memory():
    """Make `empty` return NaN, so that memory which is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="module")
def small_chunks():
    """Budgets so small that the usual test inputs (N = 37, V = 211) take several chunks and blocks of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "LOGITS_BYTES", 1)  # chunk_rows' minimum: 16
        patch.setattr(row_pass, "ROW_BLOCK_BYTES", 5 * 211 * 4)
        yield


@pytest.fixture(scope="module")
def interpreter_rounds():
    """Triton's interpreter truncates fp32 to bf16; make it round to nearest even, as GPUs do."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, destination, mode):
        if (source, destination) != (tl.float32, tl.bfloat16):
            return convert(values, source, destination, mode)
        return torch.from_numpy(np.array(values)).bfloat16().view(torch.uint16).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        yield
