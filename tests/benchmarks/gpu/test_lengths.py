"""What new lengths cost, on a tiny double of the model."""

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.gpu import lengths
from benchmarks.gpu.tables import new_lengths
from tests.helpers.stages import lines_of


def test_new_lengths_are_compared_with_one(monkeypatch):
    monkeypatch.setitem(lengths.LENGTHS, "cpu", (96, 101))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    found = lines_of(lengths.stage, "lengths")
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    kernels = ("all kernels", "without cuDNN")
    assert found.keys() == {
        *(f"attention/{kind}/{name}" for kind in ("causal", "mask") for name in kernels),
        *(f"steps/{name}" for name in kernels),
    }
    for key, line in found.items():
        assert line["seconds"] > 0 and line["first_seconds"] > 0
        count = line["steps"] if key.startswith("steps") else len(line["each"])
        assert count == len(lengths.LENGTHS["cpu"])
    table = list(new_lengths({f"lengths/{key}": line for key, line in found.items()}))
    assert len(table) == 2 + len(found) and table[2].startswith("| attention, causal, all kernels | 0.")
    assert list(new_lengths({}))[2] == "| every kind | not measured | not measured |"
