"""How much memory a device has, and how much of it a training step may use."""

import contextlib
import os
from pathlib import Path

import psutil
import torch

GIB = 2**30
# Above this share of the memory, a step that is planned to fit may not fit: plans were within 5 % of steps on CPUs.
DOUBTFUL = 0.9
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
HELD_BY_LIBRARIES = GIB // 2  # in a process on a CPU, in addition to what is planned
# oneDNN computes bf16 products on CPUs and caches code for 1,024 of them: 0.9 GiB after 400 different lengths.
HELD_BY_ONEDNN = GIB


def device_memory(device: torch.device) -> int | None:
    """Bytes that one process may use: a GPU's memory, or its share of this machine's memory; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None
    if device.type != "cpu":
        return None
    total = psutil.virtual_memory().total + psutil.swap_memory().total
    with contextlib.suppress(OSError, ValueError):  # the file says "max" if there is no limit
        total = min(total, int(CGROUP_LIMIT.read_text()))
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def held_by_libraries(device: str, low_precision: bool) -> int:
    """Bytes of the device's memory that libraries take before the model is built and that plans do not count."""
    return 0 if device != "cpu" else HELD_BY_LIBRARIES + (HELD_BY_ONEDNN if low_precision else 0)
