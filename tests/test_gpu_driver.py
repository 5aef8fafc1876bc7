"""Backend "triton" through the public op."""

import itertools

import pytest
import torch

from tests.kernels import DEVICE, N, V, call, drop_cf, make_inputs, with_source
from tests.numerics import (
    IGNORE,
    TRAINABLE,
    Inputs,
    assert_as_accurate_as_torch,
    assert_matches,
    beneath,
    eager,
    max_error,
    oracle,
    strided,
)

pytest.importorskip("triton")
from perce_kernels import backends, chunked, fused_perce_loss, ops, reference, token_logprobs
from perce_kernels.gpu import driver
from tests.driver import CUT, several_chunks  # noqa: F401  fixtures

pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter_rounds", "several_chunks")
on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="looks at the CPU's products or errors")


OPTIONS = {
    "paper": {},
    "clip": {"clip_min": 0.0, "clip_max": 1.5},
    "ratio": {"contrast": "ratio", "clip_min": 0.0, "clip_max": 5.0},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "num_items": {"num_items": torch.tensor(91, device=DEVICE)},
    "batch": {"normalize": "batch"},
    "sequence": {"normalize": "sequence", "seq_id": torch.arange(N, device=DEVICE) // 4 * 1000 - 3},
    "ignore_index": {"ignore_index": 5},
    "softcap": {"softcap": 4.0},
    "scale": {"logit_scale": -0.5},
    "softcap and scale": {"softcap": 4.0, "logit_scale": 1.7},
}


# --- Values ----------------------------------------------------------------------------------------------------------


def test_the_usual_inputs_exercise_what_they_should():
    inputs = make_inputs()
    valid = inputs.target != IGNORE
    weight = oracle(inputs).stats.token_weight[valid]
    assert (weight == 0.8).any() and (weight == 5.0).any()
    assert CUT.block < int(valid.sum()) < N, "gathered rows, several blocks"
    for rows in (N, int(valid.sum()), CUT.block):
        assert rows % CUT.chunk or rows % CUT.block, "the last is not full"


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "masked"])
@pytest.mark.parametrize("name", OPTIONS)
def test_option_matches_the_oracle(name, compact):
    options = OPTIONS[name]
    inputs = make_inputs(bias=True, ignore_index=options.get("ignore_index", IGNORE))
    upstream = torch.randn(N if options.get("reduction") == "none" else (), device=DEVICE)
    result = call(inputs, compact=compact, upstream=upstream, **options)
    assert_matches(result, oracle(inputs, upstream=upstream, **options), torch.float32)


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "masked"])
@pytest.mark.parametrize("name", ["paper", "ratio", "none", "sequence", "softcap and scale"])
@pytest.mark.parametrize("source", ["logp_cf", "token_weight"])
def test_given_per_token(source, name, compact):
    inputs, weights = with_source(make_inputs(), source)
    result = call(inputs, compact=compact, **weights, **OPTIONS[name])
    assert_matches(result, oracle(inputs, **weights, **OPTIONS[name]), torch.float32)


@pytest.mark.parametrize("n, d, v", [(1, 1, 1), (1, 3, 2), (6, 8, 129)])
def test_sizes_that_are_multiples_of_nothing(n, d, v):
    inputs = make_inputs(n, d, v, bias=True, ignored=0.0)
    assert_matches(call(inputs), oracle(inputs), torch.float32)


