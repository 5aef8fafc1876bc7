"""Measurements on a CUDA device, and the closest that a CPU has to them, so that the same tests run on both.

peak_bytes    CUDA: the allocator's own peak            CPU: live bytes of tensors, beneath the op
host_syncs    CUDA: PyTorch's sync debug mode           CPU: calls of Tensor.nonzero, the one sync of compact=True
capture       CUDA: a CUDA graph and its replay         CPU: the call again, into the same outputs
Waits         calls in Python that would wait for a CUDA device, on any device
"""

import fcntl
import gc
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from traceback import extract_stack

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
SYNC = "called a synchronizing CUDA operation"


def free() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


WAITS = ("nonzero", "_local_scalar_dense", "equal", "is_nonzero", "masked_select", "unique")
"""Operators that wait for the device, as dispatch modes see them below the op."""


class LiveBytes(TorchDispatchMode):
    """The peak number of bytes of tensors that are created while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.storages: set[int] = set()

    def forget(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **kwargs or {})
        # The interpreter uses set_ for its own copies of a kernel's arguments, which a GPU does not make.
        for x in tree_leaves(result) if func.overloadpacket.__name__ != "set_" else ():
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self.storages | known:
                size = x.untyped_storage().nbytes()
                self.storages.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(x.untyped_storage(), self.forget, key, size)
        return result


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak of the bytes that `run` holds in addition to those before; its outputs are included."""
    free()
    if not ON_GPU:
        with LiveBytes() as live:
            run()
        return live.peak
    run()  # allocates cuBLAS's workspace and compiles kernels, which do not count
    free()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raises an error for any wait for the device."""
    if not ON_GPU:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "nonzero", lambda *_: pytest.fail("a host sync"))
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def host_syncs(run: Callable[[], object]) -> int:
    """How often `run` waits for the device."""
    if not ON_GPU:
        calls, nonzero = [], Tensor.nonzero
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "nonzero", lambda x: calls.append(x) or nonzero(x))
            run()
        return len(calls)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum(SYNC in str(warning.message) for warning in caught)


class Waits(TorchFunctionMode):
    """The places of calls that wait for a CUDA device: the host reads a tensor, or makes one there of its own numbers.
    Of what the op calls below its registration, only Tensor.nonzero is seen."""

    READS = ("item", "tolist", "cpu", "numpy", "unique", "equal", "__bool__", "__int__", "__float__")
    MAKES = ("tensor", "as_tensor", "new_tensor")

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self):
        nonzero = Tensor.nonzero
        self._patch.setattr(Tensor, "nonzero", lambda x: (self.places.append("nonzero"), nonzero(x))[1])
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.undo()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, data = getattr(func, "__name__", ""), args[func is Tensor.new_tensor :]
        made = name == "new_tensor" or (name in self.MAKES and (kwargs or {}).get("device") is not None)
        if name in self.READS or (made and not isinstance(data[0], Tensor) and data[0] != []):
            caller = next(x for x in reversed(extract_stack()[:-1]) if "/torch/" not in x.filename)
            self.places.append(f"{name} in {caller.name}, {Path(caller.filename).name}:{caller.lineno}")
        return func(*args, **kwargs or {})


def capture(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    """(outputs, replay): replay computes them again from the current contents of the inputs' memory."""
    if not ON_GPU:
        outputs = run()

        def again() -> None:
            for out, new in zip(outputs, run(), strict=True):
                out.copy_(new)

        return outputs, again
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and lets cuBLAS take its workspace
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return outputs, graph.replay


UNIT = 8 * 2**30  # bytes


@contextmanager
def room(needed: int, total: int, directory: Path | None = None) -> Iterator[int]:
    """Waits until the other processes in `directory` leave `needed` of `total` bytes; yields the units taken.

    A unit is a file that one process locks. Only the holder of the first lock takes units, all that it needs, so that
    processes cannot wait for each other.
    """
    directory = directory or Path(tempfile.gettempdir()) / "perce_gpu_tests"
    directory.mkdir(parents=True, exist_ok=True)
    units = max(1, int(0.9 * total) // UNIT)
    wanted = min(units, -(-needed // UNIT))
    with ExitStack() as held:
        with (directory / "first").open("w") as first:
            fcntl.flock(first, fcntl.LOCK_EX)
            taken: set[int] = set()
            while len(taken) < wanted:
                for unit in set(range(units)) - taken:
                    file = (directory / str(unit)).open("w")
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        file.close()
                        continue
                    held.enter_context(file)
                    taken.add(unit)
                    if len(taken) == wanted:
                        break
                else:
                    time.sleep(0.02)
        yield len(taken)
