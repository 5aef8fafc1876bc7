"""Backend "triton" at the sizes of real models: values and gradients against fp64, and sizes past 2³¹.

Every test runs twice: on a GPU at those sizes (marked `gpu`; `make gpu-b`), and on any device at tiny ones.
"""

import pytest
import torch
from torch import Tensor

from tests.helpers import cases
from tests.helpers.cases import Case, both, on_gpu, options_of, upstream_of
from tests.helpers.device import DEVICE, free
from tests.helpers.numerics import IGNORE, TRAINABLE, Result, assert_as_accurate_as_torch, eager, max_error, oracle
from tests.helpers.oracle import blockwise
from tests.helpers.subjects import TRITON

pytest.importorskip("triton")
from perce_kernels import reference, token_logprobs
from perce_kernels.gpu import driver
from perce_kernels.gpu.cut import Cut
from tests.helpers import oracle as oracle_module

pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter_rounds")


@pytest.fixture
def case(request, monkeypatch) -> Case:
    """The case, with chunks so small that a tiny case has several."""
    if request.param.is_tiny:
        monkeypatch.setattr(driver, "cut_of", lambda *_: Cut(*cases.CUT))
        monkeypatch.setattr(driver, "LOGPROB_ROWS", cases.CHUNK)
        monkeypatch.setattr(oracle_module, "BLOCK_BYTES", cases.CHUNK * request.param.v * 8)
    yield request.param
    free()


def assert_statistics(ours: Result, expected: Result) -> None:
    """Asserts log-probabilities and PIR to 1e-3, for logits up to 50; weights and loss to what follows from that."""
    for name in ("logp", "logp_cf", "pir"):
        assert max_error(getattr(ours.stats, name), getattr(expected.stats, name)) <= 1e-3, name
    assert max_error(ours.stats.token_weight, expected.stats.token_weight) <= 2e-3
    # |δ(w·logp)| ≤ w·δlogp + |logp|·δw; in a mean or sum, errors of both signs cancel.
    rtol, atol = (1e-3, 0.06) if ours.loss.dim() else (2e-4, 0.0)
    torch.testing.assert_close(ours.loss.double(), expected.loss, rtol=rtol, atol=atol)


NONE = (("reduction", "none"),)
BATCH = (("normalize", "batch"),)
CAPPED = (("softcap", 30.0), ("logit_scale", 1.3))
ACCURACY = both(
    llama=Case(4096, *cases.LLAMA),
    llama_none=Case(1021, *cases.LLAMA, bias=True, options=NONE),
    llama_one_token=Case(1, *cases.LLAMA, ignored=0.0),
    llama_70b=Case(1024, *cases.LLAMA_70B, options=BATCH),
    qwen_fp16=Case(2048, *cases.QWEN, torch.float16, bias=True, options=BATCH),
    qwen_fp16_none=Case(300, *cases.QWEN, torch.float16, options=NONE + CAPPED),
    qwen_fp32=Case(512, *cases.QWEN, torch.float32, bias=True, options=CAPPED),
    gemma=Case(2048, *cases.GEMMA, options=(("softcap", 30.0), ("normalize", "sequence"))),
    gemma_fp32_none=Case(257, *cases.GEMMA, torch.float32, options=NONE),
    llama_masked=Case(2000, *cases.LLAMA, bias=True, options=(*CAPPED, ("compact", False))),
)


@pytest.mark.parametrize("case", ACCURACY, indirect=True)
def test_statistics_and_gradients(case):
    inputs, upstream, options = cases.make_inputs(case), upstream_of(case), options_of(case)
    ours = TRITON.call(inputs, upstream=upstream, **options)
    options = {name: value for name, value in options.items() if name != "compact"}
    expected = blockwise(inputs, upstream=upstream, **options)
    assert_statistics(ours, expected)
    in_torch = eager(inputs, upstream=upstream, **options)
    for name, gradient in ours.grads.items():
        assert gradient.dtype == case.dtype
        wanted = expected.grads[name]
        # The documented 1e-5 is for gradients of a mean; for these gradients of a sum it is relative to the largest.
        floor = 1e-5 * max(1.0, float(wanted.abs().max()))
        assert_as_accurate_as_torch(f"d{name}", gradient, in_torch.grads[name], wanted, floor=floor)


@pytest.mark.parametrize("case", on_gpu(llama=Case(4096, *cases.LLAMA), gemma=Case(2048, *cases.GEMMA)), indirect=True)
def test_the_inputs_are_peaked_and_their_weights_everywhere(case):
    inputs = cases.make_inputs(case)
    z = inputs.hidden[:512] @ inputs.lm_head.T
    assert 40 < float(z.abs().max()) < 70
    weight = TRITON.call(inputs).stats.token_weight[inputs.target != IGNORE]
    assert (weight == 0.8).any() and (weight == 5.0).any() and ((weight > 0.8) & (weight < 5.0)).any()


