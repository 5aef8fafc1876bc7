"""Which options make a step fit, the fastest first, and the perce.train command with those options."""

import itertools
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from perce.config.commands import PLAN, TRAIN, PlanOptions

MLP_TILE = 1024
NAMES = {here: there for there, here in PLAN.renames.items()}  # options that perce.train calls by another name
ALWAYS = ("per_device_train_batch_size", "gradient_accumulation_steps")  # else train would choose them by length


def candidates(options: PlanOptions, device: str) -> Iterator[PlanOptions]:
    """Ways to run this step."""
    step, memory, model = options.step, options.memory, options.model
    batch = step.batch
    sizes = {(1, 1), (step.replies, step.replies), (batch, step.replies)}  # sequences, and replies that share
    if (requests := memory.share_persona) > 1:
        sizes = {(requests, 1), (batch, 1)}
    one_by_one = {memory.branches_per_forward} | ({0, 1} if requests > 1 and step.sharding == "none" else set())
    personas = {memory.persona_grad} if step.of_documents or step.sharding != "none" else {memory.persona_grad, "none"}
    can_quantise = model.lora_r and device == "cuda" and step.sharding == "none"
    for (size, replies), tile, checkpointing, offload, persona, four, branches in itertools.product(
        sorted(sizes), (0, memory.mlp_tile or MLP_TILE), (False, True), (False, True), sorted(personas),
        sorted({model.load_in_4bit, bool(can_quantise)}), sorted(one_by_one),
    ):  # fmt: skip
        if offload and not (checkpointing and device == "cuda"):
            continue
        yield PlanOptions(
            replace(model, load_in_4bit=four),
            replace(
                step, replies=replies, branches=step.branches and replies > 1, per_device_train_batch_size=size,
                gradient_accumulation_steps=batch * step.forwards // size, activation_checkpointing=checkpointing,
            ),
            replace(
                memory, persona_grad=persona, mlp_tile=tile, activation_offload=offload, branches_per_forward=branches
            ),
        )  # fmt: skip


def changes(options: PlanOptions, way: PlanOptions) -> list[str]:
    """How a way changes what is learned, in words."""
    changed = {
        "no gradient flows through the persona (--persona_grad none)":
            way.memory.persona_grad != options.memory.persona_grad,
        "weights are rounded to 4 bits (--load_in_4bit)": way.model.load_in_4bit != options.model.load_in_4bit,
    }  # fmt: skip
    return [words for words, differs in changed.items() if differs]


def fastest(
    options: PlanOptions, device: str, room: int, peak: Callable[[PlanOptions], int], work: Callable[[PlanOptions], int]
) -> PlanOptions | None:  # fmt: skip
    """The way with the least work whose peak is within the room (bytes); None if none is.

    Ways that change what is learned are tried only if nothing else fits. Among ways with equal work, one without
    transfers to host memory comes first, then the one with the fewest changed options. Work counts operations:
    transfers and dequantisation take time that is not planned. `peak` is slow and is computed for few ways.
    """
    groups: dict[tuple[int, str, bool], list[PlanOptions]] = {}
    for way in candidates(options, device):
        groups.setdefault((len(changes(options, way)), way.memory.persona_grad, way.model.load_in_4bit), []).append(way)
    for _, ways in sorted(groups.items(), key=lambda group: (group[0][0], min(map(work, group[1])))):
        # One per batch size: a forward of one sequence may take more, because accumulated gradients are alive then.
        frugal = {way.step.batch: way for way in sorted(ways, key=_frugality)}
        if all(peak(way) > room for way in [*frugal.values(), options]):
            continue
        for way in sorted(ways, key=lambda way: (work(way), way.memory.activation_offload, _differing(options, way))):
            if peak(way) <= room:
                return way
    return None


def _frugality(way: PlanOptions) -> tuple[Any, ...]:
    step, memory = way.step, way.memory
    return (
        -step.batch, step.activation_checkpointing, memory.activation_offload,
        memory.branches_per_forward > 0, memory.mlp_tile > 0,
    )  # fmt: skip


def _differing(options: PlanOptions, way: PlanOptions) -> int:
    """The number of options that differ."""
    pairs = ((getattr(options, part.name), getattr(way, part.name)) for part in fields(options))
    return sum(getattr(one, f.name) != getattr(other, f.name) for one, other in pairs for f in fields(one))


def command(options: PlanOptions) -> str:
    """The perce.train command for such steps; DATA stands for the data, NAME for the run's name."""
    step = options.step
    flags = []
    for section in (options.model, step, options.memory):
        for option in fields(section):
            name, value = NAMES.get(option.name, option.name), getattr(section, option.name)
            if option.name == "gradient_accumulation_steps":
                value = step.forwards
            known = TRAIN.fields.get(name)
            if known is None or (value == known.default and option.name not in ALWAYS):
                continue
            flags += [f"--{name}"] if value is True else [f"--{name}", shlex.quote(str(value))]
    if step.devices > 1:  # the processes of one run cannot each choose the first free directory
        flags.append("--output_dir runs/NAME")
    launcher = f"torchrun --nproc_per_node {step.devices}" if step.devices > 1 else "python"
    return " ".join([launcher, "-m perce.train --data DATA", *flags])
