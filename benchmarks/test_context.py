"""Long personas: peak extra memory of a training step, by what is traded for it. One step each, in its own process."""

import pytest

from benchmarks.context import WAYS, measured_in_a_child

PERSONAS = [512, 2048, 4096, 8192]
MIB = 2**20


@pytest.mark.slow  # minutes each
@pytest.mark.parametrize("persona", PERSONAS)
@pytest.mark.benchmark(group="memory: long personas")
def test_memory_of_a_step(benchmark, persona):
    def measure() -> dict[str, dict[str, float]]:
        return {way: measured_in_a_child(way, persona) for way in WAYS}

    results = benchmark.pedantic(measure, rounds=1)
    # Correctness first: every way is the same function of the same weights.
    for way, result in results.items():
        assert result["loss"] == pytest.approx(results["full"]["loss"], rel=1e-5), way
    extra = {way: round(result["peak_extra_bytes"] / MIB) for way, result in results.items()}
    benchmark.extra_info["persona_tokens"] = persona
    benchmark.extra_info["peak_extra_mib"] = extra
    benchmark.extra_info["seconds"] = {way: round(result["seconds"], 1) for way, result in results.items()}
    print(f"\npersona {persona}: {dict(benchmark.extra_info)}")
    for way in ("persona_grad none", "mlp_tile", "checkpointing"):
        assert extra[way] < extra["full"] / 2, way