def test_no_ignored_row_means_no_gather():
    inputs = make_inputs(ignored=0.0)
    assert_matches(call(inputs), oracle(inputs), torch.float32)
    inputs, weights = with_source(inputs, "token_weight")
    assert_matches(call(inputs, **weights), oracle(inputs, **weights), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_pir_of_peaked_low_precision_logits(dtype, softcap):
    inputs = make_inputs(d=64, spread=14.0, ignored=0.0).to(dtype)
    z = reference.logits(inputs.hidden.double(), inputs.lm_head.double(), None, None, 1.0)
    assert 40 < z.abs().max() < 70
    for reduction in ("mean", "none"):  # the row kernel, and the GEMM that writes no logits
        pir = call(inputs, softcap=softcap, reduction=reduction).stats.pir
        assert max_error(pir, oracle(inputs, softcap=softcap).stats.pir) <= 1e-3


@pytest.mark.parametrize("options", [{}, {"softcap": 8.0, "logit_scale": 1.3}], ids=["plain", "capped"])
@pytest.mark.parametrize("spread", [3.0, 14.0])
def test_gradients_are_as_accurate_as_torch(options, spread):
    inputs = make_inputs(d=64, spread=spread, bias=True)
    ours, in_torch, expected = call(inputs, **options), eager(inputs, **options), oracle(inputs, **options)
    for name in TRAINABLE:
        assert ours.grads[name].dtype == torch.float32
        assert_as_accurate_as_torch(f"d{name}", ours.grads[name], in_torch.grads[name], expected.grads[name])


def test_the_target_of_a_nearly_certain_row_keeps_its_digits():
    """z = (12, 0, …), p = 0.999: the target's gradient is expm1(logp)."""
    lm_head = torch.zeros(101, 2)
    lm_head[0, 0] = 12.0
    inputs = Inputs(torch.tensor([[1.0, 0.0]]), lm_head, torch.tensor([0]), None, torch.zeros(101))
    inputs = Inputs(*(None if x is None else x.to(DEVICE) for x in vars(inputs).values()))
    weight = {"token_weight": torch.ones(1, device=DEVICE)}
    actual, expected = call(inputs, **weight).grads["bias"], oracle(inputs, **weight).grads["bias"]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("compact", [True, False])
def test_a_vocabulary_entry_masked_by_an_infinite_bias(compact):
    inputs = make_inputs(bias=True)
    inputs.target[inputs.target == 0] = 2
    inputs.bias[0] = -torch.inf
    result = call(inputs, compact=compact)
    assert result.grads["lm_head"].isfinite().all()
    assert_matches(result, oracle(inputs), torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_with_different_upstream_gradients(reduction):
    inputs = make_inputs(bias=True)
    leaves = {name: x.clone().requires_grad_(name in TRAINABLE) for name, x in inputs.kwargs().items()}
    loss = fused_perce_loss(**leaves, reduction=reduction, backend="triton")
    for seed in (1, 2):
        upstream = (torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed)) * 3).to(DEVICE)
        grads = torch.autograd.grad(loss, [leaves[name] for name in TRAINABLE], upstream, retain_graph=True)
        expected = oracle(inputs, upstream=upstream, reduction=reduction).grads
        for name, actual in zip(TRAINABLE, grads, strict=True):
            torch.testing.assert_close(actual.double(), expected[name], rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_requires_grad_combinations(reduction):
    inputs = make_inputs(bias=True)
    complete = call(inputs, reduction=reduction).grads
    for trainable in itertools.product([False, True], repeat=3):
        flags = dict(zip(TRAINABLE, trainable, strict=True))
        leaves = {name: x.clone().requires_grad_(flags.get(name, False)) for name, x in inputs.kwargs().items()}
        loss = fused_perce_loss(**leaves, reduction=reduction, backend="triton").sum()
        assert loss.requires_grad == any(trainable)
        if any(trainable):
            loss.backward()
        for name in TRAINABLE:
            assert (leaves[name].grad is not None) == flags[name]
            assert not flags[name] or torch.equal(leaves[name].grad, complete[name])


@pytest.mark.parametrize("n", [0, N])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("options", [{}, {"normalize": "batch"}, {"reduction": "none"}], ids=["mean", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_nothing_to_learn_is_a_zero_loss_connected_to_every_input(n, compact, options, dtype):
    inputs = make_inputs(bias=True, ignored=1.1).to(dtype)
    inputs = Inputs(inputs.hidden[:n], inputs.lm_head, inputs.target[:n], inputs.hidden_cf[:n], inputs.bias)
    result = call(inputs, compact=compact, **options)
    assert not result.loss.any()
    for name in TRAINABLE:
        assert result.grads[name].shape == getattr(inputs, name).shape and not result.grads[name].any()
    assert all(value.shape == (n,) and not value.any() for value in result.stats)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("source", ["hidden_cf", "logp_cf", "token_weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_nan_in_ignored_rows_reaches_nothing(source, compact, reduction, dtype):
    inputs, weights = with_source(make_inputs(bias=True).to(dtype), source)
    ignored = inputs.target == IGNORE
    options = {"compact": compact, "reduction": reduction}
    expected = call(inputs, **options, **weights)
    for x in (inputs.hidden, inputs.hidden_cf, *weights.values()):
        if x is not None:
            x[ignored] = torch.nan
    result = call(inputs, **options, **weights)
    assert torch.equal(result.loss, expected.loss)
    for name in TRAINABLE:
        assert torch.equal(result.grads[name], expected.grads[name])
    assert not result.grads["hidden"][ignored].any() and result.grads["hidden"].isfinite().all()
    for value in result.stats:
        assert value.isfinite().all() and not value[ignored].any()


def test_given_weights_are_neither_clipped_nor_contrasted():
    weight = torch.linspace(-3, 30, N, device=DEVICE)
    inputs = drop_cf(make_inputs())
    stats = call(inputs, token_weight=weight).stats
    assert torch.equal(stats.token_weight, torch.where(inputs.target != IGNORE, weight, 0))
    assert not stats.logp_cf.any() and not stats.pir.any()


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"ignore_index": 5}], ids=["plain", "softcap", "ignore"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_token_logprobs_match_the_oracle(options, compact, dtype):
    inputs = make_inputs(bias=True, ignore_index=options.get("ignore_index", IGNORE)).to(dtype)
    upstream = torch.randn(N, device=DEVICE)
    outcomes = []
    for op, args, extra in (
        (token_logprobs, inputs, {"compact": compact, "return_entropy": True, "backend": "triton"}),
        (reference.logprobs, inputs.to(torch.float64), {}),
    ):
        leaves = [x.clone().requires_grad_() for x in (args.hidden, args.lm_head, args.bias)]
        logp, entropy = op(leaves[0], leaves[1], args.target, bias=leaves[2], **extra, **options)
        assert not entropy.requires_grad
        (logp * upstream).sum().backward()
        outcomes.append([logp.detach(), entropy, *(x.grad for x in leaves)])
    for i, (actual, expected) in enumerate(zip(*outcomes, strict=True)):
        rtol, atol = (2e-4, 2e-5) if dtype == torch.float32 or i < 2 else (2e-2, 2e-2)
        torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


# --- Promises --------------------------------------------------------------------------------------------------------


def test_fp64_is_the_chunked_backend():
    inputs = make_inputs(dtype=torch.float64, bias=True)
    ours, theirs = (backend.sweep(*beneath(inputs)) for backend in (driver, chunked))
    assert all(torch.equal(a, b) and a.dtype == torch.float64 for a, b in zip(ours, theirs, strict=True))
    assert call(inputs, reduction="none").loss.dtype == torch.float64


@on_cpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_target_outside_the_vocabulary(reduction):
    inputs = make_inputs()
    inputs.target[7] = V
    with pytest.raises(ValueError, match=f"target: expected ids in .*{V}.* got {V} at row 7"):
        fused_perce_loss(**inputs.kwargs(), backend="triton", reduction=reduction)


@on_cpu
def test_a_backend_that_is_named_is_never_replaced(monkeypatch):
    inputs = make_inputs()
    args = inputs.hidden, inputs.lm_head, inputs.target
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
    for op in (
        lambda: fused_perce_loss(**inputs.kwargs(), backend="triton"),
        lambda: token_logprobs(*args, backend="triton"),
    ):
        with pytest.raises(ValueError, match=r"backend: expected a CUDA or ROCm device .* got cpu"):
            op()
    monkeypatch.setattr(backends, "TRITON_FOUND", False)
    with pytest.raises(ValueError, match=r"backend: expected the triton package, .*not installed"):
        fused_perce_loss(**inputs.kwargs(), backend="triton")


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_backend_that_runs(monkeypatch, backend, reduction):
    """Forward and recompute backward; "auto" is Triton on a GPU alone, interpreter or not."""
    ran = []
    for module in (chunked, driver):
        for name in ("sweep", "logprobs"):
            run = getattr(module, name)
            spy = lambda *args, run=run, module=module: ran.append(module) or run(*args)  # noqa: E731
            monkeypatch.setattr(module, name, spy)
    leaves = {name: x.requires_grad_(name in TRAINABLE) for name, x in make_inputs().kwargs().items()}
    fused_perce_loss(**leaves, reduction=reduction, backend=backend).sum().backward()
    triton = backend == "triton" or (backend == "auto" and DEVICE.type == "cuda")
    assert set(ran) == {driver if triton else chunked} and len(ran) == (1 if reduction == "mean" else 3)


def test_same_inputs_same_bits():
    inputs = make_inputs(bias=True).to(torch.bfloat16)
    first, second = call(inputs), call(inputs)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(a, b) for a, b in zip(first.stats, second.stats, strict=True))
    assert all(torch.equal(first.grads[name], second.grads[name]) for name in TRAINABLE)


def test_inputs_are_left_as_they_were():
    inputs = make_inputs(bias=True)
    before = {name: x.clone() for name, x in inputs.kwargs().items()}
    for compact in (True, False):
        call(inputs, softcap=5.0, logit_scale=0.5, compact=compact)
    assert all(torch.equal(x, before[name]) for name, x in inputs.kwargs().items())


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_non_contiguous_inputs(compact, reduction):
    inputs = make_inputs(bias=True)
    leaves = {name: strided(x).requires_grad_(name in TRAINABLE) for name, x in inputs.kwargs().items()}
    loss = fused_perce_loss(**leaves, compact=compact, reduction=reduction, backend="triton")
    loss.backward(torch.tensor(0.7, device=DEVICE).expand(loss.shape))
    expected = oracle(inputs, reduction=reduction, upstream=0.7).grads
    for name in TRAINABLE:
        torch.testing.assert_close(leaves[name].grad.double(), expected[name], rtol=2e-4, atol=4e-6)


@pytest.mark.parametrize("options", [{}, {"compact": False}, {"reduction": "none"}], ids=["mean", "masked", "none"])
def test_compiles_without_a_graph_break(options):
    torch.compiler.reset()
    inputs = make_inputs(bias=True)
    compiled = torch.compile(fused_perce_loss, fullgraph=True, backend="aot_eager")
    kwargs = {name: x.detach().clone().requires_grad_(name in TRAINABLE) for name, x in inputs.kwargs().items()}
    loss = compiled(**kwargs, **options, backend="triton").sum()
    loss.backward()
    expected = oracle(inputs, **options)
    torch.testing.assert_close(loss.detach().double(), expected.loss.sum(), rtol=2e-4, atol=1e-5)
    for name in TRAINABLE:
        torch.testing.assert_close(kwargs[name].grad.double(), expected.grads[name], rtol=2e-4, atol=4e-6)


@pytest.mark.parametrize("needed", [(True, True, True), (False, True, False)], ids=str)
def test_opcheck_fused_perce_loss(needed):
    inputs = make_inputs(n=6, v=61, bias=True)
    for name, need in zip(TRAINABLE, needed, strict=True):
        getattr(inputs, name).requires_grad_(need)
    args = (inputs.hidden, inputs.lm_head, inputs.target, inputs.hidden_cf, None, None, inputs.bias, 0.8, 5.0, "log",
            IGNORE, 9.0, 0.5, True, *needed, "triton")  # fmt: skip
    torch.library.opcheck(ops.loss_op, args)


@pytest.mark.parametrize("return_entropy", [False, True])
def test_opcheck_token_logprobs(return_entropy):
    inputs = make_inputs(n=6, v=61, bias=True)
    leaves = [x.requires_grad_() for x in (inputs.hidden, inputs.lm_head, inputs.bias)]
    args = (leaves[0], leaves[1], inputs.target, leaves[2], IGNORE, 9.0, 0.5, False, return_entropy, "triton")
    torch.library.opcheck(ops.logprobs_op, args)
