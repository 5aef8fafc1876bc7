"""The contract of the op on every backend: values, gradients and corner cases of the softmax against fp64."""

import itertools

import pytest
import torch

from perce_kernels import fused_perce_loss, reference, token_logprobs
from tests.helpers.numerics import IGNORE, TRAINABLE, Inputs, assert_as_accurate_as_torch, eager, max_error, oracle
from tests.helpers.subjects import SOURCES, WAYS, assert_gradient, of_each

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
EITHER = (True, False)
CAPPED = {"softcap": 8.0, "logit_scale": 1.3}

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
    "sequence": {"normalize": "sequence", "seq_id": torch.arange(37) // 7 * 1000 - 3},
    "sequence, none": {"normalize": "sequence", "seq_id": torch.arange(37).int() % 5, "reduction": "none"},
    "ignore_index": {"ignore_index": 5},
    "softcap": {"softcap": 4.0},
    "logit_scale": {"logit_scale": 0.25},
    "negative logit_scale": {"logit_scale": -0.5},
    "softcap and scale": {"softcap": 4.0, "logit_scale": 1.7},
    "softcap and negative scale": {"softcap": 4.0, "logit_scale": -1.7},
}
# What the loss is divided by is applied outside of the kernels.
IN_THE_INTERPRETER = (
    "paper", "clip", "ratio", "none", "sequence", "ignore_index", "negative logit_scale", "softcap and scale",
)  # fmt: skip
OF_16_BITS = ("paper", "ratio", "none", "ignore_index", "softcap and negative scale")
GIVEN = ("paper", "ratio", "none")
MORE = ("sum", "num_items tensor", "batch", "softcap")


def options_of(name: str, subject) -> dict:
    """The options, with tensors that have the length of the subject's inputs and are on its device."""
    options = dict(OPTIONS[name])
    if "seq_id" in options:
        options["seq_id"] = options["seq_id"][: subject.n].to(subject.device)
    return options


@of_each("torch", "triton", "fused")
def test_the_usual_inputs_exercise_what_they_should(subject):
    inputs = subject.inputs()
    weight = oracle(inputs).stats.token_weight[inputs.target != IGNORE]
    assert (weight == 0.8).any() and (weight == 5.0).any() and len(weight) < subject.n
    assert subject.n < 37 or ((weight > 0.8) & (weight < 5.0)).any()


@of_each(
    "source, name, compact",
    *itertools.product(["torch"], SOURCES, OPTIONS, EITHER),
    *itertools.product(["torch fp64"], ["hidden_cf"], OPTIONS, [True]),
    *itertools.product(["reference"], ["hidden_cf"], OPTIONS, [True]),
    *itertools.product(["triton"], ["hidden_cf"], IN_THE_INTERPRETER, [True]),
    *itertools.product(["triton"], SOURCES[1:], GIVEN, [True]),
    *itertools.product(WAYS, ["hidden_cf"], OF_16_BITS, [True]),
    *itertools.product(["triton", *WAYS], SOURCES, ["paper"], [False]),
    slow=[
        *itertools.product(["torch fp64"], SOURCES, OPTIONS, [False]),
        *itertools.product(["torch fp64"], SOURCES[1:], OPTIONS, [True]),
        *itertools.product(["triton"], ["hidden_cf"], [x for x in IN_THE_INTERPRETER if x != "paper"], [False]),
        *itertools.product(["triton"], ["hidden_cf"], MORE, EITHER),
        *itertools.product(["triton"], SOURCES[1:], [x for x in GIVEN if x != "paper"], [False]),
        *itertools.product(["triton"], SOURCES[1:], ("sequence", "softcap and scale"), EITHER),
        *itertools.product(WAYS, ["hidden_cf"], [x for x in OF_16_BITS if x != "paper"], [False]),
        *itertools.product(WAYS, ["hidden_cf"], ("batch", "softcap"), EITHER),
        *itertools.product(WAYS, SOURCES[1:], ["paper"], [True]),
    ],
)
def test_option_matches_the_oracle(subject, source, name, compact):
    options = options_of(name, subject)
    ignore_index = options.get("ignore_index", IGNORE)
    inputs, weights = subject.with_source(subject.inputs(bias=True, ignore_index=ignore_index), source)
    options |= {"upstream": subject.upstream(inputs, options.get("reduction", "mean"))} | weights
    result = subject.call(inputs, compact=compact, **options)
    assert result.loss.dtype == torch.promote_types(subject.dtype, FP32)
    subject.assert_matches(result, oracle(inputs, **options))


