"""persona_grad="none": the same loss, and the gradient of autograd with the persona's keys and values detached."""

from itertools import product

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from perce import UserError
from perce.data.batch import collate
from perce.model import prefill
from perce.model.loading import add_adapter
from perce.model.passes import counterfactual_hidden, factual
from perce.model.patch import prepare_model
from perce.model.prefill import CACHE_ARGUMENT, prepare_prefill
from perce.objectives import OBJECTIVES, HeadCall
from tests.helpers.tiny import VOCAB, demo_pairs, tiny_model, with_drawn_adapter

PAIRS = demo_pairs(3)
WEIGHTING = OBJECTIVES["perce"].weighting(clip_min=0.005)  # a random model hardly listens to the persona
ARCHITECTURES = ["llama", "qwen3", "gemma3", "gemma2"]
WINDOW = 16  # window of Gemma's sliding layers


def prepared(architecture="llama", *, lora=False, checkpointing=False, **changes):
    model = prepare_model(tiny_model(architecture, **changes))
    if lora:
        torch.manual_seed(1)
        model = with_drawn_adapter(add_adapter(model, LoraConfig(r=4, target_modules="all-linear")))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    prepare_prefill(model)
    return model.train()


def step(model, pairs, persona_grad):
    """(loss, statistics, gradients by name) of one step."""
    batch = collate(pairs, persona_grad=persona_grad)
    call = HeadCall(batch["target"], WEIGHTING, counterfactual_hidden(model, batch))
    model.zero_grad()
    done = factual(model, batch, call)
    loss, statistics = done.loss, done[:4]
    loss.backward()
    return loss.detach(), statistics, gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class DetachedPersona(DynamicCache):
    """A cache that cuts the graph between what one forward stores and what the next one reads."""

    def detach(self):
        for layer in self.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()


def oracle(model, pairs):
    """The PerCE loss on full logits, one sequence at a time: eager attention, one forward over the whole persona, whose
    graph is then cut."""
    model.set_attn_implementation("eager")
    total, count = 0.0, 0
    for pair in pairs:
        ids, n, (start, end) = torch.tensor([pair["input_ids"]]), pair["response_length"], pair["persona_span"]
        cache = DetachedPersona(config=model.config)
        model(input_ids=ids[:, :end], use_cache=True, **{CACHE_ARGUMENT: cache})
        cache.detach()
        logits = model(input_ids=ids[:, end:], use_cache=True, **{CACHE_ARGUMENT: cache}).logits[0, -n - 1 : -1]
        with torch.no_grad():
            ids_cf = torch.cat([ids[:, :start], ids[:, end:]], dim=1)
            logits_cf = model(input_ids=ids_cf, use_cache=False).logits[0, -n - 1 : -1]
        logp, logp_cf = (x.float().log_softmax(-1).gather(1, ids[0, -n:, None])[:, 0] for x in (logits, logits_cf))
        weight = WEIGHTING.weight((logp - logp_cf).detach())
        total, count = total - (weight * logp).sum(), count + n
    model.zero_grad()
    (total / count).backward()
    return (total / count).detach(), gradients(model)


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys() and expected
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("architecture", "lora", "checkpointing"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * ((i + sum(case[1:])) % 2))
        for i, architecture in enumerate(ARCHITECTURES)
        for case in product([architecture], (False, True), (False, True))
    ],
)
def test_loss_of_full_and_gradient_with_the_persona_detached(architecture, lora, checkpointing, monkeypatch):
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 64)
    model = prepared(architecture, lora=lora, checkpointing=checkpointing)
    assert all(len(pair["input_ids"]) > 2 * WINDOW and pair["persona_span"][1] > 64 for pair in PAIRS)
    loss, statistics, grads = step(model, PAIRS, "none")
    full_loss, full_statistics, full_grads = step(model, PAIRS, "full")
    torch.testing.assert_close(loss, full_loss, atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(statistics, full_statistics, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    model.gradient_checkpointing_disable()  # it would drop the oracle's cache
    expected_loss, expected = oracle(model, PAIRS)
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    assert_same_gradients(grads, expected)
    keys = next(name for name in grads if "k_proj" in name and "lora_A" not in name)
    assert (grads[keys] - full_grads[keys]).norm() > 1e-2 * full_grads[keys].norm(), "the persona's part is missing"


@pytest.mark.parametrize("persona_grad", ["none", "full"])
@pytest.mark.parametrize("lora", [False, True])
def test_every_weight_has_its_gradient_in_one_autocast_of_all_passes(lora, persona_grad):
    """torch before 2.11 hands the copy of a weight that a pass without a gradient has cast to the pass with one."""
    model = prepared(lora=lora, checkpointing=persona_grad == "none")
    *_, expected = step(model, PAIRS, persona_grad)
    with torch.autocast("cpu", torch.bfloat16):
        *_, found = step(model, PAIRS, persona_grad)
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).norm() < 0.2 * expected[name].norm(), name


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_the_chunk_size_does_not_matter(chunk, monkeypatch):
    model = prepared("gemma3", checkpointing=True)
    expected_loss, _, expected = step(model, PAIRS[:1], "none")
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", chunk)
    loss, _, grads = step(model, PAIRS[:1], "none")
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=1e-6)
    assert_same_gradients(grads, expected)


