"""Whole training steps of a large model with random weights, LoRA, bf16: PerCE and cross-entropy over the context.

Seconds of forward and backward of one sequence, tokens per second, and the peak of the allocator, beside the peak that
perce.plan says. The plan is made in a process of its own meanwhile, and comes last.
"""

import tempfile
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch

from benchmarks.gpu import child as children
from benchmarks.gpu.child import Child, Unable, die_with_parent

OBJECTIVES = ("perce", "ce")
CONTEXTS = {"cuda": (8192, 32768), "cpu": (96, 160)}
QUERY_AND_RESPONSE = {"cuda": (512, 1024), "cpu": (16, 32)}
TINY_SHAPE = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


NOT_HELD = ("CUDA context", "optimiser states")
"""Parts of a plan that are not in what is measured here."""


def shape(device: str) -> dict[str, Any]:
    from benchmarks.trainers import SHAPES

    return SHAPES["qwen3-8b"] if device == "cuda" else TINY_SHAPE


def plan(device: str, objective: str, context: int) -> dict[str, float]:
    """What perce.plan says of such a step."""
    from transformers import AutoConfig

    from perce.config.commands import PlanOptions
    from perce.config.schema import ModelConfig, StepConfig
    from perce.planning.memory import UPDATE
    from perce.planning.plans import step_cost

    query, response = QUERY_AND_RESPONSE[device]
    options = StepConfig(
        context=context, query=query, response=response, activation_checkpointing=True, gradient_accumulation_steps=1,
        per_device_train_batch_size=1, objective=objective,
    )  # fmt: skip
    config = PlanOptions(ModelConfig(lora_r=16, precision="bf16"), options)
    planned = step_cost(AutoConfig.for_model(**shape(device)), config, device)
    # The allocator knows nothing of the context, and no optimiser has made its states here.
    phases = [
        {name: size for name, size in phase.items() if name not in NOT_HELD}
        for name, phase in planned.memory.phases.items()
        if name != UPDATE
    ]
    return {"planned_bytes": max(sum(phase.values()) for phase in phases), "planned_flop": planned.flops.total}


class Steps:
    """The model, and its trainer."""

    def __init__(self, device: str, directory: str):
        from transformers import AutoConfig, AutoModelForCausalLM

        from benchmarks.test_step import pair
        from benchmarks.trainers import _tokenizer
        from perce.config.schema import LossConfig, ModelConfig
        from perce.data.batch import collate
        from perce.model.loading import add_adapter, lora_config
        from perce.model.memory import enable_checkpointing
        from perce.model.patch import prepare_model
        from perce.training.arguments import PerceArguments
        from perce.training.trainer import PerceTrainer

        torch.manual_seed(0)
        with torch.device(device):
            config = AutoConfig.for_model(**shape(device))
            base = prepare_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
        model = add_adapter(base, lora_config(ModelConfig(lora_r=16)))
        enable_checkpointing(base)
        self.losses = {name: LossConfig(objective=name) for name in OBJECTIVES}
        arguments = PerceArguments(directory, use_cpu=device == "cpu", report_to="none", bf16=True)
        self.trainer = PerceTrainer(model, arguments, processing_class=_tokenizer())
        self.model = self.trainer.accelerator.prepare_model(model)  # autocast, as in training

        query, response = QUERY_AND_RESPONSE[device]
        vocabulary = shape(device)["vocab_size"]
        self.batches = {}
        for context in CONTEXTS[device]:
            row = pair(context - query - response, query, response)
            row["input_ids"] = [token % vocabulary for token in row["input_ids"]]
            self.batches[context] = collate([row])
        self.items = torch.tensor(response)

    def run(self, objective: str, context: int) -> None:
        """Forward and backward of one sequence."""
        self.trainer.args.loss = self.losses[objective]
        self.trainer.training_step(self.model, dict(self.batches[context]), self.items)
        self.model.zero_grad(set_to_none=True)


def measured(child: Child, steps: Steps, objective: str, context: int, repetitions: int) -> dict[str, Any]:
    """repetitions: after one that warms up."""
    on_gpu = child.request.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    first, *seconds = (child.clock.seconds(lambda: steps.run(objective, context)) for _ in range(repetitions + 1))
    return {
        "seconds": median(seconds), "first_seconds": first, "tokens_per_second": context / median(seconds),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }  # fmt: skip


def stage(child: Child) -> None:
    name, device = child.request.stage, child.request.device
    contexts = CONTEXTS[device]
    with (
        tempfile.TemporaryDirectory() as directory,
        ProcessPoolExecutor(1, get_context("spawn"), die_with_parent) as pool,
    ):

        def make() -> Steps:
            try:
                return Steps(device, directory)
            except ImportError as error:
                raise Unable(f"the training layer needs {error.name}, which is not installed") from error

        steps = child.prepared(f"{name}/model", make)
        if steps is None:
            return
        plans: dict[tuple[str, int], Future] = {
            (objective, context): pool.submit(plan, device, objective, context)
            for context in contexts for objective in OBJECTIVES
        }  # fmt: skip
        for context in contexts:
            for objective in OBJECTIVES:
                repetitions = 3 if context == contexts[0] else 1
                child.measured(
                    f"{name}/{objective}/{context}",
                    lambda context=context, objective=objective, repetitions=repetitions: measured(
                        child, steps, objective, context, repetitions
                    ),
                )
        for (objective, context), future in plans.items():
            key = f"{name}/{objective}/{context}/plan"
            if not child.out_of_time or future.done():
                child.line(key, **child.attempt(lambda future=future: future.result()))
        pool.shutdown(wait=False, cancel_futures=True)


def prepare() -> None:
    """Imports that take long."""
    with suppress(ImportError):  # which one is missing is said when it is needed
        import perce.training.trainer  # noqa: F401


if __name__ == "__main__":
    children.main(stage, __doc__, prepare)