@of_each(
    "n, d, v",
    *[("torch", *size) for size in ((1, 1, 1), (1, 3, 2), (16, 8, 7), (17, 8, 129), (33, 5, 1021))],
    *[("triton", *size) for size in ((1, 1, 1), (1, 3, 2), (6, 8, 129))],
    *[(way, *size) for way in WAYS for size in ((1, 8, 1), (1, 3, 2), (6, 8, 129))],
    slow=[(way, *size) for way in WAYS for size in ((3, 8, 64), (11, 16, 300))],
)
def test_sizes_that_are_multiples_of_nothing(subject, n, d, v):
    inputs = subject.inputs(n, d, v, bias=True, ignored=0.0)
    subject.assert_matches(subject.call(inputs), oracle(inputs))


@of_each("source", *itertools.product(("torch", "triton"), SOURCES))
def test_no_ignored_row_means_no_gather(subject, source):
    inputs, weights = subject.with_source(subject.inputs(ignored=0.0), source)
    subject.assert_matches(subject.call(inputs, **weights), oracle(inputs, **weights))


@of_each("source, dtype", *itertools.product(["torch"], SOURCES[1:], (BF16, FP64)))
def test_per_token_inputs_may_have_another_float_dtype(subject, source, dtype):
    inputs, weights = subject.with_source(subject.inputs(), source)
    weights = {source: weights[source].to(dtype)}
    subject.assert_matches(subject.call(inputs, **weights), oracle(inputs, **weights))


@of_each(
    "dtype, softcap",
    *itertools.product(["torch"], (BF16, FP16), (None, 30.0)),
    *(("triton", BF16, None), ("triton", FP16, 30.0)),
    slow=[("triton", BF16, 30.0), ("triton", FP16, None)],
)
def test_pir_of_peaked_low_precision_logits(subject, dtype, softcap):
    inputs = subject.inputs(d=64, spread=14.0, ignored=0.0, dtype=dtype)
    z = reference.logits(inputs.hidden.double(), inputs.lm_head.double(), None, None, 1.0)
    assert 40 < z.abs().max() < 70
    expected = oracle(inputs, softcap=softcap).stats.pir
    for reduction in ("mean", "none"):  # with the row kernel, and with the GEMM that writes no logits
        assert max_error(subject.call(inputs, softcap=softcap, reduction=reduction).stats.pir, expected) <= 1e-3
    if softcap is None:
        assert max_error(eager(inputs).stats.pir, expected) > 1e-2, "the input dtype is not accurate enough"


@of_each(
    "dtype, options, spread",
    *itertools.product(["torch"], (FP32, BF16, FP16), ({}, CAPPED), (3.0, 14.0)),
    *itertools.product(["triton"], [FP32], ({}, CAPPED), (3.0, 14.0)),
    *itertools.product(WAYS, [BF16], ({}, CAPPED), [14.0]),
    *itertools.product(WAYS, [FP16], [{}], [14.0]),
    slow=[
        *itertools.product(WAYS, [BF16], ({}, CAPPED), [3.0]),
        *itertools.product(WAYS, [FP16], [{}], [3.0]),
        *itertools.product(WAYS, [FP16], [CAPPED], (3.0, 14.0)),
    ],
)
def test_gradients_are_as_accurate_as_torch(subject, dtype, options, spread):
    inputs = subject.inputs(d=64, spread=spread, bias=True, dtype=dtype)
    ours, in_torch, expected = subject.call(inputs, **options), eager(inputs, **options), oracle(inputs, **options)
    assert max_error(ours.stats.pir, expected.stats.pir) <= 1e-3
    for name in TRAINABLE:
        assert ours.grads[name].dtype == dtype
        assert_as_accurate_as_torch(f"d{name}", ours.grads[name], in_torch.grads[name], expected.grads[name])


@of_each(
    "dtype, margin",
    *itertools.product(["torch"], (FP32, BF16), (8.0, 10.0, 12.0)),
    ("triton", FP32, 12.0),
    *itertools.product(WAYS, (BF16, FP16), [12.0]),
)
def test_gradient_at_a_nearly_certain_target_keeps_its_digits(subject, dtype, margin):
    """One row with z = (…, margin, …): the target's gradient is p − 1 = expm1(logp), which p rounded to bf16 loses."""
    lm_head = torch.zeros(subject.v, 2)
    lm_head[70, 0] = margin
    row = Inputs(torch.tensor([[1.0, 0.0]]), lm_head, torch.tensor([70]), None, torch.zeros(subject.v)).to(dtype)
    row, weight = subject.of(row), {"token_weight": torch.ones(1, device=subject.device)}
    actual, expected = subject.call(row, **weight).grads["bias"], oracle(row, **weight).grads["bias"]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=0)


