"""The GEMM that writes no logits, tested alone against fp64."""

import itertools

import pytest
import torch

from tests.helpers.device import DEVICE
from tests.helpers.numerics import IGNORE, Inputs, max_error
from tests.helpers.subjects import TRITON

pytest.importorskip("triton")
from perce_kernels import reference
from perce_kernels.gpu import lse_gemm, tiles

pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter_rounds", "memory_is_checked")
TILE = tiles.Tile(16, 32, 16, 4, 1)  # several row tiles, column tiles and steps in D, none of them full
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])


FORMS = {
    "pointers": TILE,
    "descriptors": TILE._replace(use_tma=True),
    "persistent": TILE._replace(persistent=True),
    "halves": TILE._replace(block_n=256, use_tma=True, persistent=True),  # the second half may lie past the end
}
SOME = ("pointers", "halves")  # between them they have every part of every form


def in_some_forms():
    """Parametrises `tile` by those forms, and by the others in slow tests: what is tested is no matter of the form."""
    forms = [pytest.param(form, marks=[pytest.mark.slow] * (form not in SOME)) for form in FORMS]
    return pytest.mark.parametrize("tile", forms, indirect=True)


@pytest.fixture(params=FORMS)
def tile(request, monkeypatch):
    """A small tile, in every form of the kernel."""
    chosen = FORMS[request.param]
    monkeypatch.setattr(
        tiles, "TABLE", [tiles.Row("lse_gemm", tiles.architecture(DEVICE), tiles.HALF + tiles.FULL, chosen)]
    )
    return chosen


def run(inputs: Inputs, *, return_entropy=True, **options):
    head = {"bias": inputs.bias} | options
    return lse_gemm.logprobs(inputs.hidden, inputs.lm_head, inputs.target, return_entropy=return_entropy, **head)[:2]


def expected(inputs: Inputs, **options):
    doubled = inputs.to(torch.float64)
    return reference.logprobs(doubled.hidden, doubled.lm_head, doubled.target, bias=doubled.bias, **options)[:2]


def assert_accurate(inputs: Inputs, error=2e-5, **options):
    for name, actual, wanted in zip(
        ("logp", "entropy"), run(inputs, **options), expected(inputs, **options), strict=True
    ):
        assert actual.dtype == torch.float32
        assert max_error(actual, wanted) <= error, name


OPTIONS = {"plain": {}, "softcap": {"softcap": 4.0}, "scale": {"logit_scale": -0.5}}
OPTIONS["both"] = {"softcap": 4.0, "logit_scale": 1.7}
QUICK = [("plain", False, FP32), *((name, True, FP32) for name in OPTIONS), ("both", True, BF16), ("both", True, FP16)]
ALL = itertools.product(OPTIONS, (False, True), (FP32, BF16, FP16))


@in_some_forms()
@pytest.mark.parametrize(
    ("name", "bias", "dtype"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK)],
    ids=str,
)
def test_options(tile, name, bias, dtype):
    assert_accurate(TRITON.inputs(n=19, bias=bias).to(dtype), **OPTIONS[name])


@pytest.mark.parametrize("n, d, v", [(1, 8, 1), (1, 8, 2), (16, 16, 32), (17, 24, 33), (3, 8, 129), (33, 40, 95)])
def test_sizes(tile, n, d, v):
    assert_accurate(TRITON.inputs(n, d, v, bias=True, ignored=0.0))


@pytest.mark.parametrize("d", [1, 3, 17])
def test_rows_that_no_descriptor_can_hold_are_read_by_pointers(tile, d):
    """Rows of 4, 12 or 68 bytes: the copy engine needs multiples of 16."""
    inputs = TRITON.inputs(5, d, 41)
    assert not lse_gemm._describable(inputs.hidden)
    assert lse_gemm._describable(TRITON.inputs(5, 8, 41).lm_head)
    assert_accurate(inputs)


def test_a_slice_with_an_unaligned_base(tile):
    inputs = TRITON.inputs(9, 16, 70, ignored=0.0)
    wider = torch.zeros(9, 17, device=DEVICE)
    wider[:, 1:] = inputs.hidden
    assert_accurate(Inputs(wider[:, 1:], inputs.lm_head, inputs.target))


@in_some_forms()
@pytest.mark.parametrize("group", [1, 2, 8])
def test_every_tile_is_visited_once_for_any_group(tile, monkeypatch, group):
    row = tiles.TABLE[0]
    monkeypatch.setattr(tiles, "TABLE", [row._replace(tile=tile._replace(group_m=group))])
    assert_accurate(TRITON.inputs(n=50, v=70, ignored=0.0))


