"""Whether the largest batch of a training run fits its device, checked before the first step: a plan for the run's own
model, lengths and options is compared with the memory that is available.

Plans do not cover, and nothing is said about: streams, whose rows are not known beforehand; FSDP and DeepSpeed;
quantised bases; Liger's kernels; optimisers other than AdamW.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from perce.config.commands import PlanOptions, TrainOptions
from perce.config.schema import MemoryConfig
from perce.config.step import StepConfig
from perce.data.dataset import conversations, numbers, sequence_lengths
from perce.data.sharing import Sharing, segmented
from perce.errors import UserError, first_line
from perce.model.probe import unwrapped
from perce.planning.device import DOUBTFUL, GIB, device_memory, held_by_libraries
from perce.planning.memory import PeakMemory, count, peak_memory
from perce.planning.plans import Costs, check_architecture, planned_variants, setup_of
from perce.planning.shapes import shape_of
from perce.planning.tables import PHASE_NAMES
from perce.training.parallel import shards_weights
from perce.training.sampler import pieces
from perce.training.shared import dealt_units, units

# The run stops above this share of the memory; below DOUBTFUL nothing is said. On a GPU plans were within 0.4 % of LoRA
# steps of one model, which is too little evidence for a stricter limit.
IMPOSSIBLE = {"cpu": 1.1, "cuda": 1.5}


def check_fits(config: TrainOptions, args: Any, model: Any, pairs: Any, sharing: Sharing = "none") -> str | None:
    """UserError for a step that cannot fit; a sentence if it might not fit, or if that cannot be planned; else None."""
    device = args.device.type
    available = device_memory(args.device)
    model_config = unwrapped(model).config
    if available is None or not _is_planned(config, args, model_config):
        return None
    try:
        check_architecture(model_config, str(config.model.model))
        attention = model_config.get_text_config()._attn_implementation
        chosen = replace(config.model, attn_implementation=attention, backend=args.backend)
        planned = PlanOptions(chosen, *largest_step(config, args, pairs, sharing))
        setup = setup_of(planned, device)
        needed = peak_memory(model_config, setup, planned.step, count(model_config, setup), device)
    except Exception as error:  # this is only a forecast: if it fails, the run is still tried
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return f"not planned: {name}{first_line(error)}"
    room = available - held_by_libraries(device, setup.low_precision)
    if needed.peak <= DOUBTFUL * room:
        return None
    said = _said(planned, needed, available, available - room)
    if needed.peak <= IMPOSSIBLE[device] * room:
        return f"{said} That is close."
    documents = "persona_span" not in pairs.train.column_names
    raise UserError(f"{said} {_remedies(config, model_config, planned, device, room, documents)}")


def largest_step(
    options: TrainOptions, args: Any, pairs: Any, sharing: Sharing = "none"
) -> tuple[StepConfig, MemoryConfig]:
    """The step of the longest sequences, with the most that its forward pass can hold, and how it is computed. For
    replies that share tokens, see _of_conversations and _of_personas.

    For example, sequences have 500, 400 and 300 tokens, the first has a persona of 350, responses have at most 80, and
    a forward pass takes two. Both are planned with 500 tokens: a persona of 350, a query of 70, a response of 80.
    """
    run, dataset, memory = options.run, pairs.train, options.memory
    if memory.share_persona and (sharing == "branches" or (memory.on_trunks and sharing == "chains")):
        planned, requests = _of_personas(options, args, dataset)
        return _of_run(options, args, **planned), replace(memory, share_persona=requests)
    memory = replace(memory, share_persona=0)
    if sharing != "none":
        return _of_run(options, args, **_of_conversations(options, args, dataset, sharing)), memory
    lengths = sequence_lengths(dataset)
    longest = max(lengths)
    sequences = run.tokens_per_batch // longest if run.tokens_per_batch else args.per_device_train_batch_size
    sequences = min(max(sequences, 1), len(lengths))
    persona = 1
    if "persona_span" in dataset.column_names:
        start, end = dataset[lengths.index(longest)]["persona_span"]
        persona = max(end - start, 1)
    without_persona, context = longest - persona, longest
    if _is_unpadded(options):
        context = sum(sorted(lengths)[-sequences:]) // sequences
        without_persona = min(without_persona, context - 1)
    longest_response = int(numbers(dataset, "response_length").max())
    response = max(min(longest_response, without_persona - 1), 1)
    step = _of_run(
        options, args, context=context, query=max(without_persona - response, 1), response=response,
        per_device_train_batch_size=sequences,
    )  # fmt: skip
    return step, memory


def _of_run(options: TrainOptions, args: Any, **lengths: Any) -> StepConfig:
    run, loss = options.run, options.loss
    return StepConfig(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        objective=loss.objective,
        estimate=loss.estimate,
        short_context=loss.short_context,
        short_stride=loss.short_stride,
        activation_checkpointing=run.activation_checkpointing,
        devices=args.world_size,
        **lengths,
    )


def _is_unpadded(options: TrainOptions) -> bool:
    """Whether sequences are not padded to the longest, even if they share nothing."""
    return options.run.packing or options.memory.on_trunks


def _of_conversations(options: TrainOptions, args: Any, dataset: Any, sharing: Sharing) -> dict[str, Any]:
    """Lengths of the forward pass that computes the most tokens: B replies in whole conversations, or in pieces of B of
    longer ones; under a token budget, as many of the largest conversation as fit.

    Ids are compared in only two candidates: the one with the longest sequences, which is the largest if replies share
    all they can, and the one with the most tokens, which is the largest if they share nothing. The plan has the same
    numbers of sequences, branches and response tokens in total, each of the mean size.
    """
    lengths, budget = sequence_lengths(dataset), options.run.tokens_per_batch
    most = len(lengths) if budget else args.per_device_train_batch_size
    cut = list(pieces(conversations(dataset), most))
    forwards = []
    for tokens in (max, sum):
        sizes = [(tokens([lengths[index] for index in piece]), piece) for piece in cut]
        chosen = max(sizes)[1] if budget else _largest(sizes, most)
        found = [dataset[index] for index in chosen]
        segments, _ = segmented([p["input_ids"][:-1] for p in found], [p["conversation"] for p in found], sharing)
        forwards.append((sum(len(segment.ids) for segment in segments), segments, found))
    computed, segments, pairs = max(forwards, key=lambda forward: forward[0])
    sequences = [len(segment.ids) + 1 for segment in segments if not segment.path]
    is_padded = sharing == "chains" and not _is_unpadded(options)
    context = max(sequences) if is_padded else -(-sum(sequences) // len(sequences))
    replies = min(-(-len(pairs) // len(sequences)), (context - 1) // 2)
    response = -(-sum(pair["response_length"] for pair in pairs) // (replies * len(sequences)))
    response = min(response, (context - 1) // replies - 1)
    persona = max(sum(end - start for start, end in (pair["persona_span"] for pair in pairs)) // len(pairs), 1)
    times = max(min(budget // computed, len(lengths) // len(pairs)), 1) if budget else 1
    return {
        "context": context, "query": max((context - persona) // replies - response, 1), "response": response,
        "replies": replies, "branches": len(sequences) < len(segments) and replies > 1,
        "per_device_train_batch_size": replies * len(sequences) * times,
    }  # fmt: skip


def _of_personas(options: TrainOptions, args: Any, dataset: Any) -> tuple[dict[str, Any], int]:
    """Lengths of the forward pass that computes the most tokens, for requests that share their personas as they are
    first drawn; and how many share one. The plan has the same numbers of requests and tokens in total, each of the
    mean size."""
    lengths, budget = sequence_lengths(dataset), options.run.tokens_per_batch
    ends, responses = [end for _, end in dataset["persona_span"]], numbers(dataset, "response_length")
    most = len(lengths) if budget else args.per_device_train_batch_size
    if budget:
        computed, chosen = max(
            (unit.tokens, unit.indices) for unit in units(dataset, budget, "branches", options.memory)
        )
        times = max(min(budget // computed, len(lengths) // len(chosen)), 1)
    else:
        dealt = pieces(dealt_units(dataset, options.memory), most)
        sizes = [(max(ends[i] for i in piece) + sum(lengths[i] - ends[i] for i in piece), piece) for piece in dealt]
        chosen, times = _largest(sizes, most), 1
    of_personas = {dataset[index]["persona"]: ends[index] for index in chosen}
    count, personas = len(chosen), len(of_personas)

    def mean(values: Sequence[int]) -> int:
        return -(-sum(values) // count)

    persona, rest = -(-sum(of_personas.values()) // personas), mean([lengths[i] - ends[i] for i in chosen])
    response = mean([int(responses[i]) for i in chosen])
    requests, response = -(-count // personas), max(min(response, rest - 1), 1)
    step = {
        "context": persona + rest, "query": rest - response, "response": response,
        "per_device_train_batch_size": requests * personas * times,
    }  # fmt: skip
    return step, requests


def _largest(sizes: Sequence[tuple[int, list[int]]], most: int) -> list[int]:
    """Indices of the pieces with the most tokens that together have at most `most` pairs."""
    best: list[tuple[int, list[int]]] = [(0, [])] * (most + 1)  # of at most 0, 1, … pairs
    tried = Counter[int]()
    for tokens, piece in sorted(sizes, reverse=True):
        if tried[len(piece)] < most // len(piece):
            tried[len(piece)] += 1
            for pairs in range(most, len(piece) - 1, -1):
                before, others = best[pairs - len(piece)]
                best[pairs] = max(best[pairs], (before + tokens, others + piece))
    return best[most][1]


def _is_planned(config: TrainOptions, args: Any, model_config: Any) -> bool:
    return not (
        config.data.streaming
        or args.use_liger_kernel
        or shards_weights(args)
        or getattr(model_config, "quantization_config", None)
        or args.optim.value not in ("adamw_torch", "adamw_torch_fused")
    )


def _said(planned: PlanOptions, needed: PeakMemory, available: int, held: int) -> str:
    step, memory = planned.step, planned.memory
    libraries = f", of which libraries take {held / GIB:,.1f}" if held else ""
    tokens = f"{step.batch} × {step.context:,} tokens"
    if step.replies > 1 or memory.share_persona > 1:
        what = "requests" if memory.share_persona > 1 else "replies"
        tokens = f"{step.batch} {what} in {shape_of(step, memory).computed:,} tokens"
    return (
        f"The largest step, {tokens} per forward pass, takes about "
        f"{needed.peak / GIB:,.1f} GiB (in the {PHASE_NAMES[needed.peak_phase][1]}), and {available / GIB:,.1f} GiB "
        f"are available{libraries}."
    )


def _remedies(
    config: TrainOptions, model_config: Any, planned: PlanOptions, device: str, room: int, documents: bool
) -> str:
    """The options that would each suffice alone, and that this run could take."""
    other = ["--objective", "--precision"]
    if config.run.tokens_per_batch or config.memory.share_persona:
        other.append("--per_device_train_batch_size")
    if config.run.packing or documents:
        other.append("--persona_grad")
    fitting = sorted(
        (variant.cost.memory.peak, variant.flags)
        for variant in planned_variants(planned, device, Costs(model_config, device).of)
        if variant.cost.memory.peak <= DOUBTFUL * room and not variant.flags.startswith(tuple(other))
    )
    shorter = f"a smaller --max_length{' or --tokens_per_batch' * bool(config.run.tokens_per_batch)}"
    if fitting:
        return (
            f"What would fit: {', '.join(f'{flags} ({peak / GIB:,.1f} GiB)' for peak, flags in fitting)}; or {shorter}."
        )
    return f"No single option makes it fit: use {shorter}. `python -m perce.plan` shows what each option saves."
