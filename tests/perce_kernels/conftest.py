"""The subject of a contract test, block and chunk sizes of a few rows, and the check of what kernels access."""

import os

import pytest

from perce_kernels.backends import TRITON_FOUND
from tests.helpers.memory_check import checked_memory
from tests.helpers.subjects import SUBJECTS, WAYS


@pytest.fixture
def memory_is_checked():
    """No kernel that a test runs in Triton's interpreter accesses memory out of bounds or in a race."""
    if not TRITON_FOUND or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    with checked_memory() as check:
        yield
    assert not check.problems, check.problems[:3]


@pytest.fixture(scope="module")
def several_chunks():
    """Makes the driver use several blocks and chunks of a few rows each: CUT."""
    from perce_kernels.gpu import driver
    from tests.helpers.driver import CUT

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "cut_of", lambda *_: CUT)
        patch.setattr(driver, "LOGPROB_ROWS", 5)
        yield


@pytest.fixture(scope="module")
def subject(request):
    """One of SUBJECTS; if it is named after a way, that way is in use."""
    chosen = SUBJECTS[request.param]
    if chosen.backend != "triton":
        request.getfixturevalue("small_chunks")
        yield chosen
        return
    pytest.importorskip("triton")
    from perce_kernels.gpu import tiles

    request.getfixturevalue("several_chunks")
    request.getfixturevalue("interpreter_rounds")
    with pytest.MonkeyPatch.context() as patch:
        if chosen.name in WAYS:
            patch.setitem(tiles.WAY, tiles.architecture(chosen.device), chosen.name)
        yield chosen
