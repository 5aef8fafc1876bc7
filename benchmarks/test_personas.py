"""A persona computed once for all its requests: speed-up compared with that in operations, memory, and generation."""

import time

import pytest
import torch

from benchmarks import personas, sharing
from benchmarks.memory import in_a_child
from benchmarks.test_step import smollm2_135m
from perce.config.questions import EvaluateConfig
from perce.demo import default_model_path
from perce.hub import load_tokenizer
from perce.measuring.evaluation import Evaluator
from perce.model.branches import teach_branches
from perce.model.prefill import prepare_prefill

NEW_TOKENS = 32


def ceiling(persona: int, detached: bool) -> float:
    """The most that sharing can speed up a step: its operations without sharing over those with it."""
    model = smollm2_135m()
    weights = sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    pairs = personas.pairs_of(persona)
    counts = [sharing.flops(model.config, weights, pairs, shared, "persona", detached) for shared in (False, True)]
    return counts[0] / counts[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("detached", [False, True], ids=["full", "none"])
@pytest.mark.benchmark(group="eight requests of a persona of 2,048 tokens: a step")
def test_requests_together_against_separately(benchmark, detached):
    """All ways in turn in one process; memory is measured separately, because its allocator settings are slow."""
    model, pairs = smollm2_135m().train(), personas.pairs_of(2048)
    teach_branches(model)
    prepare_prefill(model)
    seconds, losses = {}, {}

    def measure() -> None:
        for name in ("separate", "together", "one by one"):
            dealt = personas.batches(name, pairs, detached)
            model.zero_grad(set_to_none=True)
            started = time.perf_counter()
            losses[name] = sharing.step(model, dealt)
            seconds[name] = time.perf_counter() - started

    sharing.step(model, personas.batches("together", personas.pairs_of(16), detached))  # threads and primitives
    benchmark.pedantic(measure, rounds=1)
    ratio, most = seconds["separate"] / seconds["together"], ceiling(2048, detached)
    benchmark.extra_info |= {
        "persona_grad": "none" if detached else "full", "ratio_to_separate": round(ratio, 2),
        "flop_ceiling": round(most, 2), "share_of_ceiling": round(ratio / most, 3),
        "seconds": {name: round(x, 1) for name, x in seconds.items()},
    }  # fmt: skip
    for name in ("together", "one by one"):
        assert losses[name] == pytest.approx(losses["separate"], rel=1e-4)
    assert detached or ratio >= 0.85 * most


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("detached", [False, True], ids=["full", "none"])
@pytest.mark.benchmark(group="eight requests of a persona of 2,048 tokens: peak memory")
def test_memory_beside_one_request(benchmark, detached):
    found = {}

    def measure() -> None:
        for name in ("one", "together", "one by one"):
            child = in_a_child("benchmarks.personas", "none, " * detached + name, 2048)
            found[name] = child["peak_extra_bytes"] / 2**20

    benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info |= {"peak_extra_mib": {name: round(size) for name, size in found.items()}}
    assert detached or found["one by one"] <= 1.1 * found["one"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", ["", "none, "], ids=["full", "none"])
@pytest.mark.benchmark(group="eight requests of a persona of 8,192 tokens, checkpointed: a step")
def test_a_long_persona(benchmark, way):
    found = {}

    def measure() -> None:
        for name in ("one", "together", "one by one"):
            found[name] = in_a_child("benchmarks.personas", f"{way}{name}, checkpointing", 8192)

    benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info |= {
        "seconds": {name: round(x["seconds"], 1) for name, x in found.items()},
        "peak_extra_mib": {name: round(x["peak_extra_bytes"] / 2**20) for name, x in found.items()},
        "eight_separate_to_together": round(8 * found["one"]["seconds"] / found["together"]["seconds"], 2),
        "flop_ceiling": round(ceiling(8192, bool(way)), 2),  # of steps without checkpointing
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.benchmark(group="eight requests of a persona of 2,048 tokens: peak memory, checkpointed")
def test_memory_is_no_higher_than_of_a_batch(benchmark):
    """With checkpointing, because a batch of eight whole sequences would otherwise take more than 20 GB."""
    found = {}

    def measure() -> None:
        for name in ("together", "batched"):
            child = in_a_child("benchmarks.personas", f"{name}, checkpointing", 2048)
            found[name] = child["peak_extra_bytes"] / 2**20

    benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info |= {"peak_extra_mib": {name: round(size) for name, size in found.items()}}
    assert found["together"] <= found["batched"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.benchmark(group="eight replies to a persona of 2,048 tokens: writing them")
def test_replies_to_one_persona(benchmark):
    """Greedy replies of a model of SmolLM2-135M's shape; "batched" pads whole prompts, as without sharing."""
    model, tokenizer = smollm2_135m().eval(), load_tokenizer(str(default_model_path()))
    pairs = personas.pairs_of(2048)
    # Prompts have several lengths, so that there is padding.
    prompts = [pair["input_ids"][: -personas.RESPONSE - 2 * place] for place, pair in enumerate(pairs)]
    options = EvaluateConfig(temperature=0, max_new_tokens=NEW_TOKENS)
    device, seconds, written = torch.device("cpu"), {}, {}
    plain = Evaluator(model, tokenizer, device, options, {})
    shared = Evaluator(model, tokenizer, device, options, {}, "branches")
    calls = {
        "separately": lambda: [plain.generated([prompt], {0})[0] for prompt in prompts],
        "batched": lambda: plain.generated(prompts, {0}),
        "shared": lambda: shared.generated(prompts, {0}),
    }

    def measure() -> None:
        for name, call in calls.items():
            started = time.perf_counter()
            written[name] = call()
            seconds[name] = time.perf_counter() - started

    shared.generated(prompts[:2], {0})  # threads and primitives
    benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info |= {
        "new_tokens": NEW_TOKENS, "seconds": {name: round(x, 1) for name, x in seconds.items()},
        "ratio_to_separate": round(seconds["separately"] / seconds["shared"], 2),
        "ratio_to_batched": round(seconds["batched"] / seconds["shared"], 2),
    }  # fmt: skip
    assert written["shared"] == written["separately"]
    assert seconds["separately"] / seconds["shared"] >= 3
