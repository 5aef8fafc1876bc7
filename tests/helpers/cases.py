"""Shapes of real models for the tests that need a GPU, each with a tiny version that Triton's interpreter can run."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers.device import DEVICE, ON_GPU
from tests.helpers.numerics import IGNORE, Inputs

N, D, V = 8, 24, 211
CHUNK = 3
CUT = (5, CHUNK)  # tokens per block and per chunk
LLAMA = (4096, 128256)  # D, V
LLAMA_70B = (8192, 128256)
QWEN = (2560, 151936)
GEMMA = (2304, 262144)


class Case(NamedTuple):
    """Sizes and options of one call."""

    n: int
    d: int
    v: int
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    spread: float = 8.0  # standard deviation of the logits; the largest of 10⁸ are at 6σ, about 50
    ignored: float = 0.3  # share of the tokens
    options: tuple[tuple[str, Any], ...] = ()  # items of a dict

    @property
    def is_tiny(self) -> bool:
        return (self.d, self.v) == (D, V)


def on_gpu(**cases: Case) -> list:
    """The cases, only for a GPU."""
    skip = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
    return [pytest.param(case, id=name, marks=[pytest.mark.gpu, skip]) for name, case in cases.items()]


def both(**cases: Case) -> list:
    """Each case for a GPU, and its tiny version for any device, without duplicates."""
    tiny = {case._replace(n=min(case.n, N), d=D, v=V, spread=3.0): f"tiny {name}" for name, case in cases.items()}
    return [pytest.param(case, id=name) for case, name in tiny.items()] + on_gpu(**cases)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random inputs made on the device. The two passes are correlated and a third of the targets are the likeliest
    token, so that weights lie at both bounds of the clip and between them.
    """
    g = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=DEVICE)

    hidden = normal(case.n, case.d)
    hidden_cf = (0.7 * hidden + 0.7 * normal(case.n, case.d)).to(case.dtype)
    hidden = hidden.to(case.dtype)
    lm_head = normal(case.v, case.d).mul_(case.spread / case.d**0.5).to(case.dtype)
    bias = normal(case.v).to(case.dtype) if case.bias else None
    target = torch.randint(0, case.v, (case.n,), generator=g, device=DEVICE)
    for third in range(0, case.n, 3 * 1024):
        rows = slice(third, third + 3 * 1024, 3)
        target[rows] = (hidden[rows] @ lm_head.T).argmax(1)
    target[torch.rand(case.n, generator=g, device=DEVICE) < case.ignored] = IGNORE
    return Inputs(hidden, lm_head, target, hidden_cf, bias)


def options_of(case: Case) -> dict[str, Any]:
    """The case's options, with the tensors that they need, made on the device."""
    options = dict(case.options)
    if options.get("normalize") != "sequence":
        return options
    return options | {"seq_id": torch.arange(case.n, device=DEVICE) // max(1, case.n // 7)}


def upstream_of(case: Case, seed: int = 1) -> Tensor:
    """An upstream gradient that scales gradients of a mean to those of a sum, so that errors are well above 1e-5."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    if ("reduction", "none") in case.options:
        return torch.randn(case.n, generator=g, device=DEVICE)
    return torch.full((), 1.7 * case.n, device=DEVICE)
