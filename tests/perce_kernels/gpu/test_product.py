"""The pitch of logits."""

import pytest

pytest.importorskip("triton")
from perce_kernels.gpu.product import pitch


def test_pitch():
    assert [pitch(v) for v in (0, 1, 64, 65, 128256, 50257)] == [64, 64, 64, 128, 128256, 50304]
