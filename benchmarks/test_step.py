"""The cost of the counterfactual pass: a PerCE step compared with a cross-entropy step, at three persona lengths.

The model has SmolLM2-135M's shape and random weights, which need no download and do not change the cost of a step.
"""

import tempfile
import time
from statistics import median
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from perce import LossConfig, PerceArguments, PerceTrainer
from perce.data.batch import collate
from perce.model.patch import prepare_model
from tests.helpers.tiny import tiny_tokenizer

QUERY, RESPONSE, BATCH = 80, 48, 2
PERSONAS = {"half": 64, "four times": 512, "eight times": 1024}  # of query + response = 128 tokens
ROUNDS = 3


SMOLLM2_135M = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip


def smollm2_135m() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**SMOLLM2_135M)
    return prepare_model(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))


@pytest.fixture(scope="module")
def trainers():
    with tempfile.TemporaryDirectory() as directory:
        yield make_trainers(smollm2_135m(), directory)


def make_trainers(model: Any, directory: str) -> dict[str, PerceTrainer]:
    """One trainer per objective, all with the same model."""
    tokenizer = tiny_tokenizer()

    def arguments(objective: str) -> PerceArguments:
        return PerceArguments(directory, use_cpu=True, report_to="none", loss=LossConfig(objective=objective))

    return {
        objective: PerceTrainer(model, arguments(objective), processing_class=tokenizer)
        for objective in ("ce", "perce")
    }


def pair(persona: int, query: int = QUERY, response: int = RESPONSE, seed: int = 0) -> dict[str, Any]:
    """A pair of random ids with a persona of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(49152, (persona + query + response,), generator=generator).tolist(),
        "persona_span": (4, 4 + persona),
        "response_length": response,
        "personal": [False] * response,
    }


def batch(persona: int) -> dict[str, torch.Tensor]:
    return collate([pair(persona, seed=seed) for seed in range(BATCH)])


@pytest.mark.parametrize(
    "persona",
    [
        pytest.param(persona, id=name, marks=pytest.mark.slow if persona > min(PERSONAS.values()) else ())
        for name, persona in PERSONAS.items()
    ],
)
@pytest.mark.benchmark(group="training step: perce against cross-entropy")
def test_perce_step_against_ce_step(benchmark, trainers, persona):
    inputs = batch(persona)
    model = trainers["ce"].model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    items = torch.tensor(BATCH * RESPONSE)
    times: dict[str, list[float]] = {"ce": [], "perce": []}

    def step(objective: str) -> None:
        started = time.perf_counter()
        trainers[objective].training_step(model, dict(inputs), items)
        optimizer.step()
        optimizer.zero_grad()
        times[objective].append(time.perf_counter() - started)

    # Correctness first: with every weight clipped to 1, PerCE is cross-entropy.
    trainers["perce"].args.loss = LossConfig(clip_min=1.0, clip_max=1.0)
    losses = [trainers[name].compute_loss(model, dict(inputs), num_items_in_batch=items) for name in ("ce", "perce")]
    trainers["perce"].args.loss = LossConfig()
    torch.testing.assert_close(losses[0], losses[1])

    benchmark.pedantic(step, args=("perce",), setup=lambda: step("ce"), rounds=ROUNDS, warmup_rounds=1)
    ce, perce = (median(times[name][1:]) for name in ("ce", "perce"))
    benchmark.extra_info["ratio_to_ce"] = round(perce / ce, 3)
    benchmark.extra_info["ce_seconds"] = round(ce, 3)
    benchmark.extra_info["persona_tokens"] = persona
