"""Fixtures of the op's tests, and hypothesis profiles."""

import os

import pytest
import torch
from hypothesis import settings

from perce_kernels import chunked

settings.register_profile("ci", deadline=None, derandomize=True, database=None, max_examples=60)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


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
        patch.setattr(chunked, "ROW_BLOCK_BYTES", 5 * 211 * 4)
        yield
