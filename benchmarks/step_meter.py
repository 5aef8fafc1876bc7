"""Measures peak memory and time of the training steps of any transformers.Trainer."""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.memory import status_bytes


class StepMeter(TrainerCallback):
    """Watches the optimiser steps from the second on: resident memory on a CPU, allocated memory on a GPU."""

    def __init__(self) -> None:
        self.before = self.peak = 0
        """Bytes at the start of the last step, and at its peak."""
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:
            if args.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                self.before = torch.cuda.memory_allocated()
            else:
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
                self.before = status_bytes("VmRSS")
            self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_gpu = args.device.type == "cuda"
        if state.global_step > 1:
            if on_gpu:
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self._started)
            self.peak = torch.cuda.max_memory_allocated() if on_gpu else status_bytes("VmHWM")
