"""Training steps of a large model with random weights, LoRA, bf16: PerCE and cross-entropy at several context lengths.

They measure seconds of forward and backward of one batch, tokens of its examples per second, and the allocator's peak,
to compare with the peak by perce.plan. Plans are made meanwhile in a process of their own, and come last. Steps at the
shortest context are warmed up and repeated. At longer contexts a single step is timed, because it takes seconds; what
a first step costs in addition is in it (lengths.py measures the part of attention).

steps             PerCE and cross-entropy at 8k and 32k, without a gradient through the persona at 128k
long, longest     one step at 128k, and at 256k, with a gradient through all tokens
attention         PyTorch's and flash-attn-4's
personas          eight requests for one persona of 8k: together, one by one, each with both persona_grads
"""

import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from statistics import median
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.gpu import child as children
from benchmarks.gpu.child import Child, Unable, die_with_parent
from benchmarks.gpu.clock import seconds_of_kernels
from perce.config.schema import MemoryConfig


class Case(NamedTuple):
    """One kind of step; also the last part of its line's key."""

    objective: str
    context: int
    persona_grad: Literal["full", "none"] = "full"
    mlp_tile: int = 0
    attention: str = "sdpa"
    requests: int = 1
    """How many share the persona in a forward pass; `context` is that of one of them."""
    branches_per_forward: int = 0

    @property
    def memory(self) -> MemoryConfig:
        shared = {"share_persona": self.requests, "branches_per_forward": self.branches_per_forward}
        return MemoryConfig(self.persona_grad, mlp_tile=self.mlp_tile, **(shared if self.requests > 1 else {}))

    def __str__(self) -> str:
        none = ", persona_grad none" if self.persona_grad == "none" else ""
        tile = f", mlp_tile {self.mlp_tile}" if self.mlp_tile else ""
        attention = "" if self.attention == "sdpa" else f", {self.attention}"
        requests = f", {self.requests} requests" if self.requests > 1 else ""
        one_by_one = ", one by one" if self.branches_per_forward else ""
        return f"{self.objective}/{self.context}{requests}{one_by_one}{none}{tile}{attention}"


def of_persona(context: int, requests: int) -> tuple[Case, ...]:
    """One request by itself, and several together and one by one, with and without a gradient through the persona."""
    together = Case("perce", context, requests=requests)
    one_by_one = together._replace(branches_per_forward=1)
    detached = (case._replace(persona_grad="none") for case in (together, one_by_one))
    return (Case("perce", context), together, one_by_one, *detached)


FLASH = "flash_attention_4"
CASES = {
    "steps": {
        "cuda": (Case("perce", 8192), Case("ce", 8192), Case("perce", 32768), Case("ce", 32768),
                 Case("perce", 131072, "none")),
        "cpu": (Case("perce", 96), Case("ce", 96), Case("perce", 160), Case("ce", 160), Case("perce", 160, "none")),
    },
    "long": {"cuda": (Case("perce", 131072, mlp_tile=4096),), "cpu": (Case("perce", 160, mlp_tile=32),)},
    "longest": {"cuda": (Case("perce", 262144, mlp_tile=4096),), "cpu": (Case("perce", 200, mlp_tile=32),)},
    "attention": {
        "cuda": (Case("perce", 8192, attention=FLASH), Case("perce", 8192, "none", attention=FLASH),
                 Case("perce", 32768), Case("perce", 32768, attention=FLASH), Case("perce", 32768, "none"),
                 Case("perce", 32768, "none", attention=FLASH)),
        "cpu": (Case("perce", 160), Case("perce", 160, attention="eager")),
    },
    "personas": {"cuda": of_persona(8192, 8), "cpu": of_persona(160, 3)},
}  # fmt: skip
"""By stage and device. Memory options cannot be switched off again, so cases without them come first."""
SHORT = {"cuda": 8192, "cpu": 96}
LARGEST = 30  # kernels of a step that are listed
QUERY_AND_RESPONSE = {"cuda": (512, 1024), "cpu": (16, 32)}
NOT_HELD = ("CUDA context", "optimiser states")
"""Parts of a plan that are not measured here."""


def shape(device: str) -> dict[str, Any]:
    from benchmarks.trainers import SHAPES

    return SHAPES["qwen3-8b" if device == "cuda" else "tiny"]


def plan(device: str, case: Case) -> dict[str, float]:
    """Memory and operations of such a step by perce.plan."""
    from transformers import AutoConfig

    from perce.config.commands import PlanOptions
    from perce.config.schema import ModelConfig
    from perce.config.step import StepConfig
    from perce.planning.memory import UPDATE
    from perce.planning.plans import Costs

    query, response = QUERY_AND_RESPONSE[device]
    options = StepConfig(
        context=case.context, query=query, response=response, activation_checkpointing=True,
        gradient_accumulation_steps=1, per_device_train_batch_size=case.requests, objective=case.objective,
    )  # fmt: skip
    model = ModelConfig(lora_r=16, precision="bf16", attn_implementation=case.attention)
    config = PlanOptions(model, options, case.memory)
    planned = Costs(AutoConfig.for_model(**shape(device)), device).of(config)
    # The allocator does not count the CUDA context, and there is no optimiser here.
    phases = [
        {name: size for name, size in phase.items() if name not in NOT_HELD}
        for name, phase in planned.memory.phases.items()
        if name != UPDATE
    ]
    return {"planned_bytes": max(sum(phase.values()) for phase in phases), "planned_flop": planned.flops.total}