@of_each("token, compact", *itertools.product(("torch", "triton"), (0, 1), EITHER))
def test_a_vocabulary_entry_masked_by_an_infinite_bias(subject, token, compact):
    inputs = subject.inputs(bias=True)
    inputs.target[inputs.target == token] = 2
    inputs.bias[token] = -torch.inf
    result = subject.call(inputs, compact=compact)
    assert result.grads["lm_head"].isfinite().all()
    subject.assert_matches(result, oracle(inputs))


@of_each(
    "reduction, normalize",
    *itertools.product(["torch"], ("mean", "sum", "none"), ("none", "batch")),
    *itertools.product(WAYS, ("mean", "none"), ["none"]),
    slow=itertools.product(["triton"], ("mean", "none"), ["none"]),
)
def test_backward_twice_with_different_upstream_gradients(subject, reduction, normalize):
    inputs, options = subject.inputs(bias=True), {"reduction": reduction, "normalize": normalize}
    leaves = {name: x.clone().requires_grad_(name in TRAINABLE) for name, x in inputs.kwargs().items()}
    loss = fused_perce_loss(**leaves, **options, backend=subject.backend)
    for seed in (1, 2):
        upstream = (torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed)) * 3).to(subject.device)
        grads = torch.autograd.grad(loss, [leaves[name] for name in TRAINABLE], upstream, retain_graph=True)
        expected = oracle(inputs, upstream=upstream, **options).grads
        for name, actual in zip(TRAINABLE, grads, strict=True):
            assert_gradient(actual, expected[name], subject.dtype, slack=2.0)


@of_each(
    "reduction", ("torch", "none"), ("torch", "mean"), ("stored", "mean"), slow=[("triton", "mean"), ("fused", "mean")]
)
def test_requires_grad_combinations(subject, reduction):
    inputs = subject.inputs(bias=True)
    complete = subject.call(inputs, reduction=reduction).grads
    for trainable in itertools.product([False, True], repeat=3):
        flags = dict(zip(TRAINABLE, trainable, strict=True))
        leaves = {name: x.clone().requires_grad_(flags.get(name, False)) for name, x in inputs.kwargs().items()}
        loss = fused_perce_loss(**leaves, reduction=reduction, backend=subject.backend).sum()
        assert loss.requires_grad == any(trainable)
        if any(trainable):
            loss.backward()
        for name in TRAINABLE:
            assert (leaves[name].grad is not None) == flags[name]
            assert not flags[name] or torch.equal(leaves[name].grad, complete[name])


NORMALIZED = [{"normalize": x, "reduction": y} for x in ("none", "batch", "sequence") for y in ("mean", "sum", "none")]


@of_each(
    "dtype, options, compact, rows",
    *itertools.product(("torch", "reference"), [FP32], NORMALIZED, EITHER, (0, None)),
    *itertools.product(["triton"], [FP32], ({}, {"reduction": "none"}), EITHER, (0, None)),
    *itertools.product(WAYS, [FP16], [{}], [False], (0, None)),
    slow=[
        *itertools.product(["triton"], [FP16], ({}, {"normalize": "batch"}, {"reduction": "none"}), EITHER, (0, None)),
        *itertools.product(["triton"], [FP32], [{"normalize": "batch"}], EITHER, (0, None)),
        *itertools.product(WAYS, [FP16], [{}], [True], (0, None)),
    ],
)
def test_nothing_to_learn_is_a_zero_loss_connected_to_every_input(subject, dtype, options, compact, rows):
    inputs = subject.inputs(bias=True, ignored=1.1, dtype=dtype)
    inputs = Inputs(inputs.hidden[:rows], inputs.lm_head, inputs.target[:rows], inputs.hidden_cf[:rows], inputs.bias)
    n = inputs.target.shape[0]
    seq_id = {"seq_id": torch.zeros(n, dtype=torch.int64)} if options.get("normalize") == "sequence" else {}
    result = subject.call(inputs, compact=compact, **options, **seq_id)
    assert result.loss.shape == ((n,) if options.get("reduction") == "none" else ())
    assert not result.loss.any()
    for name in TRAINABLE:
        assert result.grads[name].shape == getattr(inputs, name).shape and not result.grads[name].any()
    assert all(value.shape == (n,) and not value.any() for value in result.stats)


