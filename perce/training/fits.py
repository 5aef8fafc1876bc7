"""Whether the largest batch of a training run fits its device, found out before the first step: what a plan says of the
run's own model, lengths and options, against the memory that is there.

Said only of what plans know. Nothing of streams, whose rows are not known beforehand; FSDP and DeepSpeed; quantised
bases; Liger's kernels; other optimisers than AdamW; and batch sizes that the Trainer is to find.
"""

from dataclasses import replace
from typing import Any

from perce.config.commands import PlanOptions, TrainOptions
from perce.config.step import StepConfig
from perce.data.dataset import numbers, sequence_lengths
from perce.errors import UserError, first_line
from perce.model.probe import unwrapped
from perce.planning.device import DOUBTFUL, GIB, device_memory, held_by_libraries
from perce.planning.memory import PeakMemory, count, peak_memory
from perce.planning.plans import check_architecture, planned_variants, setup_of
from perce.planning.tables import PHASE_NAMES
from perce.training.parallel import shards_weights

# A share of the memory, above which the run stops; below DOUBTFUL nothing is said. On a GPU plans were within 0.4 % of
# LoRA steps of one model, which is too little to be as strict by.
IMPOSSIBLE = {"cpu": 1.1, "cuda": 1.5}


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
    room = available - held_by_libraries(device, setup.low_precision)
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
