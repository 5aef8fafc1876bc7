"""Properties of the op over its whole input space, searched by hypothesis (profiles in conftest.py)."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from perce_kernels import fused_perce_loss
from tests.helpers.numerics import IGNORE, TRAINABLE, Inputs, assert_matches, call, make_inputs, oracle

pytestmark = pytest.mark.usefixtures("poisoned_memory", "small_chunks")


@st.composite
def calls(draw, normalize=("none", "batch", "sequence")) -> tuple[Inputs, dict]:
    """Any valid call in fp32: sizes from 0 or 1, every source of weights, every option."""
    n, d, v = draw(st.integers(0, 40)), draw(st.integers(1, 9)), draw(st.integers(1, 300))
    inputs = make_inputs(
        n, d, v, ignored=draw(st.sampled_from([0.0, 0.3, 0.9, 1.1])), bias=draw(st.booleans()),
        spread=draw(st.sampled_from([0.0, 1.0, 4.0])), seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip
    low, high = sorted(draw(st.tuples(*[st.floats(0, 8)] * 2)))
    options = {
        "clip_min": low,
        "clip_max": high,
        "contrast": draw(st.sampled_from(["log", "ratio"])),
        "normalize": draw(st.sampled_from(normalize)),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "softcap": draw(st.none() | st.floats(2, 50)),
        "logit_scale": draw(st.floats(-2, 2)),
        "compact": draw(st.booleans()),
    }
    if options["normalize"] == "sequence":
        options["seq_id"] = torch.tensor(draw(st.lists(st.integers(-2, 3), min_size=n, max_size=n)), dtype=torch.int64)
    if options["reduction"] == "mean":
        count = draw(st.none() | st.integers(1, 10**6))
        options["num_items"] = torch.tensor(count) if count is not None and draw(st.booleans()) else count
    source = draw(st.sampled_from(["hidden_cf", "logp_cf", "token_weight"]))
    if source != "hidden_cf":
        inputs = Inputs(inputs.hidden, inputs.lm_head, inputs.target, None, inputs.bias)
        options[source] = torch.rand(n) * (8 if source == "token_weight" else -8)
    return inputs, options


@given(calls())
def test_any_call_matches_the_oracle(case):
    inputs, options = case
    # exp(pir) multiplies the fp32 error of pir by up to 8, and normalisation divides by a sum that may be tiny.
    raw = oracle(inputs, **options | {"normalize": "none", "seq_id": None}).stats.token_weight
    assume(options["normalize"] == "none" or bool((raw[inputs.target != IGNORE] > 1e-2).all()))
    assert_matches(call(inputs, **options), oracle(inputs, **options), torch.float32, slack=10)


@given(calls(normalize=["none"]))
def test_weights_lie_within_the_clip_and_the_reductions_agree(case):
    inputs, options = case
    options = {name: x for name, x in options.items() if name not in ("normalize", "seq_id", "reduction", "num_items")}
    given_weights = options.get("token_weight")
    losses = {
        reduction: fused_perce_loss(**inputs.kwargs(), **options, reduction=reduction, return_stats=True)
        for reduction in ("mean", "sum", "none")
    }
    valid = inputs.target != IGNORE
    none, stats = losses["none"]
    for _, other in losses.values():
        for name, value in stats._asdict().items():
            torch.testing.assert_close(getattr(other, name), value, rtol=1e-4, atol=1e-4)
        weight = other.token_weight[valid]
        if given_weights is None:
            low, high = (torch.tensor(options[name]) for name in ("clip_min", "clip_max"))
            assert ((weight >= low) & (weight <= high)).all()
        else:
            assert torch.equal(weight, given_weights[valid])
    torch.testing.assert_close(losses["sum"][0], none.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses["mean"][0], none.sum() / max(int(valid.sum()), 1), rtol=1e-4, atol=1e-4)


@given(calls(normalize=["none"]), st.integers(0, 2**16))
def test_order_of_the_tokens_does_not_matter(case, seed):
    inputs, options = case
    order = torch.randperm(inputs.hidden.shape[0], generator=torch.Generator().manual_seed(seed))
    moved = {name: x[order] for name, x in options.items() if name in ("logp_cf", "token_weight")}
    hidden_cf = None if inputs.hidden_cf is None else inputs.hidden_cf[order]
    shuffled = Inputs(inputs.hidden[order], inputs.lm_head, inputs.target[order], hidden_cf, inputs.bias)
    ours, theirs = call(inputs, **options), call(shuffled, **options | moved)
    for a, b in zip(ours.stats, theirs.stats, strict=True):
        torch.testing.assert_close(a[order], b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.grads["hidden"][order], theirs.grads["hidden"], rtol=1e-3, atol=1e-4)
    for name in set(ours.grads) - {"hidden"}:
        torch.testing.assert_close(ours.grads[name], theirs.grads[name], rtol=1e-3, atol=1e-4)


@given(calls(normalize=["none"]))
def test_dropping_and_masking_ignored_rows_are_the_same(case):
    inputs, options = case
    dropped, masked = (call(inputs, **options | {"compact": compact}) for compact in (True, False))
    torch.testing.assert_close(dropped.loss, masked.loss, rtol=1e-4, atol=1e-4)
    for a, b in zip(dropped.stats, masked.stats, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for name in set(TRAINABLE) & set(dropped.grads):
        torch.testing.assert_close(dropped.grads[name], masked.grads[name], rtol=1e-3, atol=1e-4)
