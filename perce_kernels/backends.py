"""Chooses the backend that computes, by the argument `backend`, and by PERCE_BACKEND if that is "auto"."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

VARIABLE = "PERCE_BACKEND"
"""The environment variable that chooses the backend of calls with backend="auto"."""
TRITON_FOUND = importlib.util.find_spec("triton") is not None
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels on CPU tensors. Triton reads the variable once, when it is imported."""


def triton_lacks(device: torch.device) -> str | None:
    """What is missing for backend "triton" to run on tensors of this device; None if nothing is."""
    if not TRITON_FOUND:
        return "the triton package, which is not installed"
    if device.type == "cuda" or (device.type == "cpu" and TRITON_INTERPRETED):
        return None
    return "a CUDA or ROCm device (or TRITON_INTERPRET=1 set before Triton is imported, for CPU tensors)"


class Backend(NamedTuple):
    """A module that contract.py describes. It is imported when it is first used, because installations on a CPU or on
    macOS may lack Triton."""

    module: str
    lacks: Callable[[torch.device], str | None] = lambda device: None
    """What is missing for it to run on tensors of this device; None if nothing is."""


BACKENDS = {
    "triton": Backend("perce_kernels.gpu.driver", triton_lacks),
    "torch": Backend("perce_kernels.chunked"),
}
NAMES = ("auto", *BACKENDS, "reference")
"""Valid values of `backend`. The reference is plain autograd over all logits, and does not use the registered ops."""


def resolve_backend(backend: str, device: torch.device, group: Any = None) -> str:
    """`backend`, or if that is "auto" and PERCE_BACKEND is set, the backend that it names.

    Raises:
        ValueError: the backend is unknown, or cannot run on this device or with this group. The message begins with
            `backend` or PERCE_BACKEND, whichever named it.
    """
    name = "backend"
    if backend == "auto" and (chosen := os.environ.get(VARIABLE)):
        name, backend = VARIABLE, chosen
    if backend not in NAMES:
        raise ValueError(f"{name}: expected one of {', '.join(NAMES)}, got {backend!r}")
    if backend == "reference" and group is not None:
        raise ValueError(f'{name}: expected "triton", "torch" or "auto" with a group, got "reference"')
    if backend in BACKENDS and (needed := BACKENDS[backend].lacks(device)):
        raise ValueError(f'{name}: expected {needed} for "{backend}", got {device}')
    return backend


def chosen(backend: str, device: torch.device) -> tuple[str, str]:
    """The backend that computes on tensors of this device, and why: "auto" is Triton on a GPU that the kernels
    support, else plain PyTorch. `backend` as resolve_backend returns it."""
    if backend != "auto":
        return backend, "it was asked for"
    if device.type != "cuda":
        return "torch", "the Triton kernels need an NVIDIA GPU"
    if not TRITON_FOUND:
        return "torch", "the triton package is not installed"
    if torch.version.hip is not None:
        return "torch", 'the Triton kernels have run on no AMD GPU yet; backend "triton" tries them'
    from perce_kernels.gpu import tiles

    if not tiles.is_supported(device):
        return "torch", "the Triton kernels need compute capability 8.0 or newer"
    return "triton", "the Triton kernels are built for this GPU"


def implementation(backend: str, device: torch.device) -> ModuleType:
    """The module that computes."""
    return importlib.import_module(BACKENDS[chosen(backend, device)[0]].module)
