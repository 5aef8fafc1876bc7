"""Measures peak memory and time of the training steps of any transformers.Trainer."""

import itertools
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.memory import status_bytes
from tests.helpers.device import SYNC


class StepMeter(TrainerCallback):
    """Watches the optimiser steps from the second on: resident memory on a CPU, allocated memory on a GPU.

    On a GPU it is from the third step on, because the GPU is idle before the second. A step lasts from the end of the
    step before to its own end, as the GPU sees them: as in a run, the host may launch a step while the GPU is at work
    on the one before. So nothing may be logged between the first step and the last. Call `close` after training.
    """

    def __init__(self) -> None:
        self.before = self.peak = 0
        """Bytes at the start of the last step, and at its peak."""
        self.seconds: list[float] = []
        self.waits: float | None = None
        """On a GPU: how often the host waits for it in a step, on average."""
        self._ends: list[torch.cuda.Event] = []
        self._catcher: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            return
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
            self.before = status_bytes("VmRSS")
        self._started = time.perf_counter()

    def _begin(self) -> None:
        self._catcher = warnings.catch_warnings(record=True)
        self._caught = self._catcher.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            return
        if args.device.type == "cuda":
            self._ends.append(torch.cuda.Event(enable_timing=True))
            self._ends[-1].record()
            self.peak = torch.cuda.max_memory_allocated()
            if state.global_step == 2:
                self._begin()
            if state.global_step == state.max_steps:
                self.close()
        else:
            self.seconds.append(time.perf_counter() - self._started)
            self.peak = status_bytes("VmHWM")

    def close(self) -> None:
        """Ends the counting of waits, also after a step that failed."""
        if self._catcher is None:
            return
        torch.cuda.set_sync_debug_mode("default")
        self._catcher.__exit__(None, None, None)
        self._catcher = None
        torch.cuda.synchronize()
        self.seconds = [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(self._ends)]
        self.waits = sum(SYNC in str(warning.message) for warning in self._caught) / max(len(self.seconds), 1)