@in_some_forms()
@DTYPES
def test_peaked_logits(tile, dtype):
    inputs = TRITON.inputs(n=9, d=64, spread=14.0, ignored=0.0).to(dtype)
    z = reference.logits(inputs.hidden.double(), inputs.lm_head.double(), None, None, 1.0)
    assert z.abs().max() > 40
    assert_accurate(inputs, error=1e-4)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_columns_past_the_vocabulary_add_no_mass(tile, softcap):
    """All logits are near −50: a column counted as 0, or as −cap, would dominate the sum."""
    inputs = TRITON.inputs(n=4, v=45, spread=0.1, bias=True, ignored=0.0)
    inputs.bias.fill_(-50.0)
    assert_accurate(inputs, softcap=softcap)


def test_large_common_offset_cancels(tile):
    inputs = TRITON.inputs(n=4, bias=True, ignored=0.0)
    inputs.hidden.zero_()
    inputs.bias.copy_(torch.randint(-3, 3, inputs.bias.shape) + 65536.0)
    assert_accurate(inputs, error=2e-6)


@in_some_forms()
def test_entries_of_logit_minus_infinity(tile):
    """A whole tile of such entries, then all entries except one."""
    inputs = TRITON.inputs(n=4, bias=True, ignored=0.0)
    inputs.target.fill_(100)
    inputs.bias[:32] = -torch.inf
    assert_accurate(inputs)
    inputs.bias[:100] = -torch.inf
    inputs.bias[101:] = -torch.inf
    assert_accurate(inputs, error=0.0)


@in_some_forms()
@pytest.mark.parametrize("mask", [
    -5e9, pytest.param(-1e10, marks=pytest.mark.slow), pytest.param(-1e30, marks=pytest.mark.slow),
    float(torch.finfo(torch.float32).min),
])  # fmt: skip
def test_entries_masked_by_a_large_number(tile, mask):
    """A whole tile of every width that is tested, and some more entries."""
    inputs = TRITON.inputs(n=4, v=600, bias=True, ignored=0.0)
    inputs.target.fill_(500)
    inputs.bias[:300] = mask
    assert_accurate(inputs)


def test_entropy_where_probabilities_underflow(tile):
    lm_head = torch.zeros(101, 8, device=DEVICE)
    lm_head[0, 0] = 1e4
    hidden = torch.zeros(2, 8, device=DEVICE)
    hidden[0, 0] = 1.0
    _, entropy = run(Inputs(hidden, lm_head, torch.tensor([0, 0], device=DEVICE)))
    torch.testing.assert_close(entropy.cpu(), torch.tensor([0.0, 101.0]).log().clamp(min=0))


@in_some_forms()
def test_without_entropy_the_log_probabilities_are_the_same(tile):
    inputs = TRITON.inputs()
    logp, entropy = run(inputs, return_entropy=False)
    assert entropy is None and torch.equal(logp, run(inputs)[0])


@in_some_forms()
def test_ignored_rows_are_zero_whatever_they_hold(tile):
    inputs = TRITON.inputs()
    ignored = inputs.target == IGNORE
    clean = run(inputs)
    inputs.hidden[ignored] = torch.nan
    for actual, wanted in zip(run(inputs), clean, strict=True):
        assert torch.equal(actual, wanted) and not actual[ignored].any() and actual[~ignored].all()


@pytest.mark.parametrize("token", [211, -1, 223, 2**40, -(2**40)])
def test_a_target_outside_the_vocabulary_poisons_its_row_alone(tile, token):
    inputs = TRITON.inputs(n=4, ignored=0.0)
    inputs.target[1] = token
    logp, entropy = run(inputs)
    assert logp[1].isnan() and logp[[0, 2, 3]].isfinite().all() and entropy.isfinite().all()


def test_nan_in_a_row_stays_in_it(tile):
    inputs = TRITON.inputs(n=4, ignored=0.0)
    inputs.hidden[2, 3] = torch.nan
    logp, entropy = run(inputs)
    assert logp[2].isnan() and entropy[2].isnan() and logp[[0, 1, 3]].isfinite().all()


def test_ignore_index_may_be_a_token(tile):
    assert_accurate(TRITON.inputs(ignore_index=5), ignore_index=5)


def test_no_rows(tile):
    inputs = TRITON.inputs()
    logp, entropy = run(Inputs(inputs.hidden[:0], inputs.lm_head, inputs.target[:0]))
    assert logp.shape == entropy.shape == (0,)


def test_rows_that_lie_over_each_other_are_read_by_pointers(tile):
    """A descriptor treats a stride of 0 as 1: here all tokens have one hidden state, by expand."""
    inputs = TRITON.inputs(n=9, d=16, ignored=0.0)
    expanded = inputs.hidden[:1].expand(9, 16)
    assert lse_gemm._describable(inputs.hidden) and not lse_gemm._describable(expanded)
    assert_accurate(Inputs(expanded, inputs.lm_head, inputs.target))
