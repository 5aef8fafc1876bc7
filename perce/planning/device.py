"""How much memory there is: of a device, and of it what a step may take."""

import contextlib
import os
from pathlib import Path

import psutil
import torch

GIB = 2**30
# A share of the memory, above which a plan that fits may not: plans were within 5 % of steps on CPUs.
DOUBTFUL = 0.9
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
HELD_BY_LIBRARIES = GIB // 2  # of a process on a CPU, beside what is planned
# oneDNN, which does bf16 products on CPUs, keeps the code of 1,024 of them: 0.9 GiB once it has met 400 lengths.
HELD_BY_ONEDNN = GIB


def device_memory(device: torch.device) -> int | None:
    """Bytes that one process may use: a GPU's memory, or its share of this machine's; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None
    if device.type != "cpu":
        return None
    total = psutil.virtual_memory().total + psutil.swap_memory().total
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        total = min(total, int(CGROUP_LIMIT.read_text()))
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def held_by_libraries(device: str, low_precision: bool) -> int:
    """Bytes of it that are gone before there is a model, as far as plans do not count them."""
    return 0 if device != "cpu" else HELD_BY_LIBRARIES + (HELD_BY_ONEDNN if low_precision else 0)