@of_each(
    "dtype, source, compact, options, bad",
    *itertools.product(
        ["torch"], [FP32], SOURCES, EITHER, ({}, {"reduction": "none"}, {"normalize": "batch"}), (torch.nan, torch.inf)
    ),
    *itertools.product(["triton"], [FP16], SOURCES, [False], [{}], [torch.nan]),
    *itertools.product(["triton"], [FP32], ["hidden_cf"], EITHER, [{"reduction": "none"}], [torch.nan]),
    *itertools.product(WAYS, [FP16], ["hidden_cf"], [False], [{}], [torch.nan]),
    slow=[
        *itertools.product(["triton"], [FP16], SOURCES, [True], [{}], [torch.nan]),
        *itertools.product(["triton"], [FP16], SOURCES, EITHER, [{"reduction": "none"}], [torch.nan]),
        *itertools.product(["triton"], [FP32], ["hidden_cf"], EITHER, [{}], [torch.nan]),
        *itertools.product(WAYS, [FP16], ["hidden_cf"], [True], [{}], [torch.nan]),
        *itertools.product(WAYS, [FP16], ["token_weight"], EITHER, [{}], [torch.nan]),
    ],
)
def test_nan_in_ignored_rows_reaches_nothing(subject, dtype, source, compact, options, bad):
    inputs, weights = subject.with_source(subject.inputs(bias=True, dtype=dtype), source)
    ignored = inputs.target == IGNORE
    assert ignored.any()
    expected = subject.call(inputs, compact=compact, **options, **weights)
    for x in (inputs.hidden, inputs.hidden_cf, *weights.values()):
        if x is not None:
            x[ignored] = bad
    result = subject.call(inputs, compact=compact, **options, **weights)
    assert torch.equal(result.loss, expected.loss)
    for name in TRAINABLE:
        assert torch.equal(result.grads[name], expected.grads[name])
    assert not result.grads["hidden"][ignored].any() and result.grads["hidden"].isfinite().all()
    for value in result.stats:
        assert value.isfinite().all() and not value[ignored].any()


@of_each("torch", "triton")
def test_ignored_rows_have_no_gradient_and_no_statistics(subject):
    inputs = subject.inputs()
    result, ignored = subject.call(inputs), inputs.target == IGNORE
    assert not result.grads["hidden"][ignored].any() and result.grads["hidden"][~ignored].all()
    assert all(not value[ignored].any() and value[~ignored].all() for value in result.stats)


@of_each("torch", "triton")
def test_given_weights_are_neither_clipped_nor_contrasted(subject):
    inputs, _ = subject.with_source(subject.inputs(), "token_weight")
    weight = torch.linspace(-3, 30, subject.n, device=subject.device)
    stats = subject.call(inputs, token_weight=weight).stats
    assert torch.equal(stats.token_weight, torch.where(inputs.target != IGNORE, weight, 0))
    assert not stats.logp_cf.any() and not stats.pir.any()


@of_each("source, reduction", *itertools.product(("torch", "reference"), SOURCES, ("mean", "none")))
def test_no_gradient_flows_through_the_weights(subject, source, reduction):
    inputs, weights = subject.with_source(subject.inputs(), source)
    leaf = weights.get(source, inputs.hidden_cf).requires_grad_()
    options = {"backend": subject.backend, "reduction": reduction}
    assert not fused_perce_loss(**inputs.kwargs(), **weights, **options).requires_grad
    inputs.hidden.requires_grad_()
    fused_perce_loss(**inputs.kwargs(), **weights, **options).sum().backward()
    assert leaf.grad is None and inputs.hidden.grad.any()


LOGPROBS = ({}, {"softcap": 4.0}, {"logit_scale": 0.25}, {"ignore_index": 5})


