"""Replies of a conversation that share tokens, compared with separate replies in the better of two ways to batch."""

import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks import sharing
from benchmarks.memory import in_a_child
from benchmarks.test_step import smollm2_135m
from perce import load_examples
from perce.config.commands import EvaluateOptions
from perce.config.questions import EvaluateConfig, InferenceConfig, SplitConfig
from perce.config.schema import DataConfig
from perce.data.pairing import PairSource
from perce.data.pairs import PairBuilder
from perce.demo import default_model_path
from perce.hub import load_tokenizer
from perce.measuring.evaluation import Evaluator, make_batches
from perce.measuring.inference import Subject
from perce.model.branches import sharing_of, teach_branches
from tests.helpers.tiny import QWEN3

CASES = {  # directory, chat template, least replies, least speed-up: a share of the ceiling, or the factor
    "chance ids": (None, None, 8, "85 %"),
    "personachat-convai2": ("personachat-convai2", None, 16, "85 %"),
    "synthetic-persona-chat": ("synthetic-persona-chat", None, 8, "85 %"),
    "personachat-convai2, Qwen3's template": ("personachat-convai2", QWEN3, 16, "2 ×"),
}
ROUNDS = 2


def data_directory(name: str) -> Path:
    root = os.environ.get("PERCE_TEST_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"needs the directory {name} in $PERCE_TEST_DATA")
    return Path(root) / name


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow if CASES[name][0] else ()) for name in CASES]
)
@pytest.mark.benchmark(group="replies of a conversation: together against separately")
def test_together_against_separately(benchmark, case):
    name, template, replies, wanted = CASES[case]
    if name is None:
        pairs = sharing.conversation(replies)
    else:
        pairs = sharing.pairs_of(data_directory(name), template, replies)
    model = smollm2_135m().train()
    teach_branches(model)
    weights = sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    ceiling = sharing.flops(model.config, weights, pairs, False) / sharing.flops(model.config, weights, pairs, True)
    dealt = {way: sharing.batches(way, pairs) for way in sharing.WAYS}
    losses: dict[str, float] = {}
    seconds: dict[str, list[float]] = {way: [] for way in sharing.WAYS}

    def step(way: str) -> None:
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        losses[way] = sharing.step(model, dealt[way])
        seconds[way].append(time.perf_counter() - started)

    def separately() -> None:
        step("sequences")
        step("tokens")

    step("shared")  # the first step also creates threads and primitives
    seconds["shared"].clear()
    benchmark.pedantic(step, args=("shared",), setup=separately, rounds=ROUNDS)
    torch.testing.assert_close(losses["shared"], losses["sequences"], rtol=1e-4, atol=0.0)
    torch.testing.assert_close(losses["tokens"], losses["sequences"], rtol=1e-4, atol=0.0)
    medians = {way: median(times) for way, times in seconds.items()}
    ratio = min(medians["sequences"], medians["tokens"]) / medians["shared"]
    benchmark.extra_info |= {
        "case": case, "replies": len(pairs), "ratio_to_separate": round(ratio, 2), "flop_ceiling": round(ceiling, 2),
        "share_of_ceiling": round(ratio / ceiling, 3), "seconds": {way: round(x, 2) for way, x in medians.items()},
        "tokens": [sum(int(batch["tokens"][i]) for batch in dealt["shared"]) for i in (0, 1)],
    }  # fmt: skip
    assert ratio >= (2 if wanted == "2 ×" else 0.85 * ceiling)


@pytest.mark.slow
@pytest.mark.benchmark(group="replies of a conversation: peak memory")
def test_memory_is_no_higher(benchmark):
    found: dict[str, float] = {}

    def measure() -> None:
        found.update({way: in_a_child("benchmarks.sharing", way)["peak_extra_bytes"] / 2**20 for way in sharing.WAYS})

    benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info |= {"peak_extra_mib": {way: round(size) for way, size in found.items()}}
    assert found["shared"] <= min(found["sequences"], found["tokens"])


@pytest.mark.slow
@pytest.mark.benchmark(group="replies of a conversation: losses of an evaluation")
def test_an_evaluation_together_against_separately(benchmark):
    """Losses of the first 50 replies with, without and with another's persona, in the batches of perce.evaluate."""
    directory = data_directory("personachat-convai2")
    examples = load_examples(directory, "test", limit=50)
    model, tokenizer = smollm2_135m().eval(), load_tokenizer(str(default_model_path()))
    builder = PairBuilder(tokenizer, max_length=5000)
    options = EvaluateOptions(InferenceConfig(), DataConfig(), SplitConfig(), EvaluateConfig())
    seconds: dict[str, float] = {}
    records: dict[str, list[dict]] = {}

    def evaluate(sharing: Any) -> None:
        source = PairSource(examples, builder, False)
        subject = Subject(model, tokenizer, torch.device("cpu"), builder, source, sharing, examples, "test", {})
        evaluator = Evaluator(model, tokenizer, subject.device, options.evaluate, {}, sharing)
        batches = make_batches(examples.all, subject, options).batches
        started = time.perf_counter()
        losses = [evaluator.losses([item for group in batch for item in group]) for batch in batches]
        seconds[sharing] = time.perf_counter() - started
        records[sharing] = sorted((record for batch in losses for record in batch), key=lambda x: x["example"])

    assert sharing_of(model)[0] == "branches"
    benchmark.pedantic(evaluate, args=("branches",), setup=lambda: evaluate("none"), rounds=1)
    for shared, separate in zip(records["branches"], records["none"], strict=True):
        for name in ("loss", "loss_without", "loss_swapped"):
            assert abs(shared[name] - separate[name]) <= 1e-4 * shared["tokens"]
    ratio = seconds["none"] / seconds["branches"]
    benchmark.extra_info |= {"replies": len(examples.all), "ratio_to_separate": round(ratio, 2)}
    assert ratio >= 3.5
