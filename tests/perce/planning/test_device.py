"""How much memory a device has."""

import torch

from perce.planning import device
from perce.planning.device import GIB


def test_memory_of_a_cpu_is_shared_and_limited(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "CGROUP_LIMIT", tmp_path / "memory.max")
    whole = device.device_memory(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("max\n")
    assert device.device_memory(torch.device("cpu")) == whole > GIB
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device.device_memory(torch.device("cpu")) == GIB // 2


def test_what_is_not_known_is_none():
    assert device.device_memory(torch.device("meta")) is None


def test_libraries_take_their_share_on_a_cpu():
    assert device.held_by_libraries("cuda", True) == 0
    assert 0 < device.held_by_libraries("cpu", False) < device.held_by_libraries("cpu", True)