@of_each(
    "dtype, options, compact",
    *itertools.product(["torch"], (FP32, FP64), LOGPROBS, EITHER),
    *itertools.product(["triton"], [FP32], LOGPROBS[1::2], EITHER),
    *itertools.product(["triton"], [BF16], [{}], EITHER),
    slow=[
        *itertools.product(["triton"], [FP32], [{}], EITHER),
        *itertools.product(["triton"], [BF16], LOGPROBS[1::2], EITHER),
    ],
)
def test_token_logprobs_match_the_oracle(subject, dtype, options, compact):
    inputs = subject.inputs(dtype=dtype, bias=True, ignore_index=options.get("ignore_index", IGNORE))
    upstream = torch.randn(subject.n, dtype=torch.promote_types(dtype, FP32), device=subject.device)
    outcomes, tops = [], []
    for op, args, extra in (
        (
            token_logprobs,
            inputs,
            {"compact": compact, "return_entropy": True, "return_top1": True, "backend": subject.backend},
        ),
        (reference.logprobs, inputs.to(FP64), {}),
    ):
        leaves = [x.clone().requires_grad_() for x in (args.hidden, args.lm_head, args.bias)]
        logp, entropy, top1 = op(leaves[0], leaves[1], args.target, bias=leaves[2], **extra, **options)
        tops.append(top1)
        assert not entropy.requires_grad
        (logp * upstream).sum().backward()
        outcomes.append([logp.detach(), entropy, *(x.grad for x in leaves)])
    assert torch.equal(*tops) and 0 < tops[0].sum() < subject.n
    for i, (actual, expected) in enumerate(zip(*outcomes, strict=True)):
        kind = FP32 if i < 2 and dtype == BF16 else dtype  # log-probabilities and entropies are fp32
        rtol, atol = {FP64: (1e-9, 1e-11), FP32: (2e-4, 2e-5), BF16: (2e-2, 2e-2)}[kind]
        torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


@of_each(
    "dtype, default",
    ("triton", FP32, FP64),
    ("fused", FP16, BF16),
    ("stored", BF16, BF16),
    ("torch", BF16, BF16),
    ("reference", BF16, BF16),
    slow=[("triton", FP32, BF16), ("stored", FP16, FP64)],
)
def test_results_do_not_depend_on_the_default_dtype(subject, dtype, default):
    """torch.set_default_dtype, which scripts for 16-bit models call."""
    inputs, results = subject.inputs(bias=True, dtype=dtype), []
    for default_dtype in (default, FP32):
        torch.set_default_dtype(default_dtype)
        try:
            results += [subject.call(inputs), subject.call(inputs, reduction="none")]
        finally:
            torch.set_default_dtype(FP32)
    for actual, expected in zip(results[:2], results[2:], strict=True):
        assert torch.equal(actual.loss, expected.loss)
        assert all(torch.equal(a, b) for a, b in zip(actual.stats, expected.stats, strict=True))
        assert all(torch.equal(actual.grads[name], expected.grads[name]) for name in TRAINABLE)


@of_each(
    "compact",
    *itertools.product(["torch"], EITHER),
    *itertools.product(("triton", *WAYS), [False]),
    slow=itertools.product(("triton", *WAYS), [True]),
)
def test_same_inputs_same_bits(subject, compact):
    inputs = subject.inputs(bias=True, dtype=BF16)
    first, second = subject.call(inputs, compact=compact), subject.call(inputs, compact=compact)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(a, b) for a, b in zip(first.stats, second.stats, strict=True))
    assert all(torch.equal(first.grads[name], second.grads[name]) for name in TRAINABLE)


@of_each("torch", "triton")
def test_inputs_are_left_as_they_were(subject):
    inputs = subject.inputs(bias=True)
    before = {name: x.clone() for name, x in inputs.kwargs().items()}
    for compact in EITHER:
        subject.call(inputs, softcap=5.0, logit_scale=0.5, compact=compact)
    assert all(torch.equal(x, before[name]) for name, x in inputs.kwargs().items())


@of_each("torch")
def test_large_common_offset_of_the_logits_cancels(subject):
    """(z_y − max) − log Σ, not z_y − lse: every logit raised by 4096 leaves the log-probabilities where they were."""
    inputs = subject.inputs(bias=True)
    inputs.bias.copy_(torch.randint(-3, 3, inputs.bias.shape))
    raised = Inputs(inputs.hidden, inputs.lm_head, inputs.target, inputs.hidden_cf, inputs.bias + 4096)
    assert max_error(subject.call(raised).stats.logp, oracle(raised).stats.logp) < 2e-3, "half an ulp of 4096 per logit"
    zero = torch.zeros_like(inputs.hidden)
    flat = Inputs(zero, inputs.lm_head, inputs.target, zero, inputs.bias + 4096)
    assert max_error(subject.call(flat).stats.logp, oracle(flat).stats.logp) < 2e-6, (
        "exact logits: no error from the offset"
    )
