"""Measurements on a CUDA device, and the closest that a CPU has to them, so that the same tests run on both.

peak_bytes    CUDA: the allocator's own peak            CPU: live bytes of tensors, beneath the op
host_syncs    CUDA: PyTorch's sync debug mode           CPU: calls of Tensor.nonzero, the one sync of compact=True
capture       CUDA: a CUDA graph and its replay         CPU: the call again, into the same outputs
Waits         where the host would wait for a CUDA device, on a CPU
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
SYNC = "called a synchronizing CUDA operation"  # PyTorch's warning in its sync debug mode


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


def caller() -> str:
    """The nearest function outside torch and this file; "" for what is on the host: batches that are being made, and
    the counts of torch's optimisers."""
    frames = [frame for frame in extract_stack() if frame.filename != __file__]
    if any("/torch/optim/" in frame.filename or frame.name == "collate" for frame in frames):
        return ""
    frame = next(frame for frame in reversed(frames) if "/torch/" not in frame.filename)
    return f"{frame.name}, {Path(frame.filename).name}:{frame.lineno}"


class Reads(TorchDispatchMode):
    """Operators whose result the host needs, in forward and in backward."""

    NAMES = (*WAITS, "_unique2", "unique_dim", "bincount")

    def __init__(self, places: list[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        chosen = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(x is not None and x.dtype == torch.bool for x in chosen)
        counted = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if (name in self.NAMES or by_mask or counted) and (place := caller()):
            self.places.append(f"{name} in {place}")
        return func(*args, **kwargs or {})


class Copies(TorchFunctionMode):
    """Calls in Python that copy a tensor to the host, or numbers of the host to a device."""

    def __init__(self, places: list[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, given = getattr(func, "__name__", ""), kwargs or {}
        made = name == "new_tensor" or (name in ("tensor", "as_tensor") and given.get("device") is not None)
        data = given.get("data", args[-1] if args else None)
        copied = made and not isinstance(data, Tensor) and data != []
        if (copied or name in ("tolist", "cpu", "numpy")) and (place := caller()):
            self.places.append(f"{name} in {place}")
        return func(*args, **given)


class Waits(ExitStack):
    """Inside the context, `places` collects where the host would wait for a CUDA device. What it cannot see on a CPU is
    a copy of a tensor from the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __enter__(self):
        patch = self.enter_context(pytest.MonkeyPatch.context())
        patch.setattr("perce_kernels.contract.check_target", lambda *_: None)  # it reads only on a CPU
        nonzero = Tensor.nonzero  # of the op, below whose registration no mode sees anything
        patch.setattr(Tensor, "nonzero", lambda x: (self.places.append("the op's rows"), nonzero(x))[1])
        self.enter_context(Reads(self.places))
        self.enter_context(Copies(self.places))
        return self


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
