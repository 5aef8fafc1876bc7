"""The subject of a contract test, and block and chunk sizes of a few rows."""

import pytest

from tests.helpers.subjects import SUBJECTS, WAYS


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
