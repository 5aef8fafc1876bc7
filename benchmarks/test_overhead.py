"""How much time the counterfactual pass adds to a step, for several persona lengths, and the expected line.

There are L_f factual and L_cf counterfactual tokens. A forward counts as one, a backward as two (one with frozen
weights), and recomputed activations as one more. So the pass adds L_cf / (k · L_f) of a cross-entropy step, with k = 3
(all weights), 2 (LoRA), 4 and 3 (the same with activation checkpointing). Attention and head are left out of that line;
perce.plan counts them.

Measured inside PerCE steps: the seconds of the pass divided by those of the rest of the step, which includes the head's
product for the pass. The fastest of three rounds counts, separately for the pass and for the rest: other programs on
the machine only add time, and an interruption distorts the short pass most. SmolLM2-135M's shape.
"""

import tempfile
import time

import pytest
import torch

from benchmarks.test_step import make_trainers, pair, smollm2_135m
from perce.config.commands import PlanOptions
from perce.config.schema import ModelConfig
from perce.config.step import StepConfig
from perce.data.batch import collate
from perce.model.loading import add_adapter, lora_config
from perce.model.memory import enable_checkpointing
from perce.planning.plans import Costs

QUERY, RESPONSE = 80, 48
WITHOUT_PERSONA = QUERY + RESPONSE
PERSONAS = [128, 512, 1024, 2048]
LINE = {"full": 3, "lora": 2, "full-checkpointed": 4, "lora-checkpointed": 3}
ROUNDS = 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", LINE)
@pytest.mark.benchmark(group="overhead of the counterfactual pass")
def test_overhead_of_the_counterfactual_pass(benchmark, way):
    lora, checkpointed = way.startswith("lora"), way.endswith("checkpointed")
    options = ModelConfig(lora_r=16 if lora else 0, precision="fp32")
    base = smollm2_135m()
    model = add_adapter(base, lora_config(options)) if lora else base
    if checkpointed:
        enable_checkpointing(base)
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainers(model, directory)["perce"]
    items = torch.tensor(RESPONSE)

    def step(persona: int) -> tuple[float, float]:
        """Seconds of the pass, and of the rest of the step."""
        batch = collate([pair(persona, QUERY, RESPONSE)])
        counterfactual = trainer.estimation_clock.seconds()
        started = time.perf_counter()
        trainer.training_step(model, batch, items)
        whole = time.perf_counter() - started
        counterfactual = trainer.estimation_clock.seconds() - counterfactual
        return counterfactual, whole - counterfactual

    def curve() -> dict[int, float]:
        step(PERSONAS[0])
        rounds = [{persona: step(persona) for persona in PERSONAS} for _ in range(ROUNDS)]
        fastest = {persona: map(min, zip(*(row[persona] for row in rounds), strict=True)) for persona in PERSONAS}
        return {persona: counterfactual / rest for persona, (counterfactual, rest) in fastest.items()}

    def planned(persona: int) -> float:
        context = persona + WITHOUT_PERSONA
        plan = StepConfig(
            context=context, query=QUERY, response=RESPONSE, activation_checkpointing=checkpointed,
            gradient_accumulation_steps=1,
        )  # fmt: skip
        return Costs(base.config, "cpu").of(PlanOptions(options, plan)).flops.overhead

    measured = benchmark.pedantic(curve, rounds=1)
    line = {persona: WITHOUT_PERSONA / (LINE[way] * (persona + WITHOUT_PERSONA)) for persona in PERSONAS}
    benchmark.extra_info |= {
        "measured": {persona: round(share, 4) for persona, share in measured.items()},
        "line": {persona: round(share, 4) for persona, share in line.items()},
        "planned": {persona: round(planned(persona), 4) for persona in PERSONAS},
    }
    # Attention and the head add time to the rest of a step, and small batches run slower, so the bounds are wide.
    for persona, share in measured.items():
        assert line[persona] / 3 < share < 2 * line[persona], persona