class LargestTensors(TorchDispatchMode):
    """Records the two largest extents of every tensor that an op returns."""

    def __init__(self):
        super().__init__()
        self.extents = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.dim() > 1:
                self.extents.add(tuple(sorted(x.shape)[-2:]))
        return out


def long_pair(persona, rest=40, response=12):
    ids = torch.randint(1, VOCAB, (4 + persona + rest,), generator=torch.Generator().manual_seed(0)).tolist()
    return {
        "input_ids": ids, "persona_span": (4, 4 + persona), "response_length": response, "personal": [False] * response,
    }  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_nothing_of_two_sequence_lengths_or_of_sequence_times_vocabulary(architecture, checkpointing, monkeypatch):
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 50)
    model, pair = prepared(architecture, checkpointing=checkpointing), long_pair(persona=600)
    with LargestTensors() as seen:
        step(model, [pair], "none")
    assert max(extents[1] for extents in seen.extents) > 600, "the keys of the whole sequence are seen"
    assert max(extents[0] for extents in seen.extents) <= 50, "no more than a chunk of queries at a time"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_nor_with_the_personas_gradient(architecture, checkpointing):
    """Sliding windows under sdpa have a T × T mask, and are refused if it is large (training/datasets.py)."""
    model, pair = prepared(architecture, checkpointing=checkpointing), long_pair(persona=600)
    with LargestTensors() as seen:
        step(model, [pair], "full")
    assert max(extents[1] for extents in seen.extents) > 600, "whole sequences are seen"
    assert max(extents[0] for extents in seen.extents) <= 50, "besides the widths of heads and layers, at most 48"


def saved_bytes(model, pair, persona_grad):
    """Bytes that backward holds on to."""
    seen = {}

    def pack(x):
        seen[x.untyped_storage().data_ptr()] = (
            x.untyped_storage().nbytes(),
            x,
        )  # keeps x, or its address may recur
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step(model, [pair], persona_grad)
    return sum(size for size, _ in seen.values())


def test_what_backward_holds_of_the_persona_is_keys_values_and_a_mask():
    model = prepared()
    grown = {
        persona_grad: saved_bytes(model, long_pair(700), persona_grad)
        - saved_bytes(model, long_pair(600), persona_grad)
        for persona_grad in ("none", "full")
    }
    layers, heads, head, queries = 2, 4, 8, 40 - 1
    # with a mask, sdpa repeats grouped keys for the query heads and converts the mask to float
    assert grown["none"] <= 100 * (layers * (2 * heads * head + queries) * 4 + 8)  # 8: the token's id
    assert grown["full"] > 4 * grown["none"]


def test_a_model_that_cannot_go_on_from_a_prefix_is_refused():
    model = prepare_model(tiny_model())
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(UserError, match=r"attn_implementation=paged\|sdpa"):
        prepare_prefill(model)
