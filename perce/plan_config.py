"""The options of `python -m perce.plan` that are not those of a training run; see config.py."""

import re
from dataclasses import dataclass
from typing import Literal

from perce.options import option as _option
from perce.options import require as _require

MEMORY_UNITS = {"mib": 2**20, "gib": 2**30, "tib": 2**40, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True)
class PlanConfig:
    """The run that is planned. Names that `python -m perce.train` has too mean the same."""

    context: int = _option(4096, "tokens of a factual sequence: persona, query and response")
    query: int = _option(128, "tokens of it that the counterfactual prompt keeps: chat template, query")
    response: int = _option(512, "tokens of it that are the response")
    per_device_train_batch_size: int = _option(1, "sequences per forward pass")
    gradient_accumulation_steps: int | None = _option(
        None, "forward passes per optimiser step; default: as many as give 8 sequences per device"
    )
    objective: Literal["perce", "ce", "lossce", "entce", "longce"] = _option(
        "perce", "perce and longce have a counterfactual pass, the others (and --estimate epoch or frozen) have not; "
        "for longce --context is a document's length",
    )  # fmt: skip
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
        if self.objective in ("lossce", "entce"):  # the passes of cross-entropy, and nothing else to speak of
            object.__setattr__(self, "objective", "ce")
        least = self.query + self.response + 1
        if self.objective == "longce":
            _require(self.context >= 2, "context", ">= 2", self.context)
        else:
            _require(self.context >= least, "context", f">= {least} (query + response + a persona)", self.context)
        _require(self.tflops is None or 0 < self.tflops < float("inf"), "tflops", "> 0", self.tflops)
        _require(self.sharding == "none" or self.devices > 1, "sharding", "none with one device", self.sharding)
        _require(self.memory_bytes() is None or self.device != "cpu", "gpu_memory", "--device cuda", "--device cpu")

    def memory_bytes(self) -> int | None:
        """--gpu_memory in bytes."""
        if self.gpu_memory is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", self.gpu_memory.strip().lower())
        size = int(float(match[1]) * MEMORY_UNITS.get(match[2], 0)) if match else 0
        _require(size > 0, "gpu_memory", "a size with its unit, such as 80GiB or 24GB", self.gpu_memory)
        return size
