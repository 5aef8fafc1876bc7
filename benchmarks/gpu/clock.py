"""Time and memory of a call: by CUDA events and the allocator, or on a CPU, where the harness is tested, by a clock."""

import gc
import time
from collections.abc import Callable
from contextlib import suppress

import torch

Run = Callable[[], object]


class HostClock:
    """Seconds of a call on the CPU; memory is not measured there (benchmarks/memory.py does)."""

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
        """Whether the device still answers: after an illegal access no CUDA call of the process works."""
        return True


LEAD = 2_000_000  # cycles, some 1 ms: what the host needs to queue a few launches


class CudaClock(HostClock):
    """Seconds on the device between two events. The device is kept busy first, so that launches are queued before they
    are due, as in a training step: of a small kernel, most of the time would else be the host's.
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
        with suppress(RuntimeError):  # of a dead device; is_alive says so
            torch.cuda.empty_cache()

    def is_alive(self) -> bool:
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").add_(1).item()
        except RuntimeError:
            return False
        return True


def clock_of(device: str) -> HostClock:
    return CudaClock() if device == "cuda" else HostClock()
