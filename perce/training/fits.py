"""Whether the largest batch of a training run fits its device, found out before the first step: what a plan says of the
run's own model, lengths and options, against the memory that is there.

Said only of what plans know. Nothing of streams, whose rows are not known beforehand; FSDP and DeepSpeed; quantised
bases; Liger's kernels; other optimisers than AdamW; and batch sizes that the Trainer is to find.
"""

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from perce.config.commands import PlanOptions, TrainOptions
from perce.config.step import StepConfig
from perce.data.dataset import numbers, sequence_lengths
from perce.errors import UserError, first_line
from perce.model.probe import unwrapped
from perce.planning.memory import PeakMemory, count, peak_memory
from perce.planning.plans import GIB, check_architecture, planned_variants, setup_of
from perce.planning.tables import PHASE_NAMES
from perce.training.parallel import shards_weights

# A share of the memory: below the first nothing is said, above the second the run stops. Plans were within 5 % of steps
# on CPUs. On a GPU they were within 0.4 % of LoRA steps of one model, which is too little to be as strict by.
DOUBTFUL = 0.9
IMPOSSIBLE = {"cpu": 1.1, "cuda": 1.5}
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
HELD_BY_LIBRARIES = GIB // 2  # of a process on a CPU, beside what is planned
# oneDNN, which does bf16 products on CPUs, keeps the code of 1,024 of them: 0.9 GiB once it has met 400 lengths.
HELD_BY_ONEDNN = GIB


def check_fits(config: TrainOptions, args: Any, model: Any, pairs: Any) -> str | None:
    """UserError for a step that cannot fit; a sentence for one that might not, or why that is not known; None else."""
    device = args.device.type
    available = device_memory(args.device)
    model_config = unwrapped(model).config
    if available is None or not _is_planned(config, args, model_config):
        return None
    try:
        check_architecture(model_config, str(config.model.model))
        attention = model_config.get_text_config()._attn_implementation
        chosen = replace(config.model, attn_implementation=attention, backend=args.backend)
        planned = PlanOptions(chosen, largest_step(config, args, pairs), config.memory)
        setup = setup_of(planned, device)
        needed = peak_memory(model_config, setup, planned.step, count(model_config, setup), device)
    except Exception as error:  # a forecast: what keeps it from being made must not keep the run from being tried
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return f"not planned: {name}{first_line(error)}"
    room = available
    if device == "cpu":
        room -= HELD_BY_LIBRARIES + (HELD_BY_ONEDNN if setup.low_precision else 0)
    if needed.peak <= DOUBTFUL * room:
        return None
    said = _said(planned.step, needed, available, available - room)
    if needed.peak <= IMPOSSIBLE[device] * room:
        return f"{said} That is close."
    documents = "persona_span" not in pairs.train.column_names
    raise UserError(f"{said} {_remedies(config, model_config, planned, device, room, documents)}")


def largest_step(options: TrainOptions, args: Any, pairs: Any) -> StepConfig:
    """The step of the longest sequences: what its forward holds at most.

    Of sequences of 500, 400 and 300 tokens, the first with a persona of 350, and responses of at most 80, two a forward
    are planned as 500 tokens each: a persona of 350, a query of 70 and a response of 80.
    """
    run, loss, dataset = options.run, options.loss, pairs.train
    lengths = sequence_lengths(dataset)
    longest = max(lengths)
    sequences = run.tokens_per_batch // longest if run.tokens_per_batch else args.per_device_train_batch_size
    sequences = min(max(sequences, 1), len(lengths))
    persona = 1
    if "persona_span" in dataset.column_names:
        start, end = dataset[lengths.index(longest)]["persona_span"]
        persona = max(end - start, 1)
    without_persona, context = longest - persona, longest
    if run.packing or options.memory.persona_grad == "none":  # nothing is padded to the longest
        context = sum(sorted(lengths)[-sequences:]) // sequences
        without_persona = min(without_persona, context - 1)
    longest_response = int(numbers(dataset, "response_length").max())
    response = max(min(longest_response, without_persona - 1), 1)
    return StepConfig(
        context=context,
        query=max(without_persona - response, 1),
        response=response,
        per_device_train_batch_size=sequences,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        objective=loss.objective,
        estimate=loss.estimate,
        short_context=loss.short_context,
        short_stride=loss.short_stride,
        activation_checkpointing=run.activation_checkpointing,
        devices=args.world_size,
    )


def device_memory(device: torch.device) -> int | None:
    """Bytes that one process may use: a GPU's memory, or its share of this machine's; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    total = psutil.virtual_memory().total + psutil.swap_memory().total
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        total = min(total, int(CGROUP_LIMIT.read_text()))
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _is_planned(config: TrainOptions, args: Any, model_config: Any) -> bool:
    return not (
        config.data.streaming
        or args.use_liger_kernel
        or shards_weights(args)
        or getattr(model_config, "quantization_config", None)
        or args.optim.value not in ("adamw_torch", "adamw_torch_fused")
    )


def _said(step: StepConfig, needed: PeakMemory, available: int, held: int) -> str:
    libraries = f", of which libraries take {held / GIB:,.1f}" if held else ""
    return (
        f"The largest step, {step.per_device_train_batch_size} × {step.context:,} tokens per forward pass, takes about "
        f"{needed.peak / GIB:,.1f} GiB (in the {PHASE_NAMES[needed.peak_phase][1]}), and {available / GIB:,.1f} GiB "
        f"are there{libraries}."
    )


def _remedies(
    config: TrainOptions, model_config: Any, planned: PlanOptions, device: str, room: int, documents: bool
) -> str:
    """The options that would do, each alone, and that this run could take."""
    other = ["--objective", "--precision"]
    if config.run.tokens_per_batch:
        other.append("--per_device_train_batch_size")
    if config.run.packing or documents:
        other.append("--persona_grad")
    fitting = sorted(
        (variant.cost.memory.peak, variant.flags)
        for variant in planned_variants(model_config, planned, device)
        if variant.cost.memory.peak <= DOUBTFUL * room and not variant.flags.startswith(tuple(other))
    )
    shorter = f"a smaller --max_length{' or --tokens_per_batch' * bool(config.run.tokens_per_batch)}"
    if fitting:
        return (
            f"What would fit: {', '.join(f'{flags} ({peak / GIB:,.1f} GiB)' for peak, flags in fitting)}; or {shorter}."
        )
    return f"No single option makes it fit: use {shorter}. `python -m perce.plan` tells what each option saves."
