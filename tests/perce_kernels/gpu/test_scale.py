"""Multiplying by the upstream gradient and casting to the inputs' dtype gives the same bits as torch.mul."""

import pytest
import torch

pytest.importorskip("triton")
from perce_kernels import chunked
from perce_kernels.gpu import driver
from perce_kernels.gpu.scale import BLOCK
from tests.helpers.device import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter_rounds", "memory_is_checked")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(0,), (), (3,), (7, 1000), (2, BLOCK)], ids=str)
def test_every_entry_is_rounded_once(shape, dtype):
    g = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(shape, generator=g, device=DEVICE)
    factor = torch.tensor(0.37, device=DEVICE)
    actual = driver.scaled(x, factor, dtype)
    assert actual.dtype == dtype and actual.shape == x.shape
    torch.testing.assert_close(actual, chunked.scaled(x, factor, dtype), rtol=0, atol=0)
    torch.testing.assert_close(actual, (x * factor).to(dtype), rtol=0, atol=0)


def test_what_is_not_a_number_stays_so():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-45, 3e38], device=DEVICE)
    for factor in (1.0, 0.0, 2.0, torch.nan):
        upstream = torch.tensor(factor, device=DEVICE)
        torch.testing.assert_close(
            driver.scaled(x, upstream, torch.float32), x * factor, rtol=0, atol=0, equal_nan=True
        )


def test_fp64_keeps_its_digits():
    x, factor = (
        torch.rand(5, dtype=torch.float64, device=DEVICE),
        torch.tensor(1 / 3, dtype=torch.float64, device=DEVICE),
    )
    assert torch.equal(driver.scaled(x, factor, torch.float64), x * factor)