class Steps:
    """The model, and its trainer."""

    def __init__(self, device: str, directory: str, cases: tuple[Case, ...]):
        from transformers import AutoConfig, AutoModelForCausalLM

        from perce.config.schema import LossConfig, ModelConfig
        from perce.model.branches import teach_branches
        from perce.model.loading import add_adapter, lora_config
        from perce.model.memory import enable_checkpointing
        from perce.model.patch import prepare_model
        from perce.training.arguments import PerceArguments
        from perce.training.trainer import PerceTrainer
        from tests.helpers.tiny import tiny_tokenizer

        torch.manual_seed(0)
        with torch.device(device):
            config = AutoConfig.for_model(**shape(device))
            base = prepare_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
        model = add_adapter(base, lora_config(ModelConfig(lora_r=16)))
        enable_checkpointing(base)
        self.losses = {name: LossConfig(objective=name) for name in ("perce", "ce")}
        arguments = PerceArguments(directory, use_cpu=device == "cpu", report_to="none", bf16=True)
        self.trainer = PerceTrainer(model, arguments, processing_class=tiny_tokenizer())
        self.model = self.trainer.accelerator.prepare_model(model)  # autocast, as in training
        if any(case.requests > 1 for case in cases):
            teach_branches(base)
        self.batches = {case: batch(device, case) for case in cases}
        self.memory: set[MemoryConfig] = set()

    def prepare(self, case: Case) -> None:
        """Sets the attention and memory options of a case; each memory option only once."""
        from perce.model.memory import prepare_memory
        from perce.model.probe import unwrapped

        unwrapped(self.trainer.model).set_attn_implementation(case.attention)
        if case.memory not in self.memory:
            prepare_memory(self.trainer.model, case.memory)
            self.memory.add(case.memory)

    def run(self, case: Case) -> None:
        """Forward and backward of one batch."""
        self.trainer.args.loss, self.trainer.args.memory = self.losses[case.objective], case.memory
        given = dict(self.batches[case])
        self.trainer.training_step(self.model, given, torch.tensor(len(given["target"])))
        self.model.zero_grad(set_to_none=True)


def batch(device: str, case: Case) -> dict[str, Any]:
    """Random tokens: requests that share a persona, or one."""
    from benchmarks.test_step import pair
    from perce.data.batch import collate

    query, response = QUERY_AND_RESPONSE[device]
    vocabulary, pairs = shape(device)["vocab_size"], []
    for number in range(case.requests):
        row = pair(case.context - query - response, query, response) | {"conversation": number, "persona": 0}
        own = [token + number for token in row["input_ids"][-query - response :]]
        row["input_ids"] = [token % vocabulary for token in row["input_ids"][: -query - response] + own]
        pairs.append(row)
    shared: dict[str, Any] = {"sharing": "branches", "unit": "persona"} if case.requests > 1 else {}
    return collate(pairs, persona_grad=case.persona_grad, branches_per_forward=case.branches_per_forward, **shared)


def measured(child: Child, steps: Steps, case: Case, repetitions: int) -> dict[str, Any]:
    """The median of all repetitions after the first, or the only repetition."""
    on_gpu = child.request.device == "cuda"
    steps.prepare(case)
    child.clock.free()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = [child.clock.seconds(lambda: steps.run(case)) for _ in range(repetitions)]
    seconds = median(times[1:] or times)
    return {
        "seconds": seconds, "first_seconds": times[0],
        "tokens_per_second": case.requests * case.context / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }  # fmt: skip


def kernels(steps: Steps, case: Case) -> dict[str, Any]:
    """The kernels of a step that take most time, and the sum of all kernels."""
    found = seconds_of_kernels(lambda: steps.run(case))
    largest = sorted(found.items(), key=lambda item: -item[1]["seconds"])[:LARGEST]
    return {"kernels": dict(largest), "sum": sum(kernel["seconds"] for kernel in found.values())}


def stage(child: Child) -> None:
    """Measures every case, then prints the kernels of the first case and the plans."""
    name, device = child.request.stage, child.request.device
    cases = CASES[name][device]
    with (
        tempfile.TemporaryDirectory() as directory,
        ProcessPoolExecutor(1, get_context("spawn"), die_with_parent) as pool,
    ):

        def make() -> Steps:
            try:
                return Steps(device, directory, cases)
            except ImportError as error:
                raise Unable(f"the training layer needs {error.name}, which is not installed") from error

        steps = child.prepared(f"{name}/model", make)
        if steps is None:
            return
        plans: dict[Case, Future] = {case: pool.submit(plan, device, case) for case in cases}
        for case in cases:
            repetitions = 3 if case.context == SHORT[device] else 1
            child.measured(
                f"{name}/{case}", lambda case=case, repetitions=repetitions: measured(child, steps, case, repetitions)
            )
        if cases[0].context == SHORT[device]:
            child.measured(f"{name}/{cases[0]}/kernels", lambda: kernels(steps, cases[0]))
        for case, future in plans.items():
            key = f"{name}/{case}/plan"
            if not child.out_of_time or future.done():
                left = max(0.0, child.until - time.monotonic())
                child.line(key, **child.attempt(lambda future=future, left=left: future.result(left)))
        pool.shutdown(wait=False, cancel_futures=True)


def prepare() -> None:
    """Slow imports."""
    with suppress(ImportError):  # a missing one is reported when it is needed
        import perce.training.trainer  # noqa: F401


if __name__ == "__main__":
    children.main(stage, __doc__, prepare)
