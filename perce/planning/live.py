"""Counts the bytes alive while a step runs on fake tensors, at the start and at the peak of each of its phases."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Moment(NamedTuple):
    """Bytes that are alive besides the weights, and how many of them are gradients of parameters."""

    alive: int
    gradients: int

    @property
    def others(self) -> int:
        return self.alive - self.gradients

    def less(self, others: int) -> "Moment":
        return self._replace(alive=self.alive - others)


class Phase(NamedTuple):
    """Bytes at the start and peak of one phase of a step, or what a layer adds to them."""

    start: Moment
    peak: Moment

    @property
    def working_set(self) -> int:
        """How much the peak is above the start, gradients left out."""
        return self.peak.others - self.start.others


@dataclass
class Rehearsed:
    """The result of a rehearsal, in bytes."""

    phases: dict[str, Phase] = field(default_factory=dict)
    """By name, in the order in which they began; a name may have a second part after a "/"."""
    offloaded: int = 0
    """Checkpointed layer inputs in host memory."""
    cached: int = 0
    """Keys and values of one persona that has a forward of its own."""

    @property
    def largest(self) -> dict[str, Phase]:
        """For each name before a "/", the phase with the highest peak."""
        found: dict[str, Phase] = {}
        for name, phase in self.phases.items():
            known = found.setdefault(name.partition("/")[0], phase)
            if phase.peak.alive > known.peak.alive:
                found[name.partition("/")[0]] = phase
        return found


class Live(TorchDispatchMode):
    """Counts all storages that operators have returned and that are still referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Rehearsed()
        self._bytes = self._gradients = 0
        self.phase = ""
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # two of three calls: C++ asks a fake tensor on which device it is
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        weakref.finalize(storage, self._release, key)
        self._bytes += storage.nbytes()
        if self.phase and self._bytes > self.found.phases[self.phase].peak.alive:
            self.found.phases[self.phase] = self.found.phases[self.phase]._replace(peak=self._now)

    def _release(self, key: int) -> None:
        self._bytes -= self._alive.pop(key)

    @property
    def _now(self) -> Moment:
        return Moment(self._bytes, self._gradients)

    def disregard(self, tensors: Iterator[Tensor]) -> None:
        """Do not count tensors that existed before: an operator that returns a view of one allocates nothing."""
        for tensor in tensors:
            self._alive[tensor.untyped_storage()._cdata] = 0

    def enter(self, phase: str) -> None:
        """Begin a phase: the bytes alive now are its start. A phase that is entered again, to recompute, continues."""
        self.phase = phase
        self.found.phases.setdefault(phase, Phase(self._now, self._now))

    def has_been(self, phase: str) -> bool:
        return phase in self.found.phases

    def leave(self) -> None:
        self.phase = ""

    def count_gradient(self, parameter: Tensor) -> None:
        self._gradients += parameter.numel() * parameter.itemsize
