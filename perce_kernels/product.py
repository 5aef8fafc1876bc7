"""Products with fp32 results, and the distance between rows of logits."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

PITCH = 64
"""Rows of logits and of their gradient start at multiples of this many elements (256 bytes in fp32, 128 in 16 bits), as
vector loads, the copy engine and cuBLAS need, whatever V is."""


def pitch(v: int) -> int:
    """Elements from one row of the logits to the next; it is not 0 for an empty shard."""
    return -(-max(v, 1) // PITCH) * PITCH


def unit_stride(x: Tensor) -> Tensor:
    """x (R, D), copied unless D has a unit stride."""
    return x if x.stride(1) == 1 else x.contiguous()


def can_widen(x: Tensor) -> bool:
    """Whether products of operands like x can have another dtype (`out_dtype`): on CUDA, bf16 from sm_80, and ROCm."""
    if x.device.type != "cuda":
        return False
    return (
        x.dtype != torch.bfloat16
        or torch.version.hip is not None
        or torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """out (+)= a @ b, accumulated in out's dtype. Where products cannot have this dtype, the operands are copied to
    it."""
    if not can_widen(a):
        a, b = a.to(out.dtype), b.to(out.dtype)
    mixed: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if 0 in a.shape or 0 in b.shape:  # an empty shard
        return out if add else out.zero_()
    if add:
        return torch.addmm(out, a, b, out=out, **mixed)
    return torch.mm(a, b, out=out, **mixed)


_LOCK = threading.Lock()
_inside = 0  # calls in full_fp32_matmul, of all threads
_restore: Callable[[], None]


@contextmanager
def full_fp32_matmul() -> Iterator[None]:
    """Compute fp32 products in fp32, and accumulate fp16 ones in fp32, whatever the user's settings, which are restored
    afterwards. The settings are the process's: of several threads the first one saves them, and the last one restores
    them."""
    global _inside, _restore
    with _LOCK:
        if not _inside:
            _restore = _set_full()
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                _restore()


def _set_full() -> Callable[[], None]:
    """Set full precision. Returns what restores the settings; if one cannot be set, the others are restored.

    torch has an older setting besides the newer ones. If they disagree, torch raises an error when the older one is
    read, as TunableOp's products do: so both are set.
    """
    cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with ExitStack() as undo:
        undo.callback(setattr, cuda, "allow_fp16_accumulation", cuda.allow_fp16_accumulation)
        cuda.allow_fp16_accumulation = False
        for backend in (cuda, mkldnn):
            undo.callback(_restore_precision, backend, backend.fp32_precision)
            backend.fp32_precision = "ieee"
        # The older one can be read now that the newer settings are "ieee".
        undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        return undo.pop_all().close


def _restore_precision(backend: Any, precision: str) -> None:
    # An inherited setting reads as its value. Writing that value back would detach it from the global setting.
    inherited = precision == torch.backends.fp32_precision  # type: ignore[attr-defined]
    backend.fp32_precision = "none" if inherited else precision
