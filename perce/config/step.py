"""The options of the step that `python -m perce.plan` plans."""

import re
from dataclasses import dataclass
from typing import Literal

from perce.config.options import option as _option
from perce.config.options import require as _require
from perce.config.schema import OBJECTIVE, objective_of
from perce.objectives import PERSONAS, Objective

MEMORY_UNITS = {"mib": 2**20, "gib": 2**30, "tib": 2**40, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True)
class StepConfig:
    """The step that is planned. Names that `python -m perce.train` has too mean the same."""

    context: int = _option(4096, "tokens of a factual sequence: persona, query and response; longce: of a document")
    query: int = _option(128, "tokens of it that the counterfactual prompt keeps: chat template, query")
    response: int = _option(512, "tokens of it that are the response")
    per_device_train_batch_size: int = _option(1, "sequences per forward pass")
    gradient_accumulation_steps: int | None = _option(
        None, "forward passes per optimiser step; default: as many as give 8 sequences per device"
    )
    objective: str = OBJECTIVE
    estimate: Literal["online", "epoch", "frozen"] = _option(
        "online", "when weights are estimated: under epoch and frozen before the steps, which then cost as under ce"
    )
    short_context: int = _option(4096, "longce: tokens of the short context")
    short_stride: int = _option(1024, "longce: tokens that share the beginning of a short context")
    activation_checkpointing: bool = _option(False, "recompute activations in backward")
    device: Literal["auto", "cpu", "cuda"] = _option(
        "auto", "where it is to run; auto: cuda where there is one or --gpu_memory is given"
    )
    devices: int = _option(1, "how many; each takes its own sequences")
    sharding: Literal["none", "full"] = _option(
        "none", "full: weights, gradients and optimiser states divided over the devices (FSDP)"
    )
    gpu_memory: str | None = _option(
        None, "memory of one device, such as 80GiB: what fits, and the largest context", "SIZE"
    )
    tflops: float | None = _option(None, "matmul rate of one device, 1e12 FLOP/s; default: measured here in a second")
    json: str | None = _option(None, "the whole plan as JSON", "FILE")

    def __post_init__(self) -> None:
        for name in ("query", "response", "per_device_train_batch_size", "devices", "short_context", "short_stride"):
            _require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        steps = self.gradient_accumulation_steps
        _require(steps is None or steps >= 1, "gradient_accumulation_steps", ">= 1", steps)
        expected = f">= {self.shortest}{'' if self.of_documents else ' (query + response + a persona)'}"
        _require(self.context >= self.shortest, "context", expected, self.context)
        _require(self.tflops is None or 0 < self.tflops < float("inf"), "tflops", "> 0", self.tflops)
        _require(self.sharding == "none" or self.devices > 1, "sharding", "none with one device", self.sharding)
        _require(self.memory_bytes() is None or self.device != "cpu", "gpu_memory", "--device cuda", "--device cpu")

    @property
    def forwards(self) -> int:
        """Forward passes per optimiser step."""
        return self.gradient_accumulation_steps or max(8 // self.per_device_train_batch_size, 1)

    @property
    def of_documents(self) -> bool:
        """Documents have neither query nor persona: all but their first token is the response."""
        return PERSONAS not in objective_of(self.objective).takes

    @property
    def shortest(self) -> int:
        """Tokens of the shortest context that there is."""
        return 2 if self.of_documents else self.query + self.response + 1

    @property
    def computed(self) -> Objective:
        """The objective of what a step computes: with weights that are known beforehand, cross-entropy."""
        return objective_of(self.objective if self.estimate == "online" else "ce")

    def memory_bytes(self) -> int | None:
        """--gpu_memory in bytes."""
        if self.gpu_memory is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", self.gpu_memory.strip().lower())
        size = int(float(match[1]) * MEMORY_UNITS.get(match[2], 0)) if match else 0
        _require(size > 0, "gpu_memory", "a size with its unit, such as 80GiB or 24GB", self.gpu_memory)
        return size
