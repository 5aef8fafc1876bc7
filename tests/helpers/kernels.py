"""What the tests of backend "triton" share.

Without a GPU they run in Triton's interpreter (conftest.py), on CPU tensors: a millisecond or two for each step of a
program's loop, so that inputs are small. With one they run the compiled kernels.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.helpers import numerics
from tests.helpers.numerics import Inputs, Result

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, D, V = (
    13,
    24,
    211,
)  # V is more than one step of the row kernel and more than one tile of the GEMM, and ends inside one


def make_inputs(n=N, d=D, v=V, **options: Any) -> Inputs:
    """numerics.make_inputs at a size for the interpreter, on the device."""
    return move(numerics.make_inputs(n, d, v, **options))


def move(inputs: Inputs) -> Inputs:
    return replace(inputs, **{name: x.to(DEVICE) for name, x in inputs.kwargs().items()})


def drop_cf(inputs: Inputs) -> Inputs:
    return replace(inputs, hidden_cf=None)


def weights_of(source: str, n: int = N) -> dict[str, Tensor]:
    """The option that says where the weights come from, when it is not hidden_cf."""
    values = torch.rand(n, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    return {} if source == "hidden_cf" else {source: values * (-9 if source == "logp_cf" else 9)}


def with_source(inputs: Inputs, source: str) -> tuple[Inputs, dict[str, Tensor]]:
    return (inputs if source == "hidden_cf" else drop_cf(inputs)), weights_of(source, inputs.target.shape[0])


def call(inputs: Inputs, **options: Any) -> Result:
    """numerics.call with backend "triton"."""
    return numerics.call(inputs, backend="triton", **options)
