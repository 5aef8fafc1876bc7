"""The options of the step that `python -m perce.plan` plans."""

import re
from dataclasses import dataclass
from typing import Literal

from perce.config.options import option, require
from perce.config.schema import OBJECTIVE, objective_of, require_at_least
from perce.objectives import PERSONAS, Objective

MEMORY_UNITS = {"mib": 2**20, "gib": 2**30, "tib": 2**40, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True)
class StepConfig:
    """The training step that is planned. Options that `python -m perce.train` has too mean the same there."""

    context: int = option(
        4096,
        "tokens of a whole sequence: persona, and query and response of all --replies; longce: tokens of a document",
    )
    query: int = option(128, "tokens of chat template and query, which remain without the persona; for each reply")
    response: int = option(512, "tokens of the response; for each reply")
    replies: int = option(
        1, "replies of a conversation that a forward pass computes together, the tokens that they have in common once, "
        "as perce.train does with --share",
    )  # fmt: skip
    branches: bool = option(
        False, "for chat templates that render the last reply in another way than earlier ones (Qwen3's adds an empty "
        "thought): all replies but the last are computed in both ways",
    )  # fmt: skip
    per_device_train_batch_size: int | None = option(
        None, "replies per forward pass; default: as many as share tokens (--replies, --share_persona)"
    )
    gradient_accumulation_steps: int | None = option(
        None, "forward passes per optimiser step; default: as many as give 8 replies per device"
    )
    objective: str = OBJECTIVE
    estimate: Literal["online", "epoch", "frozen"] = option(
        "online",
        "when weights are estimated; epoch, frozen: before the steps, which then cost as much as with --objective ce",
    )
    short_context: int = option(4096, "longce: length of the short context in tokens")
    short_stride: int = option(1024, "longce: successive tokens whose short contexts begin at the same token")
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass")
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "device of the planned step; auto: cuda if this machine has it or --gpu_memory is given"
    )
    devices: int = option(1, "number of devices; each takes its own sequences")
    sharding: Literal["none", "full"] = option(
        "none", "full: divide weights, gradients and optimiser states over the devices (FSDP)"
    )
    gpu_memory: str | None = option(
        None,
        "memory of one device, such as 80GiB; the plan then says whether the step fits, and the largest context that "
        "does",
        "SIZE",
    )
    tflops: float | None = option(
        None, "rate of matrix products on one device, in 1e12 FLOP/s; default: measured on this machine in a second"
    )
    json: str | None = option(None, "also write the whole plan as JSON", "FILE")

    def __post_init__(self) -> None:
        require_at_least(
            self, 1, "query", "response", "replies", "per_device_train_batch_size", "gradient_accumulation_steps",
            "devices", "short_context", "short_stride",
        )  # fmt: skip
        require(self.replies == 1 or not self.of_documents, "replies", "1 for documents", self.replies)
        require(self.replies > 1 or not self.branches, "branches", "--replies above 1 with it", self.replies)
        require(
            self.batch % self.replies == 0, "per_device_train_batch_size",
            f"a multiple of the {self.replies} --replies", self.per_device_train_batch_size,
        )  # fmt: skip
        turns = f"{self.replies} x (query + response)" if self.replies > 1 else "query + response"
        expected = f">= {self.shortest}{'' if self.of_documents else f' ({turns} + a persona)'}"
        require(self.context >= self.shortest, "context", expected, self.context)
        require(self.tflops is None or 0 < self.tflops < float("inf"), "tflops", "> 0", self.tflops)
        require(self.sharding == "none" or self.devices > 1, "sharding", "none with one device", self.sharding)
        require(self.memory_bytes() is None or self.device != "cpu", "gpu_memory", "--device cuda", "--device cpu")

    @property
    def batch(self) -> int:
        """Replies per forward pass."""
        return self.per_device_train_batch_size or self.replies

    @property
    def forwards(self) -> int:
        """Forward passes per optimiser step."""
        return self.gradient_accumulation_steps or max(8 // self.batch, 1)

    @property
    def sequences(self) -> int:
        """Conversations per forward pass; a reply or document that shares nothing counts as one."""
        return self.batch // self.replies

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
        """Tokens of the shortest possible context."""
        return 2 if self.of_documents else self.without_persona + 1

    @property
    def computed(self) -> Objective:
        """The objective that a step costs as much as: cross-entropy if the weights are known before the step."""
        return objective_of(self.objective if self.estimate == "online" else "ce")

    def memory_bytes(self) -> int | None:
        """--gpu_memory in bytes."""
        if self.gpu_memory is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", self.gpu_memory.strip().lower())
        size = int(float(match[1]) * MEMORY_UNITS.get(match[2], 0)) if match else 0
        require(size > 0, "gpu_memory", "a size with its unit, such as 80GiB or 24GB", self.gpu_memory)
        return size
