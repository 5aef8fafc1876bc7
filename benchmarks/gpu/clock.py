"""Time and memory of a call: by CUDA events and the allocator; on a CPU, which only tests the harness, by a clock."""

import gc
import time
from collections.abc import Callable
from contextlib import suppress

import torch

Run = Callable[[], object]


class HostClock:
    """Seconds of a call on the CPU. Memory is not measured here (benchmarks/memory.py does that)."""

    def seconds(self, run: Run, setup: Run | None = None) -> float:
        if setup is not None:
            setup()
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def peak_extra_bytes(self, run: Run) -> int | None:
        run()
        return None

    def free(self) -> None:
        gc.collect()

    def is_alive(self) -> bool:
        """Whether the device still responds: after an illegal access no CUDA call of the process works."""
        return True


LEAD = 2_000_000  # cycles, some 1 ms: enough for the host to queue a few launches


class CudaClock(HostClock):
    """Seconds on the device between two events. The device is kept busy first, so that launches are queued before they
    are due, as in a training step; otherwise, most of the time of a small kernel would be the host's.
    """

    def seconds(self, run: Run, setup: Run | None = None) -> float:
        if setup is not None:
            setup()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(LEAD)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    def peak_extra_bytes(self, run: Run) -> int | None:
        self.free()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def free(self) -> None:
        gc.collect()
        with suppress(RuntimeError):  # the device is dead; is_alive reports that
            torch.cuda.empty_cache()

    def is_alive(self) -> bool:
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").add_(1).item()
        except RuntimeError:
            return False
        return True


def seconds_of_kernels(run: Run) -> dict[str, dict[str, float]]:
    """What ran on the device, by the profiler: how often each kernel, copy and fill ran, and its total seconds."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    found: dict[str, dict[str, float]] = {}
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            kernel = found.setdefault(event.name, {"count": 0, "seconds": 0.0})
            kernel["count"] += 1
            kernel["seconds"] += event.time_range.elapsed_us() / 1e6
    return found


def clock_of(device: str) -> HostClock:
    return CudaClock() if device == "cuda" else HostClock()
