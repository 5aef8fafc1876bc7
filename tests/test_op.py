"""Values and gradients of the op: every option, dtype and corner of the softmax against the fp64 oracle."""

import itertools

import pytest
import torch
from torch import Tensor

from perce_kernels import chunked, fused_perce_loss, reference, token_logprobs
from tests.numerics import (
    IGNORE,
    TRAINABLE,
    Inputs,
    assert_as_accurate_as_torch,
    assert_matches,
    call,
    eager,
    make_inputs,
    max_error,
    oracle,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "small_chunks")
N = 37

OPTIONS = {
    "paper": {},
    "clip": {"clip_min": 0.0, "clip_max": 1.5},
    "constant clip": {"clip_min": 2.0, "clip_max": 2.0},
    "ratio": {"contrast": "ratio", "clip_min": 0.0, "clip_max": 5.0},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "num_items int": {"num_items": 91},
    "num_items tensor": {"num_items": torch.tensor(91)},
    "num_items zero": {"num_items": torch.tensor(0)},
    "batch": {"normalize": "batch"},
    "batch, sum": {"normalize": "batch", "reduction": "sum"},
    "batch, none": {"normalize": "batch", "reduction": "none"},
    "sequence": {"normalize": "sequence", "seq_id": torch.arange(N) // 7 * 1000 - 3},
    "sequence, none": {"normalize": "sequence", "seq_id": torch.arange(N).int() % 5, "reduction": "none"},
    "ignore_index": {"ignore_index": 5},
    "softcap": {"softcap": 4.0},
    "logit_scale": {"logit_scale": 0.25},
    "negative logit_scale": {"logit_scale": -0.5},
    "softcap and scale": {"softcap": 4.0, "logit_scale": 1.7},
}


def with_source(inputs: Inputs, source: str) -> tuple[Inputs, dict[str, Tensor]]:
    """The same call with the weights from `hidden_cf`, `logp_cf` or `token_weight`."""
    if source == "hidden_cf":
        return inputs, {}
    g = torch.Generator().manual_seed(7)
    values = torch.rand(N, generator=g, dtype=torch.float64) * (-9 if source == "logp_cf" else 9)
    return Inputs(inputs.hidden, inputs.lm_head, inputs.target, None, inputs.bias), {source: values.to(torch.float32)}


def test_the_usual_inputs_exercise_what_they_should():
    inputs = make_inputs()
    weight = oracle(inputs).stats.token_weight[inputs.target != IGNORE]
    assert (weight == 0.8).any() and (weight == 5.0).any() and ((weight > 0.8) & (weight < 5.0)).any()
    valid = int((inputs.target != IGNORE).sum())
    assert 16 < valid < N, "several chunks with and without compaction, the last one partial"
    assert chunked.chunk_rows(211, torch.float32, 1) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("compact", [True, False], ids=["compact", "masked"])
@pytest.mark.parametrize("source", ["hidden_cf", "logp_cf", "token_weight"])
@pytest.mark.parametrize("name", OPTIONS)
def test_option_matches_the_oracle(name, source, compact, dtype):
    options = OPTIONS[name]
    ignore_index = options.get("ignore_index", IGNORE)
    inputs, weights = with_source(make_inputs(dtype=dtype, bias=True, ignore_index=ignore_index), source)
    upstream = torch.randn(N if options.get("reduction") == "none" else (), dtype=dtype)
    result = call(inputs, compact=compact, upstream=upstream, **weights, **options)
    assert result.loss.dtype == dtype
    assert_matches(result, oracle(inputs, upstream=upstream, **weights, **options), dtype)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_every_backend_matches_the_oracle(backend, name):
    inputs = make_inputs(ignore_index=OPTIONS[name].get("ignore_index", IGNORE))
    assert_matches(call(inputs, backend=backend, **OPTIONS[name]), oracle(inputs, **OPTIONS[name]), torch.float32)


@pytest.mark.parametrize("n, d, v", [(1, 1, 1), (1, 3, 2), (16, 8, 7), (17, 8, 129), (33, 5, 1021)])
def test_sizes_that_are_multiples_of_nothing(n, d, v):
    inputs = make_inputs(n, d, v, bias=True, ignored=0.0)
    assert_matches(call(inputs), oracle(inputs), torch.float32)


@pytest.mark.parametrize("source", ["logp_cf", "token_weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_per_token_inputs_may_have_another_float_dtype(source, dtype):
    inputs, weights = with_source(make_inputs(), source)
    weights = {source: weights[source].to(dtype)}
    assert_matches(call(inputs, **weights), oracle(inputs, **weights), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_pir_of_peaked_low_precision_logits(dtype, softcap):
    inputs = make_inputs(d=64, spread=14.0, ignored=0.0).to(dtype)
    z = reference.logits(inputs.hidden.double(), inputs.lm_head.double(), None, None, 1.0)
    assert 45 < z.abs().max() < 70
    expected = oracle(inputs, softcap=softcap).stats.pir
    assert max_error(call(inputs, softcap=softcap).stats.pir, expected) <= 1e-3
    if softcap is None:
        assert max_error(eager(inputs).stats.pir, expected) > 1e-2, "the input dtype alone would not do"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, {"softcap": 8.0, "logit_scale": 1.3}], ids=["plain", "capped"])
@pytest.mark.parametrize("spread", [3.0, 14.0])
def test_gradients_are_as_accurate_as_torch(dtype, options, spread):
    inputs = make_inputs(d=64, spread=spread, bias=True).to(dtype)
    ours, in_torch, expected = call(inputs, **options), eager(inputs, **options), oracle(inputs, **options)
    for name in TRAINABLE:
        assert ours.grads[name].dtype == dtype
        assert_as_accurate_as_torch(f"d{name}", ours.grads[name], in_torch.grads[name], expected.grads[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("margin", [8.0, 10.0, 12.0])
def test_gradient_at_a_nearly_certain_target_keeps_its_digits(dtype, margin):
    """One row with z = (margin, 0, …): the target's gradient is p − 1 = expm1(logp), which p rounded to bf16 loses."""
    lm_head = torch.zeros(101, 2)
    lm_head[0, 0] = margin
    inputs = Inputs(torch.tensor([[1.0, 0.0]]), lm_head, torch.tensor([0]), None, torch.zeros(101)).to(dtype)
    weight = {"token_weight": torch.ones(1)}
    actual, expected = call(inputs, **weight).grads["bias"], oracle(inputs, **weight).grads["bias"]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=0)


def test_large_common_offset_of_the_logits_cancels():
    """(z_y − max) − log Σ, not z_y − lse: every logit raised by 4096 leaves the log-probabilities where they were."""
    inputs = make_inputs(bias=True)
    inputs.bias.copy_(torch.randint(-3, 3, inputs.bias.shape))
    raised = Inputs(inputs.hidden, inputs.lm_head, inputs.target, inputs.hidden_cf, inputs.bias + 4096)
    assert max_error(call(raised).stats.logp, oracle(raised).stats.logp) < 2e-3, "half an ulp of 4096 per logit"
    zero = torch.zeros_like(inputs.hidden)
    flat = Inputs(zero, inputs.lm_head, inputs.target, zero, inputs.bias + 4096)
    assert max_error(call(flat).stats.logp, oracle(flat).stats.logp) < 2e-6, "exact logits: no error from the offset"


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("token", [0, 1])
def test_a_vocabulary_entry_masked_by_an_infinite_bias(compact, token):
    inputs = make_inputs(bias=True)
    inputs.target[inputs.target == token] = 2
    inputs.bias[token] = -torch.inf
    result, expected = call(inputs, compact=compact), oracle(inputs)
    assert result.grads["lm_head"].isfinite().all()
    assert_matches(result, expected, torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", ["none", "batch"])
def test_backward_twice_with_different_upstream_gradients(reduction, normalize):
    inputs = make_inputs(bias=True)
    options = {"reduction": reduction, "normalize": normalize}
    leaves = {name: x.clone().requires_grad_(name in TRAINABLE) for name, x in inputs.kwargs().items()}
    loss = fused_perce_loss(**leaves, **options)
    for seed in (1, 2):
        upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed)) * 3
        grads = torch.autograd.grad(loss, [leaves[name] for name in TRAINABLE], upstream, retain_graph=True)
        expected = oracle(inputs, upstream=upstream, **options).grads
        for name, actual in zip(TRAINABLE, grads, strict=True):
            torch.testing.assert_close(actual.double(), expected[name], rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trainable", list(itertools.product([False, True], repeat=3)), ids=str)
def test_requires_grad_combination(trainable, reduction):
    inputs = make_inputs(bias=True)
    flags = dict(zip(TRAINABLE, trainable, strict=True))
    leaves = {name: x.clone().requires_grad_(flags.get(name, False)) for name, x in inputs.kwargs().items()}
    loss = fused_perce_loss(**leaves, reduction=reduction).sum()
    assert loss.requires_grad == any(trainable)
    if any(trainable):
        loss.backward()
    complete = call(inputs, reduction=reduction).grads
    for name in TRAINABLE:
        assert (leaves[name].grad is not None) == flags[name]
        if flags[name]:
            assert torch.equal(leaves[name].grad, complete[name])


@pytest.mark.parametrize("normalize", ["none", "batch", "sequence"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_zero_weights_give_a_zero_loss(normalize, reduction):
    options = {"normalize": normalize, "reduction": reduction, "token_weight": torch.zeros(N)}
    if normalize == "sequence":
        options["seq_id"] = torch.arange(N) // 5
    inputs, _ = with_source(make_inputs(), "token_weight")
    result = call(inputs, **options)
    assert not result.loss.any() and not result.stats.token_weight.any() and result.stats.logp.any()
    assert not result.grads["hidden"].any() and not result.grads["lm_head"].any()


def test_one_sequence_of_zero_weight_does_not_disturb_the_others():
    inputs, _ = with_source(make_inputs(ignored=0.0), "token_weight")
    seq_id, weight = torch.arange(N) // 10, torch.rand(N) + 0.1
    weight[:10] = 0
    stats = call(inputs, normalize="sequence", seq_id=seq_id, token_weight=weight).stats
    assert not stats.token_weight[:10].any()
    for s in (1, 2, 3):
        torch.testing.assert_close(stats.token_weight[seq_id == s].mean(), torch.tensor(1.0))


def test_given_weights_are_neither_clipped_nor_contrasted():
    inputs, _ = with_source(make_inputs(), "token_weight")
    weight = torch.linspace(-3, 30, N)
    stats = call(inputs, token_weight=weight).stats
    assert torch.equal(stats.token_weight, torch.where(inputs.target != IGNORE, weight, 0))
    assert not stats.logp_cf.any() and not stats.pir.any()


def test_ones_as_weights_are_cross_entropy():
    inputs, _ = with_source(make_inputs(), "token_weight")
    loss = fused_perce_loss(inputs.hidden, inputs.lm_head, inputs.target, token_weight=torch.ones(N))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(inputs.hidden @ inputs.lm_head.T, inputs.target))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fp16_gradients_survive_a_loss_scale(reduction):
    """The cast comes after the upstream gradient: many gradients here are 0 in fp16, yet normal numbers once scaled."""
    inputs = make_inputs(n=5, spread=8.0, bias=True, ignored=0.0).to(torch.float16)
    scale, count = 65536.0, 100
    options = {"upstream": scale, "num_items": count} if reduction == "mean" else {"upstream": scale / count}
    result, expected = call(inputs, reduction=reduction, **options), oracle(inputs, reduction=reduction, **options)
    lost = (expected.grads["lm_head"] * count / scale).half() == 0
    assert (lost & (expected.grads["lm_head"].abs() > 2e-6)).float().mean() > 0.02
    for name in TRAINABLE:
        torch.testing.assert_close(result.grads[name].double(), expected.grads[name], rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("source", ["hidden_cf", "logp_cf", "token_weight"])
def test_no_gradient_flows_through_the_weights(source, backend, reduction):
    inputs, weights = with_source(make_inputs(), source)
    leaf = weights.get(source, inputs.hidden_cf).requires_grad_()
    options = {"backend": backend, "reduction": reduction}
    assert not fused_perce_loss(**inputs.kwargs(), **weights, **options).requires_grad
    inputs.hidden.requires_grad_()
    fused_perce_loss(**inputs.kwargs(), **weights, **options).sum().backward()
    assert leaf.grad is None and inputs.hidden.grad.any()


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "masked"])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 4.0}, {"logit_scale": 0.25}, {"ignore_index": 5}], ids=lambda o: "".join(o) or "plain"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_token_logprobs_match_the_oracle(options, compact, dtype):
    inputs = make_inputs(dtype=dtype, bias=True, ignore_index=options.get("ignore_index", IGNORE))
    upstream = torch.randn(N, dtype=dtype)
    outcomes = []
    for op, args, extra in (
        (token_logprobs, inputs, {"compact": compact, "return_entropy": True}),
        (reference.logprobs, inputs.to(torch.float64), {}),
    ):
        leaves = [x.clone().requires_grad_() for x in (args.hidden, args.lm_head, args.bias)]
        logp, entropy = op(leaves[0], leaves[1], args.target, bias=leaves[2], **extra, **options)
        assert not entropy.requires_grad
        (logp * upstream).sum().backward()
        outcomes.append([logp.detach(), entropy, *(x.grad for x in leaves)])
    rtol, atol = (1e-9, 1e-11) if dtype == torch.float64 else (2e-4, 2e-5)
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


def test_token_logprobs_without_entropy_are_the_same():
    inputs = make_inputs()
    args = inputs.hidden, inputs.lm_head, inputs.target
    torch.testing.assert_close(token_logprobs(*args), token_logprobs(*args, return_entropy=True)[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(token_logprobs(*args), token_logprobs(*args, backend="reference"), rtol=1e-5, atol=1e-5)


def test_entropy_where_probabilities_underflow():
    """p·log p → 0: a one-hot row has entropy 0, a uniform one log V."""
    lm_head = torch.zeros(101, 2)
    lm_head[0, 0] = 1e4
    hidden = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    _, entropy = token_logprobs(hidden, lm_head, torch.tensor([0, 0]), return_entropy=True)
    torch.testing.assert_close(entropy, torch.tensor([0.0, 101.0]).log().clamp(min=0))
