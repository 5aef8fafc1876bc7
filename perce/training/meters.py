"""A training run's measurements of itself: seconds, token statistics between two logs, peak memory."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import TrainerState

from perce.config.schema import LossConfig
from perce.objectives import Measured

MIB = 2**20


class Clock:
    """Seconds spent in stretches of work. On CUDA, events measure them and are read only when asked for, so a step has
    no sync."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spent = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self._spent += time.perf_counter() - started

    def seconds(self) -> float:
        for start, end in self._events:
            end.synchronize()
            self._spent += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._spent


class Window:
    """Sums over the training tokens since the last log, kept on the device (no sync in a step), and a stopwatch."""

    NAMES = ("tokens", "count", "ce", "pir_mean", "weight_mean", "frac_at_floor", "frac_at_ceiling", "router_aux_loss")

    def __init__(self, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self.total = torch.zeros(len(self.NAMES), dtype=wide, device=device)
        self.steps = 0
        self._spent = 0.0
        self._running_since: float | None = None

    def start(self) -> None:
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def begin_step(self) -> None:
        self.steps += 1
        self.start()

    def pause(self) -> None:
        self._spent, self._running_since = self.seconds, None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return self._spent + running

    def add(
        self, loss: LossConfig, done: Measured, pir: Tensor, tokens: Tensor, balance: Tensor | None = None
    ) -> None:  # fmt: skip
        """Add one forward pass: what it measured of its N response tokens; their (N,) PIR under the model that their
        weights come from; the number of its input tokens, 0-d; its share of the step's load-balancing loss. The signal
        is counted at the bounds of `loss`, not at those that a schedule gives the step, or the shares would show the
        schedule."""
        logp, signal, weighting = done.logp, done.signal, loss.weighting
        sums = torch.stack(
            [
                tokens.to(logp), logp.new_full((), logp.numel()), -logp.sum(), pir.sum(), done.token_weight.sum(),
                (signal <= weighting.clip_min).sum().to(logp), (signal >= weighting.clip_max).sum().to(logp),
                logp.new_zeros(()) if balance is None else balance.detach().to(logp),
            ]
        )  # fmt: skip
        self.total += sums.to(self.total)

    def summary(self, total: Tensor, loss: LossConfig, balanced: bool = False) -> Mapping[str, float]:
        """Means over all ranks' tokens, without numbers that the objective does not have. The load-balancing loss, if
        there is one, is a mean over the steps."""
        tokens, count, *sums, balance = total.tolist()
        if not count:
            return {}
        means = {name: value / count for name, value in zip(self.NAMES[2:-1], sums, strict=True)}
        if loss.entry.signal is None:
            means = {"ce": means["ce"]}
        elif not loss.entry.counterfactual:
            del means["pir_mean"]
        if balanced:
            means["router_aux_loss"] = balance / max(self.steps, 1)
        return means | {"tokens_per_second": tokens / max(self.seconds, 1e-9)}


def progress_of(state: TrainerState) -> float:
    """From 0 at the first step of the run to 1 at the last."""
    return min(state.global_step / max(state.max_steps - 1, 1), 1.0)


def evaluation(means: Mapping[str, float]) -> dict[str, float]:
    """The numbers of an evaluation from a window's summary, by the names that PerceTrainer gives them."""
    found = {"loss_with_persona": means["ce"]} if "ce" in means else {}
    if "pir_mean" in means:
        found |= {"loss_without_persona": means["ce"] + means["pir_mean"], "pir_mean": means["pir_mean"]}
    return found


def peak_memory_mib(device: torch.device) -> float:
    """Peak CUDA allocation, or the process's peak resident set, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024
