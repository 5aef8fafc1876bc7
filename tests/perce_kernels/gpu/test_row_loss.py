"""The row kernel alone: statistics and gradient from given raw products, against fp64."""

import pytest
import torch
from torch import Tensor

from tests.helpers.device import DEVICE

pytest.importorskip("triton")
import triton
import triton.language as tl

from perce_kernels import reference
from perce_kernels.gpu import row_loss

pytestmark = pytest.mark.usefixtures("interpreter_rounds", "memory_is_checked")
IGNORE = -100
NAN = float("nan")


def run(
    x: Tensor,  # (C, V) raw products
    target: Tensor,
    given: Tensor,  # (C,)
    *,
    bias: Tensor | None = None,
    source: str = "logp_cf",
    dtype: torch.dtype | None = torch.float32,
    pitch: int | None = None,
    dz_scale: float | None = None,
    **options,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """(dz, logp, logp_cf, weight). Memory that must not matter is NaN, and the kernel must write nothing else."""
    c, v = x.shape
    pitch = pitch or -(-v // 64) * 64
    z = torch.full((c, pitch), NAN, device=DEVICE)
    z[:, :v] = x
    before = z.clone()
    statistics = [torch.full((c,), NAN, device=DEVICE) for _ in range(3)]
    dz = None if dtype is None else torch.full((c, pitch), NAN, dtype=dtype, device=DEVICE)
    scale = None if dz_scale is None else torch.tensor(dz_scale, device=DEVICE)
    options = {"clip_min": 0.8, "clip_max": 5.0, "ignore_index": IGNORE} | options
    moved = [None if t is None else t.to(DEVICE) for t in (target, given, bias)]
    row_loss.row_loss(z, *moved, scale, dz, *statistics, v=v, source=source, **options)
    assert z.view(torch.int32).equal(before.view(torch.int32)), "logits are only read"
    assert dz is None or dz[:, v:].isnan().all(), "nothing is written between the end of a row and the next row"
    return None if dz is None else dz[:, :v].cpu(), *(t.cpu() for t in statistics)


def expected(
    x, target, given, *, bias=None, source="logp_cf", contrast="log", clip_min=0.8, clip_max=5.0, softcap=None,
    logit_scale=1.0,
):  # fmt: skip
    """(dz, logp, logp_cf, weight) in fp64 by autograd."""
    valid = target != IGNORE
    x = x.double().requires_grad_()
    z = logit_scale * (x if bias is None else x + bias.double())
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = torch.where(valid, z.log_softmax(1).gather(1, torch.where(valid, target, 0)[:, None])[:, 0], 0)
    logp_cf = torch.zeros(x.shape[0], dtype=torch.float64)
    if source == "token_weight":
        weight = given.double()
    else:
        logp_cf = given.double()
        weight = reference.contrast_weight(logp, logp_cf, contrast, clip_min, clip_max)
    weight, logp_cf = torch.where(valid, weight, 0), torch.where(valid, logp_cf, 0)
    (dx,) = torch.autograd.grad(-(weight * logp).sum(), x)
    return dx, logp.detach(), logp_cf, weight


def assert_close(actual, wanted, dtype=torch.float32):
    rtol = {torch.float32: 2e-5, torch.bfloat16: 2**-8 + 2e-5, torch.float16: 2**-11 + 2e-5}[dtype]
    for name, a, b in zip(("dz", "logp", "logp_cf", "weight"), actual, wanted, strict=False):
        loose = name == "dz"
        torch.testing.assert_close(
            a.double(), b, rtol=rtol if loose else 2e-5, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def products(c, v, spread=4.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(c, v, generator=g) * spread
    target = torch.randint(0, v, (c,), generator=g)
    target[::2] = x.argmax(1)[::2]
    return x, torch.rand(c, generator=g) * -9, target, torch.randn(v, generator=g)


OPTIONS = {
    "paper": {},
    "ratio": {"contrast": "ratio", "clip_min": 0.0},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": -0.7},
    "softcap and scale": {"softcap": 5.0, "logit_scale": 1.3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", OPTIONS)
def test_statistics_and_gradient(name, biased, dtype):
    x, given, target, bias = products(6, 211)
    target[3] = IGNORE
    options = OPTIONS[name] | ({"bias": bias} if biased else {})
    assert_close(run(x, target, given, dtype=dtype, **options), expected(x, target, given, **options), dtype)


@pytest.mark.parametrize("contrast", ["log", "ratio"])
@pytest.mark.parametrize("source", ["logp_cf", "token_weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_given_per_token(source, contrast, dtype):
    x, _, target, _ = products(5, 130)
    given = (torch.rand(5) * (-6 if source == "logp_cf" else 9)).to(dtype)
    options = {"source": source, "contrast": contrast}
    assert_close(run(x, target, given, **options), expected(x, target, given, **options))


@pytest.mark.parametrize("v", [1, 2, 63, 127, 128, 129, 256, 300])
@pytest.mark.parametrize("own_pitch", [False, True], ids=["padded", "pitch V"])
def test_vocabularies_that_are_multiples_of_nothing(v, own_pitch):
    x, given, target, _ = products(3, v, seed=v)
    target[1] = v - 1
    ours = run(x, target, given, pitch=v if own_pitch else None, softcap=6.0)
    assert_close(ours, expected(x, target, given, softcap=6.0))


def test_statistics_alone():
    x, given, target, _ = products(3, 211)
    target[1] = IGNORE
    dz, *statistics = run(x, target, given, dtype=None)
    assert dz is None
    for actual, wanted in zip(statistics, expected(x, target, given)[1:], strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_peaked_row_and_columns_past_the_vocabulary(softcap):
    """All logits but one are near −50: columns past V counted as 0, or as −cap, would dominate the sum."""
    x = torch.full((2, 131), -50.0)
    x[:, 7] = torch.tensor([-20.0, -49.0])
    target = torch.tensor([7, 8])
    given = torch.tensor([-3.0, -5.0])
    assert_close(run(x, target, given, softcap=softcap), expected(x, target, given, softcap=softcap))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("margin", [8.0, 12.0, 14.0])
def test_the_target_of_a_nearly_certain_row_keeps_its_digits(margin, dtype):
    """p_y − 1 = −8e-5 at a margin of 14: if p_y is rounded to bf16, for example in memory, nothing of it is left."""
    x = torch.zeros(1, 101)
    x[0, 0] = margin
    target, one = torch.tensor([0]), torch.ones(1)
    dz, *_ = run(x, target, one, source="token_weight", dtype=dtype)
    wanted, *_ = expected(x, target, one, source="token_weight")
    assert 0 < -float(wanted[0, 0]) < 0.04
    torch.testing.assert_close(dz.double(), wanted, rtol=5e-3, atol=0)


@triton.jit
def expm1_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, row_loss.expm1(tl.load(x_ptr + offs)))


def test_expm1_keeps_every_digit():
    """exp(x) − 1 is 5 % off at −1e-6 and has no correct digit below 6e-8."""
    x = -torch.logspace(-12, 2, 1024, dtype=torch.float64).float().to(DEVICE)
    y = torch.full_like(x, NAN)
    expm1_kernel[(1,)](x, y, BLOCK=1024)
    torch.testing.assert_close(y.double(), x.double().expm1(), rtol=5e-7, atol=0)
    expm1_kernel[(1,)](torch.zeros_like(x), y, BLOCK=1024)
    assert not y.any()


def test_a_large_common_offset_cancels():
    x, given, target, _ = products(4, 211)
    x = x.mul(4).round()
    assert_close(run(x + 65536, target, given), expected(x, target, given))


@pytest.mark.parametrize("token", [0, 140])
def test_an_entry_of_logit_minus_infinity(token):
    """One entry, and a whole first step of 128 entries, masked."""
    x, given, target, _ = products(4, 211)
    target[:] = 150
    for masked in (slice(token, token + 1), slice(0, 128)):
        x[:, masked] = -torch.inf
        dz, *statistics = run(x, target, given)
        assert not dz[:, masked].any()
        wanted = expected(x, target, given)
        assert_close((dz, *statistics), (wanted[0].nan_to_num(0.0), *wanted[1:]))


MASKS = (-5e9, -1e10, -1e20, -1e30, float(torch.finfo(torch.float32).min), -torch.inf)
"""Numbers that programs add to logits to mask them."""


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("masked", [slice(0, 4), slice(0, 128), slice(64, 140), slice(250, 300)], ids=str)
def test_masked_entries(mask, masked):
    """The masked entries are a thread's four, a step's, some of two steps', or the last ones; a maximum over masked
    entries only is far from every real logit."""
    x, given, target, _ = products(3, 300)
    target[:] = 200
    x[:, masked] = mask
    dz, *statistics = run(x, target, given)
    assert not dz[:, masked].any()
    wanted = expected(x, target, given)
    assert_close((dz, *statistics), (wanted[0].nan_to_num(0.0), *wanted[1:]))


def test_an_ignored_row_is_not_read():
    x, given, target, _ = products(4, 211)
    target[1] = IGNORE
    clean = run(x, target, given)
    x[1] = NAN
    for actual, wanted in zip(run(x, target, given), clean, strict=True):
        assert torch.equal(actual, wanted) and not actual[1].any()
    given = torch.tensor([1.0, NAN, 2.0, 3.0])
    for source in ("logp_cf", "token_weight"):
        dz, *statistics = run(x, target, given, source=source)
        assert dz.isfinite().all() and not dz[1].any() and all(t.isfinite().all() and t[1] == 0 for t in statistics)


@pytest.mark.parametrize("token", [211, -1, 2**40, -(2**40)])
@pytest.mark.parametrize("source", ["logp_cf", "token_weight"])
def test_a_target_outside_the_vocabulary_poisons_its_row_alone(source, token):
    x, _, target, _ = products(3, 211)
    target[1] = token
    dz, logp, _, weight = run(x, target, torch.ones(3), source=source)
    assert dz[1].isnan().all() and logp[1].isnan() and weight[1].isnan()
    assert all(t[[0, 2]].isfinite().all() for t in (dz, logp, weight))


def test_a_nan_contrast_is_not_hidden_behind_the_clip():
    x, _, target, _ = products(2, 130)
    *_, weight = run(x, target, torch.tensor([NAN, 0.0]))
    assert weight[0].isnan() and weight[1] == torch.tensor(0.8)


def test_clip_bounds_are_reached_exactly():
    x, _, target, _ = products(2, 130)
    *_, weight = run(x, target, torch.tensor([-100.0, 100.0]), clip_min=0.3, clip_max=2.7)
    assert torch.equal(weight, torch.tensor([2.7, 0.3]))


def test_dz_scale_moves_the_gradient_alone():
    x, given, target, _ = products(3, 130)
    plain, scaled = run(x, target, given), run(x, target, given, dz_scale=2.0**-9)
    assert torch.equal(scaled[0] * 2**9, plain[0])
    assert all(torch.equal(a, b) for a, b in zip(scaled[1:4], plain[1:4], strict=True))


def test_no_rows():
    assert run(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), torch.zeros(0))[1].shape == (0,)