def row_errors(actual: Tensor, expected: Tensor) -> float:
    """Largest error of each row, relative to the largest row."""
    error = (actual.double() - expected).norm(dim=1)
    return float(error.max() / expected.norm(dim=1).max())


PAST_INT32 = both(
    more_logits=Case(65536, *cases.QWEN),  # N·V ≈ 10¹⁰
    larger_head=Case(300, 8192, 270000, bias=True),  # V·D ≈ 2.2·10⁹
)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", PAST_INT32, indirect=True)
def test_more_entries_than_int32_counts(case, reduction):
    """Eager PyTorch does not fit here, so the tolerance is bf16's rounding; targets and the vocabulary's end are
    compared."""
    case = case._replace(options=(("reduction", reduction),))
    inputs, upstream = cases.make_inputs(case), upstream_of(case)
    ours = TRITON.call(inputs, upstream=upstream, **dict(case.options))
    targets = inputs.target[inputs.target != IGNORE][-500:]
    sample = torch.cat([targets, torch.arange(max(0, case.v - 1000), case.v, device=DEVICE)]).unique()
    expected = blockwise(inputs, upstream=upstream, vocabulary_rows=sample, **dict(case.options))
    assert_statistics(ours, expected)
    assert row_errors(ours.grads["hidden"], expected.grads["hidden"]) < 2**-6
    assert row_errors(ours.grads["lm_head"][sample], expected.grads["lm_head"]) < 2**-6
    if case.bias:
        torch.testing.assert_close(ours.grads["bias"].double(), expected.grads["bias"], rtol=2**-6, atol=2**-4)


LOGPROBS = both(
    llama=Case(20000, *cases.LLAMA),
    qwen_fp16=Case(9000, *cases.QWEN, torch.float16, bias=True, options=CAPPED),
    qwen_fp32=Case(257, *cases.QWEN, torch.float32),
    gemma_one_token=Case(1, *cases.GEMMA, ignored=0.0, options=CAPPED),
)


@pytest.mark.parametrize("case", LOGPROBS, indirect=True)
def test_token_logprobs_and_entropy(case):
    inputs = cases.make_inputs(case)
    options = dict(case.options) | {"bias": inputs.bias}
    logp, entropy = token_logprobs(
        inputs.hidden, inputs.lm_head, inputs.target, return_entropy=True, backend="triton", **options
    )
    lm_head = inputs.lm_head.double()
    options["bias"] = None if inputs.bias is None else inputs.bias.double()
    for start in range(0, case.n, 512):
        rows = slice(start, start + 512)
        expected = reference.logprobs(inputs.hidden[rows].double(), lm_head, inputs.target[rows], **options)
        assert max_error(logp[rows], expected[0]) <= 1e-3
        assert max_error(entropy[rows], expected[1]) <= 1e-3


EMPTY = both(all_ignored=Case(1000, *cases.LLAMA, ignored=1.1, bias=True), no_tokens=Case(0, *cases.LLAMA, bias=True))


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "masked"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", EMPTY, indirect=True)
def test_nothing_to_learn(case, reduction, compact):
    result = TRITON.call(cases.make_inputs(case), reduction=reduction, compact=compact)
    assert not result.loss.any()
    for name in TRAINABLE:
        assert not result.grads[name].any()


ORACLE_OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "batch": {"normalize": "batch"},
    "sequence": {"normalize": "sequence"},
    "capped": {"softcap": 4.0, "logit_scale": -1.7},
}


@pytest.mark.parametrize("name", ORACLE_OPTIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_the_blockwise_oracle_is_the_oracle(monkeypatch, name, bias):
    case = Case(13, 24, 211, torch.float32, bias=bias, spread=3.0, options=tuple(ORACLE_OPTIONS[name].items()))
    monkeypatch.setattr(oracle_module, "BLOCK_BYTES", cases.CHUNK * 211 * 8)
    inputs, upstream, options = cases.make_inputs(case), upstream_of(case), options_of(case)
    sample = torch.tensor([3, 4, 200], device=DEVICE)
    actual, wanted = blockwise(inputs, upstream=upstream, **options), oracle(inputs, upstream=upstream, **options)
    partial = blockwise(inputs, upstream=upstream, vocabulary_rows=sample, **options).grads["lm_head"]
    torch.testing.assert_close(partial, wanted.grads["lm_head"][sample], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(actual.loss, wanted.loss, rtol=1e-9, atol=1e-11)
    for key in wanted.grads:
        torch.testing.assert_close(actual.grads[key], wanted.grads[key], rtol=1e-9, atol=1e-11)
    for a, b in zip(actual.stats, wanted.stats, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
