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

    context: int = _option(
        4096, "tokens of a factual sequence: persona, query and response, those of all --replies; longce: of a document"
    )
    query: int = _option(128, "tokens of it that the counterfactual prompt keeps: chat template, query; of each reply")
    response: int = _option(512, "tokens of it that are the response; of each reply")
    replies: int = _option(
        1, "replies of a conversation that a forward pass reads together, what they have in common once; --share of "
        "perce.train",
    )  # fmt: skip
    branches: bool = _option(
        False, "the template shows earlier replies otherwise than the last one (Qwen3's: without a thought), so that "
        "each is computed beside its copy",
    )  # fmt: skip
    per_device_train_batch_size: int = _option(1, "replies per forward pass, at least those of a conversation")
    gradient_accumulation_steps: int | None = _option(
        None, "forward passes per optimiser step; default: as many as give 8 replies per device"
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
        for name in (
            "query", "response", "replies", "per_device_train_batch_size", "devices", "short_context", "short_stride",
        ):  # fmt: skip
            _require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        _require(self.replies == 1 or not self.of_documents, "replies", "1 of documents", self.replies)
        if self.per_device_train_batch_size == 1:  # not said, or too few
            object.__setattr__(self, "per_device_train_batch_size", self.replies)
        _require(self.replies > 1 or not self.branches, "branches", "--replies above 1 beside it", self.replies)
        _require(
            self.per_device_train_batch_size % self.replies == 0, "per_device_train_batch_size",
            f"a multiple of the {self.replies} --replies", self.per_device_train_batch_size,
        )  # fmt: skip
        steps = self.gradient_accumulation_steps
        _require(steps is None or steps >= 1, "gradient_accumulation_steps", ">= 1", steps)
        turns = f"{self.replies} x (query + response)" if self.replies > 1 else "query + response"
        expected = f">= {self.shortest}{'' if self.of_documents else f' ({turns} + a persona)'}"
        _require(self.context >= self.shortest, "context", expected, self.context)
        _require(self.tflops is None or 0 < self.tflops < float("inf"), "tflops", "> 0", self.tflops)
        _require(self.sharding == "none" or self.devices > 1, "sharding", "none with one device", self.sharding)
        _require(self.memory_bytes() is None or self.device != "cpu", "gpu_memory", "--device cuda", "--device cpu")

    @property
    def forwards(self) -> int:
        """Forward passes per optimiser step."""
        return self.gradient_accumulation_steps or max(8 // self.per_device_train_batch_size, 1)

    @property
    def sequences(self) -> int:
        """Conversations of a forward pass, or what stands by itself."""
        return self.per_device_train_batch_size // self.replies

    @property
    def without_persona(self) -> int:
        """Tokens of a counterfactual sequence."""
        return self.replies * (self.query + self.response)

    @property
    def of_documents(self) -> bool:
        """Documents have neither query nor persona: all but their first token is the response."""
        return PERSONAS not in objective_of(self.objective).takes

    @property
    def shortest(self) -> int:
        """Tokens of the shortest context that there is."""
        return 2 if self.of_documents else self.without_persona + 1

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
