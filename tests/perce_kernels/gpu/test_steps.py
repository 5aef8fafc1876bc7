"""Properties of single ways from 16-bit operands to loss and gradients (tiles.WAYS).

What holds for all of them is tested in tests/perce_kernels/test_loss.py.
"""

import gc

import pytest
import torch

from tests.helpers.device import DEVICE
from tests.helpers.numerics import IGNORE, Inputs, beneath, oracle, strided

pytest.importorskip("triton")
from perce_kernels.gpu import blocked, driver, lse_gemm, row_loss, steps, stored_rows, tiles
from perce_kernels.gpu.cut import Cut
from tests.helpers.driver import CUT, watching  # noqa: F401  fixtures
from tests.helpers.subjects import SUBJECTS, TRITON

D, N, V = TRITON.d, TRITON.n, TRITON.v
pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter_rounds", "several_chunks", "way")


ARCHITECTURE = tiles.architecture(DEVICE)

TILE = tiles.find("store_gemm", ARCHITECTURE, torch.bfloat16)

TILE_COLUMNS = TILE.statistics_columns

SHIPPED = dict(tiles.WAY)
assert_close = SUBJECTS["fused"].assert_matches


@pytest.fixture(scope="module", params=tiles.WAYS)
def way(request):
    """The way in use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiles.WAY, ARCHITECTURE, request.param)
        yield request.param


def only(*ways: str):
    """Restricts a test to ways with a property that the others lack."""
    return pytest.mark.parametrize("way", ways, indirect=True, scope="module")


@only("fused")
def test_an_architecture_that_was_not_measured_uses_cublas(way):
    assert SHIPPED.keys() == {row.arch for row in tiles.TABLE}
    assert {arch for arch, shipped in SHIPPED.items() if shipped != "fused"} == {"sm_90"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_way_that_is_taken(monkeypatch, way, dtype):
    took = []
    for module, name in ((blocked, "statistics"), (lse_gemm, "statistics"), (row_loss, "row_loss"),
                         (stored_rows, "stored_gradient")):  # fmt: skip
        run = getattr(module, name)
        spy = lambda *args, run=run, module=module, **rest: took.append(module) or run(*args, **rest)  # noqa: E731
        monkeypatch.setattr(module, name, spy)
    inputs = TRITON.inputs(n=2, ignored=0.0).to(dtype)
    TRITON.call(inputs)
    cublas = [blocked, row_loss]
    expected = {"fused": cublas, "stored": [lse_gemm, lse_gemm, stored_rows]}
    assert took == (expected[way] if dtype == torch.bfloat16 else cublas)
    took.clear()
    TRITON.call(Inputs(inputs.hidden, inputs.lm_head.T.contiguous().T, inputs.target, inputs.hidden_cf))
    assert took == cublas, "cuBLAS runs if a transposed head would have to be copied"


def test_the_softcap_bends_the_target_by_its_fp32_logit():
    """z = (18.856, …, −19.281) under a cap of 20: −38.136 is stored as −38.25, with which it would be 16 % off."""
    lm_head = torch.zeros(101, 2)
    lm_head[70, 0], lm_head[75, 0] = 35.25, -40.0
    inputs = Inputs(torch.tensor([[1.0, 0.0]]), lm_head, torch.tensor([75]), None, torch.zeros(101)).to(torch.bfloat16)
    inputs = Inputs(*(None if x is None else x.to(DEVICE) for x in vars(inputs).values()))
    options = {"token_weight": torch.ones(1, device=DEVICE), "softcap": 20.0}
    actual, expected = TRITON.call(inputs, **options).grads["bias"], oracle(inputs, **options).grads["bias"]
    torch.testing.assert_close(actual[75].double(), expected[75], rtol=2**-8, atol=0)


def test_a_large_common_offset_cancels():
    inputs = TRITON.inputs(n=4, bias=True, ignored=0.0)
    inputs.hidden.zero_()
    inputs.hidden_cf.zero_()
    inputs.bias.copy_(torch.randint(-3, 3, inputs.bias.shape))
    expected = oracle(inputs)
    inputs.bias.add_(65536.0)
    moved = inputs.to(torch.bfloat16)
    moved = Inputs(moved.hidden, moved.lm_head, moved.target, moved.hidden_cf, inputs.bias)  # an fp32 bias
    actual, wanted = TRITON.call(moved).grads["bias"], expected.grads["bias"]
    torch.testing.assert_close(actual.double(), wanted, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("compact", [True, False])
def test_vocabulary_masked_by_an_infinite_bias(compact):
    """A whole tile, and a single entry."""
    inputs = TRITON.inputs(bias=True)
    inputs.target[(inputs.target >= 0) & (inputs.target < TILE_COLUMNS)] = V - 1
    inputs.bias[:TILE_COLUMNS] = -torch.inf
    inputs.bias[100] = -torch.inf
    inputs.target[inputs.target == 100] = 101
    inputs = inputs.to(torch.bfloat16)
    result = TRITON.call(inputs, compact=compact)
    assert result.grads["lm_head"].isfinite().all()
    assert_close(result, oracle(inputs))


@pytest.mark.parametrize("mask", [-1e10, -1e30])
def test_vocabulary_masked_by_a_large_number(mask):
    """As the padding of a vocabulary is masked: 128 entries and more."""
    inputs = TRITON.inputs(v=300, bias=True)
    inputs.target[inputs.target > 150] = 150
    inputs.bias[151:] = mask
    inputs = inputs.to(torch.bfloat16)
    result = TRITON.call(inputs)
    assert result.grads["lm_head"].isfinite().all() and not result.grads["bias"][151:].any()
    assert_close(result, oracle(inputs))


@pytest.mark.parametrize("source", ["hidden_cf", "logp_cf", "token_weight"])
def test_a_target_outside_the_vocabulary_poisons_its_row_alone(monkeypatch, source):
    monkeypatch.setattr("perce_kernels.contract.check_target", lambda *_: None)
    inputs, weights = TRITON.with_source(TRITON.inputs(n=3, ignored=0.0).to(torch.bfloat16), source)
    inputs.target[1] = V
    out = driver.sweep(*beneath(inputs, weights=weights, compact=False))
    for x in (out.logp, out.token_weight, out.dhidden[:, 0]):
        assert x.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("compact", [True, False])
def test_faint_fp16_gradients_survive(way, compact):
    """p below 6e-8 would be 0 in an fp16 dz. It is scaled up, and the upstream gradient 65536 makes it a normal number.

    With stored logits, each term has an error of u · |s| with |s| ≤ 40, because faint entries are far below the
    maximum; terms of several rows cancel.
    """
    inputs = TRITON.inputs(n=7, d=8, spread=8.0, bias=True).to(torch.float16)
    options = {"upstream": 65536.0, "num_items": 100}
    result, expected = TRITON.call(inputs, compact=compact, **options), oracle(inputs, **options)
    wanted = expected.grads["lm_head"]
    faint = (wanted * 100 / 65536).half() == 0
    assert (faint & (wanted.abs() > 1e-5)).float().mean() > 0.02
    if way == "stored":
        faint &= wanted.abs() > 1e-5
    rtol, atol = (40 * 2**-11, 4e-6) if way == "stored" else (4e-3, 1e-6)
    torch.testing.assert_close(result.grads["lm_head"][faint].double(), wanted[faint], rtol=rtol, atol=atol)
    for name, wanted in expected.grads.items():
        atol = 1e-3 * float(wanted.abs().max())
        torch.testing.assert_close(result.grads[name].double(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("compact", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("clip", [5.0, 1e5], ids=["weight from upstream", "weight from clip"])
def test_fp16_weights_beyond_fp16(compact, clip):
    """w·65536 in the backward of reduction="none", and a huge clip, exceed fp16's 65504 in dz, but gradients do not."""
    inputs = TRITON.inputs(n=7, d=8, spread=0.02)
    inputs.hidden.mul_(0.02)
    inputs = inputs.to(torch.float16)
    inputs.hidden[inputs.target == IGNORE] = torch.nan
    options = {"upstream": 65536.0, "reduction": "none"} if clip == 5.0 else {"clip_min": clip, "clip_max": clip}
    result, expected = TRITON.call(inputs, compact=compact, **options), oracle(inputs, **options)
    for name, wanted in expected.grads.items():
        assert float(wanted.abs().max()) < 65504
        atol = 2e-3 * float(wanted.abs().max())
        torch.testing.assert_close(result.grads[name].double(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "block, chunk",
    [(1, 1), (100, 3), *(pytest.param(*cut, marks=pytest.mark.slow) for cut in ((4, 4), (7, 3), (100, 100)))],
)
def test_blocks_and_chunks_of_any_size(monkeypatch, block, chunk):
    """One token at a time, one chunk per block, and sizes above the number of tokens."""
    inputs = TRITON.inputs(bias=True).to(torch.bfloat16)
    monkeypatch.setattr(driver, "cut_of", lambda *_: Cut(block, chunk))
    assert_close(TRITON.call(inputs), oracle(inputs))


def test_expanded_and_strided_inputs():
    """Rows that overlap in memory, which no descriptor can describe; and every other column."""
    inputs = TRITON.inputs(d=16, bias=True).to(torch.bfloat16)
    one_row = Inputs(inputs.hidden[:1].expand(N, 16), inputs.lm_head, inputs.target, inputs.hidden_cf[:1].expand(N, 16))
    assert not lse_gemm._describable(one_row.hidden) and lse_gemm._describable(inputs.hidden)
    for compact in (True, False):
        assert_close(TRITON.call(one_row, compact=compact), oracle(one_row))
    everywhere = Inputs(
        *(strided(getattr(inputs, name)) for name in ("hidden", "lm_head", "target", "hidden_cf", "bias"))
    )
    assert_close(TRITON.call(everywhere), oracle(inputs))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="looks at the CPU's products")
