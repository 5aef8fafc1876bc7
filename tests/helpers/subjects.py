"""The backends as subjects of the contract tests: their inputs, and how accurate they must be.

reference, torch, torch fp64     on the CPU
triton                           fp32, in Triton's interpreter if there is no GPU: a millisecond or two for each
                                 step of a program's loop, so inputs are small
fused, stored                    Triton's ways from 16-bit operands to loss and gradients (tiles.WAYS)
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from perce_kernels.backends import TRITON_FOUND
from tests.helpers import numerics
from tests.helpers.device import DEVICE
from tests.helpers.numerics import Inputs, Result, assert_matches

CPU = torch.device("cpu")
WAYS = ("fused", "stored")
NEEDS_TRITON = pytest.mark.skipif(not TRITON_FOUND, reason="Triton is not installed")
EACH = ["torch", "reference", pytest.param("triton", marks=NEEDS_TRITON)]
"""Backends that a call can name."""
SOURCES = ("hidden_cf", "logp_cf", "token_weight")


@dataclass(frozen=True)
class Subject:
    """A backend, and sizes that are not multiples of blocks: several chunks, the last one partial. The vocabulary is
    longer than one step of the row kernel and one tile of the GEMM, and ends inside one."""

    name: str
    backend: str
    dtype: torch.dtype
    n: int
    d: int = 24
    v: int = 211
    device: torch.device = CPU

    def inputs(self, n: int | None = None, d: int | None = None, v: int | None = None, **options: Any) -> Inputs:
        """numerics.make_inputs with this dtype and device and, by default, these sizes."""
        dtype = options.pop("dtype", self.dtype)
        sizes = (self.n if n is None else n, d or self.d, v or self.v)
        return self.of(numerics.make_inputs(*sizes, dtype=torch.float64, **options).to(dtype))

    def of(self, inputs: Inputs) -> Inputs:
        return replace(inputs, **{name: x.to(self.device) for name, x in inputs.kwargs().items()})

    def with_source(self, inputs: Inputs, source: str) -> tuple[Inputs, dict[str, Tensor]]:
        """The same call with the weights from `hidden_cf`, `logp_cf` or `token_weight`."""
        if source == "hidden_cf":
            return inputs, {}
        values = torch.rand(inputs.target.shape[0], generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        values = (values * (-9 if source == "logp_cf" else 9)).float()
        return replace(inputs, hidden_cf=None), {source: values.to(self.device)}

    def call(self, inputs: Inputs, **options: Any) -> Result:
        return numerics.call(inputs, backend=self.backend, **options)

    def upstream(self, inputs: Inputs, reduction: str = "mean") -> Tensor:
        """A random upstream gradient of the loss."""
        shape = inputs.target.shape if reduction == "none" else ()
        dtype = torch.promote_types(self.dtype, torch.float32)
        return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype).to(self.device)

    def assert_matches(self, result: Result, expected: Result) -> None:
        """Compares with the oracle, with tolerances of the statistics' accuracy, and for gradients of 16-bit inputs of
        their rounding, relative to the largest."""
        if self.dtype in (torch.float32, torch.float64):
            assert_matches(result, expected, self.dtype)
            return
        torch.testing.assert_close(result.loss.double(), expected.loss, rtol=2e-4, atol=4e-6)
        for name, value in result.stats._asdict().items():
            torch.testing.assert_close(value.double(), getattr(expected.stats, name), rtol=2e-4, atol=1e-5)
        for name, wanted in expected.grads.items():
            assert_gradient(result.grads[name], wanted, self.dtype)


def assert_gradient(actual: Tensor, wanted: Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    """Compares a gradient with the oracle's, to the accuracy of its dtype."""
    rtol, atol = 2e-4, 1e-5
    if dtype not in (torch.float32, torch.float64):
        rtol, atol = 2**-8 * slack, 2**-8 * slack * float(wanted.abs().max()) + 1e-9
    torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=atol)


SUBJECTS = {
    "reference": Subject("reference", "reference", torch.float32, 37),
    "torch": Subject("torch", "torch", torch.float32, 37),
    "torch fp64": Subject("torch fp64", "torch", torch.float64, 37),
    "triton": Subject("triton", "triton", torch.float32, 13, device=DEVICE),
    **{way: Subject(way, "triton", torch.bfloat16, 13, device=DEVICE) for way in WAYS},
}
TRITON = SUBJECTS["triton"]


def of_each(names: str, *cases: str | tuple, slow: Iterable[tuple] = ()):
    """Parametrises `subject` and the comma-separated `names` by cases (subject, value, …), and by slow ones whose
    values are covered elsewhere.

    of_each("torch", "triton") has only subjects.
    """
    if names in SUBJECTS:
        names, cases = "", tuple((case,) for case in (names, *cases))
    marked = [*((case, ()) for case in cases), *((case, pytest.mark.slow) for case in slow)]
    named = [pytest.param(*case, id="-".join(map(_id, case)), marks=marks) for case, marks in marked]
    return pytest.mark.parametrize(["subject", *filter(None, names.split(", "))], named, indirect=["subject"])


def _id(value: Any) -> str:
    return ("".join(value) or "plain") if isinstance(value, dict) else str(value).removeprefix("torch.")
