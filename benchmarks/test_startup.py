"""What the checks before training take, by check, compared with a training step.

The model has SmolLM2-135M's shape; there are two pairs, in one way those of a conversation.

Checks and steps take turns, and the fastest of each counts, because other programs on the machine only add time.
"""

import functools
import tempfile
import time

import pytest

import benchmarks.test_step
import perce.model.loading
import perce.training.checks
import perce.training.trainer
from benchmarks.test_step import PERSONAS, batch, make_trainers, pair, smollm2_135m
from perce import MemoryConfig, PerceArguments, PerceTrainer
from perce.config.schema import ModelConfig
from perce.model.loading import add_adapter, lora_config
from perce.model.memory import CHECKPOINTING
from tests.helpers.tiny import tiny_tokenizer

ALLOWED = 3.0  # steps of two sequences of 192 tokens, all weights trained, that all checks together may take
ROUNDS = 2
CHECKS = [
    (benchmarks.test_step, "prepare_model"), (perce.model.loading, "unused_layers"),
    *((perce.training.trainer, name) for name in ("check_own_loss", "router_of", "shared_by")),
    *((perce.training.checks, name) for name in ("check_gradients", "check_step")),
]  # fmt: skip
WAYS = {
    "full": (0, {}),
    "lora": (16, {}),
    "lora, everything on": (
        16, {CHECKPOINTING: True, "memory": MemoryConfig(persona_grad="none", mlp_tile=512)},
    ),
    "lora, a conversation": (16, {}),
}  # fmt: skip
QUICK = ("full", "lora, everything on")


@pytest.fixture(scope="module")
def step():
    """Makes one training step, without the optimiser's part."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainers(smollm2_135m(), directory)["perce"]
        inputs = batch(min(PERSONAS.values()))
        yield lambda: trainer.training_step(trainer.model, dict(inputs), inputs["target"].numel())


@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
@pytest.mark.benchmark(group="checks before training")
def test_checks_before_training(benchmark, way, step, monkeypatch):
    spent: dict[str, float] = {}
    rounds: list[dict[str, float]] = []
    steps: list[float] = []

    def timed(name, check):
        @functools.wraps(check)
        def run(*args, **kwargs):
            started = time.perf_counter()
            try:
                return check(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

        return run

    for module, name in CHECKS:
        monkeypatch.setattr(module, name, timed(name, getattr(module, name)))
    lora_r, options = WAYS[way]
    pairs = [pair(64, 16, 16) | ({"conversation": 0} if "conversation" in way else {})] * 2

    def start() -> None:
        spent.clear()
        model = smollm2_135m()
        if lora_r:
            model = add_adapter(model, lora_config(ModelConfig(lora_r=lora_r)))
        with tempfile.TemporaryDirectory() as directory:
            args = PerceArguments(directory, use_cpu=True, report_to="none", dataloader_pin_memory=False, **options)
            PerceTrainer(model, args, train_dataset=pairs, processing_class=tiny_tokenizer())
        rounds.append(dict(spent))

    def time_step() -> None:
        started = time.perf_counter()
        step()
        steps.append(time.perf_counter() - started)

    benchmark.pedantic(start, setup=time_step, rounds=ROUNDS, warmup_rounds=1)
    fastest = min(rounds, key=lambda seconds: sum(seconds.values()))
    ratio = sum(fastest.values()) / min(steps)
    benchmark.extra_info |= {
        "ratio_to_step": round(ratio, 2),
        "step_seconds": round(min(steps), 2),
        "seconds": {name: round(seconds, 2) for name, seconds in fastest.items()},
    }
    assert fastest.keys() >= {"prepare_model", "check_step"}
    assert ratio <= ALLOWED
