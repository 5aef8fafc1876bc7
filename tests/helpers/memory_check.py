"""Every load and store of a kernel in Triton's interpreter, checked for its bounds and for races.

    bounds      each tensor of a launch lies between guards, so that an access past its end hits nothing else
    programs    run at the same time on a GPU: none may access what another one writes
    threads     of a program have no order but that of its barriers: between a store and another access of the same
                address there must be one. A store to just the addresses of an earlier load needs none: an element is
                written by the thread that has read it, or after the barrier of an exchange of layouts.

compute-sanitizer finds accesses out of bounds too, on a GPU, but no races in global memory. Kernels with atomics are
refused: what these order is not known here.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

GUARD = 1 << 16  # bytes on both sides of a tensor's memory
GRAIN = 2  # bytes that are told apart: an element of the smallest dtype


class Access(NamedTuple):
    """One load or store of one program."""

    is_store: bool
    program: int
    phase: int
    """Number of barriers before it."""
    grains: np.ndarray
    """(n,) numbers of the grains that it touches."""

    def __str__(self) -> str:
        return f"{'store' if self.is_store else 'load'} by program {self.program}"


class MemoryCheck:
    """Stands in the interpreter's place at launches, programs, barriers, loads and stores, which it calls itself."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from triton.language import int1
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

        self.problems: list[str] = []
        self.accesses = 0  # how many were checked
        self.launches: Counter[str] = Counter()  # of each kernel
        self._as_mask = lambda mask: TensorHandle(mask, int1)
        self._kernel, self._program, self._phase = "", -1, 0
        self._arenas: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by address: memory of the caller, and ours
        self._spans: list[tuple[int, int]] = []  # (first byte, end) of each tensor
        self._seen: list[Access] = []
        stand_ins = {
            (GridExecutor, "__call__"): self._launch, (InterpreterBuilder, "set_grid_idx"): self._begin,
            (InterpreterBuilder, "create_barrier"): self._barrier,
            (InterpreterBuilder, "create_masked_load"): self._load,
            (InterpreterBuilder, "create_masked_store"): self._store,
            (InterpreterBuilder, "create_atomic_cas"): self._refused,
            (InterpreterBuilder, "create_atomic_rmw"): self._refused,
        }  # fmt: skip
        for (owner, name), stand_in in stand_ins.items():
            own = getattr(owner, name)
            patch.setattr(owner, name, lambda *args, own=own, to=stand_in, **named: to(own, *args, **named))

    def _launch(self, own: Any, executor: Any, *args: Any, **named: Any) -> None:
        self._kernel, self._program = executor.fn.__name__, -1
        for kept in (self._arenas, self._spans, self._seen):
            kept.clear()
        own(executor, *map(self._moved, args), **{name: self._moved(x) for name, x in named.items()})
        for memory, arena in self._arenas.values():
            memory.copy_(arena[GUARD : GUARD + len(memory)])
        self.problems += [f"{self._kernel}: {race}" for race in races(self._seen)]
        self.accesses += len(self._seen)
        self.launches[self._kernel] += 1

    def _moved(self, argument: Any) -> Any:
        """A tensor, or that of a descriptor, in memory between guards. Tensors that share memory do so there too."""
        if isinstance(base := getattr(argument, "base", None), torch.Tensor) and hasattr(argument, "block_shape"):
            return dataclasses.replace(argument, base=self._moved(base))
        if not isinstance(argument, torch.Tensor) or not argument.numel():
            return argument
        memory = torch.empty(0, dtype=torch.uint8).set_(argument.untyped_storage())
        if memory.data_ptr() not in self._arenas:
            arena = torch.full((len(memory) + 2 * GUARD,), 0xFF, dtype=torch.uint8)  # NaN in every floating dtype
            arena[GUARD : GUARD + len(memory)] = memory
            self._arenas[memory.data_ptr()] = memory, arena
        storage = self._arenas[memory.data_ptr()][1].untyped_storage()
        size, place = argument.element_size(), GUARD // argument.element_size() + argument.storage_offset()
        moved = torch.empty(0, dtype=argument.dtype).set_(storage, place, argument.shape, argument.stride())
        last = sum((count - 1) * stride for count, stride in zip(moved.shape, moved.stride(), strict=True))
        self._spans.append((moved.data_ptr(), moved.data_ptr() + (last + 1) * size))
        return moved

    def _begin(self, own: Any, builder: Any, *index: int) -> None:
        self._program, self._phase = self._program + 1, 0
        own(builder, *index)

    def _barrier(self, own: Any, builder: Any) -> None:
        self._phase += 1

    def _load(self, own: Any, builder: Any, pointers: Any, mask: Any, *others: Any, **named: Any) -> Any:
        return own(builder, pointers, self._checked(pointers, mask, is_store=False), *others, **named)

    def _store(self, own: Any, builder: Any, pointers: Any, value: Any, mask: Any, *others: Any, **named: Any) -> Any:
        return own(builder, pointers, value, self._checked(pointers, mask, is_store=True), *others, **named)

    def _refused(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("what atomics order is not known here")

    def _checked(self, pointers: Any, mask: Any, is_store: bool) -> Any:
        """The mask without accesses out of bounds, which are noted."""
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        addresses, wanted = pointers.data.astype(np.int64), np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        inside = np.zeros_like(wanted)
        for first, end in self._spans:
            inside |= (addresses >= first) & (addresses + size <= end)
        grains = addresses[wanted & inside][:, None] + np.arange(0, size, GRAIN)
        access = Access(is_store, self._program, self._phase, grains.ravel() // GRAIN)
        self._seen.append(access)
        if (outside := wanted & ~inside).any():
            at = int(addresses[outside][0])
            first, end = min(self._spans, key=lambda span: max(span[0] - at, at - span[1]))
            self.problems.append(
                f"{self._kernel}: {access} of {outside.sum()} elements out of bounds, "
                f"the first at byte {at - first} of a tensor of {end - first}"
            )
        return self._as_mask(wanted & inside)


@contextlib.contextmanager
def checked_memory() -> Iterator[MemoryCheck]:
    """Checks all launches of kernels within."""
    with pytest.MonkeyPatch.context() as patch:
        yield MemoryCheck(patch)


def races(accesses: list[Access]) -> list[str]:
    """Pairs of accesses of one launch that a GPU may do in either order, one of them a store."""
    if not accesses:  # an empty grid
        return []
    program, phase, is_store = (np.array([access[i] for access in accesses]) for i in (1, 2, 0))
    owner = np.repeat(np.arange(len(accesses)), [len(access.grains) for access in accesses])
    grain = np.concatenate([access.grains for access in accesses])
    shared = np.isin(grain, grain[is_store[owner]])
    owner, grain = owner[shared], grain[shared]
    order = np.lexsort((owner, grain))
    owner, grain = owner[order], grain[order]
    pairs: set[tuple[int, int]] = set()
    for lag in range(1, len(grain)):
        one, other = owner[:-lag], owner[lag:]
        same = grain[:-lag] == grain[lag:]
        if not same.any():
            break
        racing = same & (is_store[one] | is_store[other])
        racing &= (program[one] != program[other]) | (phase[one] == phase[other])
        pairs |= {*zip(one[racing].tolist(), other[racing].tolist(), strict=True)}
    found = ((accesses[one], accesses[other]) for one, other in sorted(pairs))
    return [f"{one} races with {other}" for one, other in found if not in_place(one, other)]


def in_place(one: Access, other: Access) -> bool:
    """Whether the second stores just what the first has loaded."""
    kinds = (one.is_store, other.is_store) == (False, True) and one.program == other.program
    return kinds and np.array_equal(one.grains, other.grains)
