"""Long personas: peak extra memory of a training step, by memory option. One step each, in its own process."""

from functools import cache, partial

import pytest
from transformers import LlamaConfig

from benchmarks.context import QUERY, RESPONSE, WAYS
from benchmarks.memory import in_a_child
from benchmarks.test_step import SMOLLM2_135M
from perce import MemoryConfig
from perce.config.commands import PlanOptions
from perce.config.schema import ModelConfig
from perce.config.step import StepConfig
from perce.planning.plans import Costs

PERSONAS = {  # tokens: the ways that are measured; with long personas a step takes 1 to 4 minutes
    512: tuple(WAYS),
    2048: tuple(WAYS),
    4096: ("checkpointing", "checkpointing + mlp_tile", "persona_grad none + checkpointing"),
    8192: ("checkpointing",),
}
MIB = 2**20

measured = cache(partial(in_a_child, "benchmarks.context"))


def planned(persona: int, way: str) -> int:
    """Peak bytes of the same step by perce.plan, weights and optimiser states included."""
    options = dict(WAYS[way])
    checkpointing = options.pop("checkpointing", False)
    context = persona + QUERY + RESPONSE
    plan = StepConfig(
        context=context, query=QUERY, response=RESPONSE, activation_checkpointing=checkpointing,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    config = PlanOptions(ModelConfig(lora_r=16, precision="fp32"), plan, MemoryConfig(**options))
    return Costs(LlamaConfig(**SMOLLM2_135M), "cpu").of(config).memory.peak


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("persona", PERSONAS)
@pytest.mark.benchmark(group="memory: long personas")
def test_memory_of_a_step(benchmark, persona):
    ways = PERSONAS[persona]

    def measure() -> dict[str, dict[str, float]]:
        return {way: measured(way, persona) for way in ways}

    results = benchmark.pedantic(measure, rounds=1)
    # Correctness first: every way computes the same function of the same weights.
    for way, result in results.items():
        assert result["loss"] == pytest.approx(results["checkpointing"]["loss"], rel=1e-5), way
    extra = {way: round(result["peak_extra_bytes"] / MIB) for way, result in results.items()}
    benchmark.extra_info["persona_tokens"] = persona
    benchmark.extra_info["peak_extra_mib"] = extra
    benchmark.extra_info["planned_mib"] = {
        way: round(planned(persona, way) / MIB) for way in ways if not way.startswith("naive")
    }
    benchmark.extra_info["seconds"] = {way: round(result["seconds"], 1) for way, result in results.items()}
    if ways == tuple(WAYS):
        assert extra["checkpointing"] < extra["naive + checkpointing"]
        for way in ("persona_grad none", "mlp_tile", "checkpointing"):
            assert extra[way] < extra["full"] / 2, way


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.benchmark(group="memory: long personas")
def test_memory_grows_with_the_persona_as_planned(benchmark):
    """Memory per token between the shortest and the longest persona: the checkpoints and one layer's working set."""
    short, long, way = min(PERSONAS), max(PERSONAS), "checkpointing"

    def grown() -> float:
        first, last = (measured(way, persona)["peak_extra_bytes"] for persona in (short, long))
        return last - first

    a_token = benchmark.pedantic(grown, rounds=1) / (long - short)
    expected = (planned(long, way) - planned(short, way)) / (long - short)
    benchmark.extra_info |= {"bytes_a_token": round(a_token), "planned_bytes_a_token": round(expected)}
    assert expected / 1.3 <= a_token <= 1.3 * expected