@pytest.mark.parametrize(
    ("source", "compact", "needed"),
    [("hidden_cf", True, (True, True, True)), ("hidden_cf", False, (False, True, False)),
     ("token_weight", False, (True, False, False)), ("hidden_cf", True, (False, False, False))],
)  # fmt: skip
def test_peak_bytes_follow_the_formula(watch, monkeypatch, way, source, compact, needed):
    """cuBLAS's products are replaced by zeros, because a CPU upcasts their operands, which no GPU does."""
    n, d, v = 11, 16, 509
    # The interpreter's launches leave their arguments in a reference cycle.
    for module, name in ((lse_gemm, "statistics"), (row_loss, "row_loss"), (blocked, "row_parts")):
        run = getattr(module, name)
        collecting = lambda *args, run=run, **options: (gc.collect(), run(*args, **options))[1]  # noqa: E731
        monkeypatch.setattr(module, name, collecting)
    for module in (driver, steps, blocked):
        monkeypatch.setattr(module, "product", lambda a, b, out, add=False: out.zero_())
    inputs, weights = TRITON.with_source(
        TRITON.inputs(n, d, v, bias=True).to(torch.float16), source
    )  # rounding to bf16 allocates
    gc.collect()
    with watch:
        out = driver.sweep(*beneath(inputs, compact=compact, needed=needed, weights=weights))
    rows = int((inputs.target != IGNORE).sum()) if compact else n
    expected = driver.extra_bytes(
        rows, d, v, 2, cut=CUT, way=way, passes=2 if source == "hidden_cf" else 1, gathered=rows < n,
        masked=not compact, needed=needed,
    )  # fmt: skip
    extra = watch.peak - sum(x.untyped_storage().nbytes() for x in out)
    assert expected - v * 4 * needed[2] <= extra <= expected + 40 * n
    assert extra < CUT.block * v * 4 + 3000 * (way != "stored"), "fp32 logits of a block would exceed the limit"
