"""Products: where operands are copied first, the pitch of logits, and the user's settings for the precision, which the
op ignores, lets be read, and restores."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from perce_kernels.product import can_widen, full_fp32_matmul, pitch
from tests.helpers.numerics import TRAINABLE, Inputs, call, make_inputs

V = 211


def test_pitch():
    assert [pitch(v) for v in (0, 1, 64, 65, 128256, 50257)] == [64, 64, 64, 128, 128256, 50304]


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "can"),
    [("cpu", None, torch.bfloat16, False), ("mps", None, torch.float16, False), ("cuda", (7, 5), torch.float16, True),
     ("cuda", (7, 5), torch.bfloat16, False), ("cuda", (8, 0), torch.bfloat16, True)],
)  # fmt: skip
def test_where_16_bit_products_can_have_fp32_results(monkeypatch, device, capability, dtype, can):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert can_widen(SimpleNamespace(device=torch.device(device), dtype=dtype)) == can


@contextmanager
def matmul_precision(precision: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("setting", ["none", "high", "medium", "allow_tf32", "fp32_precision"])
def test_the_scoped_precision_can_be_read_inside_it(setting):
    """torch refuses to read the older setting if the newer one differs; TunableOp's products read it too."""
    matmul = torch.backends.cuda.matmul
    ways = matmul, torch.backends.mkldnn.matmul

    def newer() -> list[str]:
        return [way.fp32_precision for way in ways]

    with matmul_precision("highest"):
        unset = newer()
        if setting == "allow_tf32":
            matmul.allow_tf32 = True
        elif setting == "fp32_precision":
            matmul.fp32_precision = "tf32"
        elif setting != "none":
            torch.set_float32_matmul_precision(setting)
        before = newer()
        with full_fp32_matmul():
            assert matmul.allow_tf32 is False and torch.get_float32_matmul_precision() == "highest"
            assert newer() == ["ieee", "ieee"]
        assert newer() == before and (before == unset) == (setting == "none")
        if setting == "fp32_precision":  # as before the call: the older setting differs
            with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
                _ = matmul.allow_tf32
        else:
            assert matmul.allow_tf32 is (setting != "none")
            assert torch.get_float32_matmul_precision() == {"none": "highest", "allow_tf32": "high"}.get(
                setting, setting
            )
        for way, precision in zip(ways, unset, strict=True):
            way.fp32_precision = precision


def test_an_inherited_matmul_precision_goes_on_following_the_global_one():
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        call(make_inputs())
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before


def test_reduced_matmul_precision_is_ignored_and_left_as_it_was():
    inputs = make_inputs(n=64, d=256, v=1031, bias=True)
    expected, product = call(inputs), inputs.hidden @ inputs.lm_head.T
    with matmul_precision("medium"):
        reduced = inputs.hidden @ inputs.lm_head.T
        result = call(inputs)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.equal(inputs.hidden @ inputs.lm_head.T, reduced)
        with pytest.raises(ValueError, match="target"):
            call(Inputs(inputs.hidden, inputs.lm_head, inputs.target + V * 9, inputs.hidden_cf))
        assert torch.get_float32_matmul_precision() == "medium"
    if torch.equal(product, reduced):
        pytest.skip('this CPU computes the same product under "medium": nothing to ignore')
    assert torch.equal(result.loss, expected.loss)
    assert all(torch.equal(result.grads[name], expected.grads[name]) for name in TRAINABLE)


def test_threads_share_the_precision_and_the_last_one_restores_it():
    """If each saved and restored it alone, the second would save the first one's setting, and restore that for good."""
    entered, leave = threading.Barrier(3), [threading.Event(), threading.Event()]

    def inside(number):
        with full_fp32_matmul():
            entered.wait(20)
            leave[number].wait(20)

    with matmul_precision("high"):
        threads = [threading.Thread(target=inside, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        entered.wait(20)
        leave[0].set()
        threads[0].join(20)
        assert torch.get_float32_matmul_precision() == "highest", "the other one is inside"
        leave[1].set()
        threads[1].join(20)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cuda.matmul.allow_tf32


def test_settings_that_cannot_be_set_are_left_as_they_were(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision, matmul.allow_fp16_accumulation
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "get_float32_matmul_precision", interrupted)
        with full_fp32_matmul():
            pass
    assert (matmul.fp32_precision, matmul.allow_fp16_accumulation) == before
    with full_fp32_matmul():
        assert matmul.fp32_precision == "ieee"


@pytest.mark.parametrize("allowed", [True, False])
def test_products_of_fp16_are_accumulated_in_fp32(allowed):
    """With fp16 accumulation allowed, cuBLAS refuses fp16 products with fp32 results."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_accumulation
    matmul.allow_fp16_accumulation = allowed
    try:
        with full_fp32_matmul():
            assert matmul.allow_fp16_accumulation is False
        assert matmul.allow_fp16_accumulation is allowed
    finally:
        matmul.allow_fp16_accumulation = before
