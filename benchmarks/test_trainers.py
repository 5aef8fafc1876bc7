"""Memory and speed of training steps for several persona lengths, compared with a Trainer with full logits and TRL."""

import importlib.util

import pytest

from benchmarks.trainers import WAYS, measured

PERSONAS = [512, 2048]
MIB = 2**20


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("persona", PERSONAS)
@pytest.mark.benchmark(group="trainers: long personas")
def test_a_step_by_trainer(benchmark, persona):
    ways = [way for way in WAYS if not way.startswith("trl") or importlib.util.find_spec("trl")]

    def measure() -> dict[str, dict[str, float] | None]:
        return {way: measured(way, persona) for way in ways}

    results = benchmark.pedantic(measure, rounds=1)
    fitting = {way: result for way, result in results.items() if result}
    # Correctness first: every trainer computes the same function of the same weights.
    assert abs(fitting["perce"]["loss"] / fitting["perce-ce"]["loss"] - 0.8) > 1e-3, "not all weights at the floor"
    for way, result in fitting.items():
        reference = fitting["perce-ce" if way.endswith("-ce") else "perce"]
        assert result["loss"] == pytest.approx(reference["loss"], rel=2e-4), way
    benchmark.extra_info |= {
        "persona_tokens": persona,
        "peak_extra_mib": {way: round(result["peak_extra_bytes"] / MIB) for way, result in fitting.items()},
        "tokens_per_second": {way: round(result["tokens_per_second"]) for way, result in fitting.items()},
        "out_of_memory": [way for way in results if way not in fitting],
    }
    extra = benchmark.extra_info["peak_extra_mib"]
    assert "naive" not in extra or extra["perce"] < extra["naive"]
