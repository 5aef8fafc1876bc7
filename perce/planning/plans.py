"""Plans of a training step: its memory and operations, the largest context that fits, and what each option changes."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from perce.config.commands import PlanOptions
from perce.config.options import require
from perce.config.schema import LossConfig, ModelConfig, refuse_idle
from perce.config.step import StepConfig
from perce.data.pairing import OF_DOCUMENTS
from perce.data.sharing import Sharing
from perce.errors import UserError
from perce.hub import read_config, stated
from perce.model.branches import sharing_of
from perce.model.loading import bf16_is_sound, check_backend
from perce.model.patch import prepare_model
from perce.model.positions import position_limit
from perce.objectives import DOCUMENTS, PERSONAS
from perce.planning.building import Setup, cut, layer_kinds
from perce.planning.device import DOUBTFUL, GIB, device_memory, held_by_libraries
from perce.planning.flops import Flops, count_flops, matmul_rate
from perce.planning.memory import Counts, PeakMemory, count, peak_memory
from perce.planning.ways import MLP_TILE, changes, command, fastest

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Cost:
    """Sizes, memory and operations of a step in one configuration."""

    counts: Counts
    memory: PeakMemory
    flops: Flops


@dataclass(frozen=True)
class Variant:
    """The same step with one option changed."""

    flags: str
    cost: Cost


@dataclass(frozen=True)
class Plan:
    """Everything that perce.plan prints."""

    options: PlanOptions
    device: str
    precision: str
    cost: Cost
    rate: float | None  # FLOP/s, if known
    largest_context: int | None  # None without --gpu_memory; 0 if no context fits
    variants: list[Variant]
    available: int | None  # bytes of the planned device, without what libraries hold; None: not known
    command: str | None  # perce.train with the fastest options that fit; None if none do, or if that is not known
    caveat: str  # how the command changes what is learned, and whether it fits only just; else empty


def make_plan(options: PlanOptions) -> Plan:
    model_config = load_config(options.model)
    check_positions(model_config, options)
    device, asked = resolve_device(options.step), options.model
    backend: Any = check_backend(asked.backend, torch.device(device))  # the one that a run would use on this device
    options = replace(options, model=replace(asked, backend=backend))
    if options.step.per_device_train_batch_size is None:
        together = options.memory.share_persona or options.step.replies
        options = replace(options, step=replace(options.step, per_device_train_batch_size=together))
    check_options(options, device)
    low, tflops = is_low_precision(options.model, device), options.step.tflops
    there = available(options, device)
    costs = Costs(model_config, device)
    proposed, caveat = _command(options, device, there, costs, asked.backend)
    return Plan(
        options, device, precision="bf16" if low else "fp32", cost=costs.of(options),
        rate=tflops * 1e12 if tflops else matmul_rate(device, low),
        largest_context=largest_context(model_config, options, costs),
        variants=list(planned_variants(options, device, costs.of)),
        available=there, command=proposed, caveat=caveat,
    )  # fmt: skip


class Costs:
    """Costs of a model's steps on a device. Each configuration is rehearsed once; the model is counted once for each
    way to load it, because it is built whole for that."""

    def __init__(self, model_config: Any, device: str) -> None:
        self._config, self._device = model_config, device
        self._counts = functools.cache(functools.partial(count, model_config))
        self.of = functools.cache(self._of)

    def _of(self, options: PlanOptions) -> Cost:
        """Memory and operations of one configuration. UserError for a model that cannot be planned."""
        setup, counts = setup_of(options, self._device), self._counts_of(options)
        return Cost(
            counts,
            peak_memory(self._config, setup, options.step, counts, self._device),
            count_flops(self._config, setup, options.step, counts),
        )

    def _counts_of(self, options: PlanOptions) -> Counts:
        return self._counts(Setup(options.model, is_low_precision(options.model, self._device), checkpointing=False))

    def peak(self, options: PlanOptions) -> int:
        try:
            return self.of(options).memory.peak
        except UserError:  # this architecture does not support these options
            return sys.maxsize

    def work(self, options: PlanOptions) -> int:
        """Operations of a step, counted without a rehearsal; weights in 4 bits take as many."""
        plain = replace(options, model=replace(options.model, load_in_4bit=False))
        return count_flops(self._config, setup_of(plain, self._device), options.step, self._counts_of(plain)).total


def available(options: PlanOptions, device: str) -> int | None:
    """Bytes that a step may take: --gpu_memory, or this machine's memory without what libraries hold."""
    there = options.step.memory_bytes()
    if there is None and (there := device_memory(torch.device(device))) is not None:
        there -= held_by_libraries(device, is_low_precision(options.model, device))
    return there


def _command(
    options: PlanOptions, device: str, there: int | None, costs: Costs, backend: Any
) -> tuple[str | None, str]:
    """(command, caveat). Options that take nearly all of the memory are proposed only if nothing else fits, those that
    the user gave first. Sharded runs get no command: sharding is configured by a recipe, not by flags."""
    if there is None or options.step.sharding != "none":
        return None, ""
    doubtful = int(DOUBTFUL * there)
    way = fastest(options, device, doubtful, costs.peak, costs.work)
    if way is None and costs.peak(options) <= there:
        way = options
    way = way or fastest(options, device, there, costs.peak, costs.work)
    if way is None:
        return None, ""
    said = [f"this changes what is learned: {', '.join(changed)}"] if (changed := changes(options, way)) else []
    if (peak := costs.peak(way)) > doubtful:
        said.append(f"it takes {peak / GIB:,.2f} of {there / GIB:,.2f} GiB, which is close")
    return command(replace(way, model=replace(way.model, backend=backend))), "; ".join(said)


def planned_variants(options: PlanOptions, device: str, cost_of: Callable[[PlanOptions], Cost]) -> Iterator[Variant]:
    """Those of `variants` that the architecture supports."""
    for flags, changed in variants(options, device):
        with contextlib.suppress(UserError):
            yield Variant(flags, cost_of(changed))


def setup_of(options: PlanOptions, device: str) -> Setup:
    low = is_low_precision(options.model, device)
    return Setup(options.model, low, options.step.activation_checkpointing, options.memory)


def resolve_device(step: StepConfig) -> str:
    if step.device != "auto":
        return step.device
    return "cuda" if step.gpu_memory or torch.cuda.is_available() else "cpu"


def is_low_precision(model: ModelConfig, device: str) -> bool:
    """Like perce.model.loading.resolve_precision. A GPU that is not in this machine is taken to be a recent one."""
    elsewhere = device == "cuda" and not torch.cuda.is_available()
    return model.precision == "bf16" or (model.precision == "auto" and (elsewhere or bf16_is_sound(device)))


def load_config(options: ModelConfig) -> Any:
    """The model's config, with dropout off as in training. UserError unless it is a dense decoder-only model."""
    from transformers import PretrainedConfig

    from perce.demo.model import default_model_path

    path = options.model or str(default_model_path())
    config = read_config(path)
    check_architecture(config, path)
    local = Path(path).expanduser()
    raw, _ = PretrainedConfig.get_config_dict(str(local) if local.exists() else path)
    if method := (raw.get("quantization_config") or {}).get("quant_method"):
        raise UserError(
            f"--model {path}: its config.json has a quantization_config ({method}). Plan the model before "
            "quantisation; --load_in_4bit plans that in 4 bits."
        )
    text, written = config.get_text_config(), raw.get("text_config", raw)
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        # A size left out of config.json gets the architecture's default, which belongs to another model.
        left_out = name != "vocab_size" and written.keys().isdisjoint({name, text.attribute_map.get(name)})
        if left_out or stated(text, name) is None:
            raise UserError(f"--model {path}: {name} is missing from its config.json, and a plan needs it.")
    return config


def check_architecture(config: Any, path: str) -> None:
    """UserError for models with an encoder, for mixtures of experts (which experts run depends on the data), for models
    without attention (their GPU kernels hold other tensors than their CPU code), and for layers that differ in size."""
    if config.is_encoder_decoder:
        raise UserError(f"--model {path}: PerCE needs a decoder-only model, and {config.model_type} has an encoder.")
    text = config.get_text_config()
    said = f"--model {path}: {text.model_type}"
    if any(stated(part, name) for part in (text, stated(text, "ffn_config")) for name in EXPERTS):  # the latter: DBRX
        raise UserError(f"{said} has a mixture of experts. Only dense models are planned.")
    if differing := getattr(text, "per_layer_attributes", None):
        raise UserError(
            f"{said} has layers that differ in {', '.join(sorted(differing))}. perce.plan expects equal layers."
        )
    if not stated(text, "num_attention_heads"):
        raise UserError(f"{said} has no attention heads. Only models with attention are planned.")


def _sharing(model_config: Any) -> tuple[Sharing, str]:
    """What a run would share on this architecture, and why not everything: asked as by a run, of a model with each kind
    of layer once and few ids, whose weights are random. A model that cannot be made so is taken to share everything."""
    from transformers import AutoModelForCausalLM

    kinds = layer_kinds(model_config)
    small = cut(model_config, [kinds.index(kind) for kind in dict.fromkeys(kinds)])
    text = small.get_text_config()
    text.pad_token_id = 0
    for name, most in (("vocab_size", 512), ("intermediate_size", 256), ("moe_intermediate_size", 64)):
        if type(size := stated(text, name)) is int:
            setattr(text, name, min(size, most))
    try:
        return sharing_of(prepare_model(AutoModelForCausalLM.from_config(small, dtype=torch.float32)))
    except Exception:  # the model's own code may raise anything
        return "branches", ""


def check_positions(model_config: Any, options: PlanOptions) -> None:
    """UserError for a context longer than the model's positions, and for sequences that share tokens if a run computes
    them one by one."""
    step, requests = options.step, options.memory.share_persona
    of_persona = f"--share_persona {requests}" if requests > 1 else ""
    together = f"--replies {step.replies}" if step.replies > 1 else of_persona
    sharing, reason = _sharing(model_config) if together else ("branches", "")
    if sharing == "none":
        raise UserError(f"{together}: {reason}, so each sequence needs a forward of its own. Leave it out.")
    branching = "--branches" if step.branches else of_persona
    if sharing == "chains" and branching and not options.memory.on_trunks:
        raise UserError(f"{branching}: {reason}. Leave it out.")
    limit = position_limit(model_config)
    if limit is not None and options.step.context > limit:
        raise UserError(
            f"--context {options.step.context}: the model has positions for {limit} tokens (max_position_embeddings in "
            f"its config.json). Expected at most {limit}, or a config.json that extends them (rope_scaling)."
        )


def check_options(options: PlanOptions, device: str) -> None:
    """UserError for combinations of options that a training run would refuse."""
    step, memory, model = options.step, options.memory, options.model
    LossConfig(step.objective, estimate=step.estimate)  # raises if they do not go together
    names, kind = (("query", "response"), DOCUMENTS) if step.of_documents else (OF_DOCUMENTS, PERSONAS)
    refuse_idle(step, names, f"for {kind}")
    require(step.context >= 16, "context", ">= 16, as --max_length of perce.train", step.context)
    if model.load_in_4bit and device == "cpu":
        raise UserError("--load_in_4bit: bitsandbytes quantises on a GPU. Expected --device cuda as well.")
    here = device == "cpu" or (torch.cuda.is_available() and not step.gpu_memory)
    if model.precision == "bf16" and here and not bf16_is_sound(device):
        raise UserError(
            f"--precision bf16: this {device} has no native bf16 arithmetic, and a run here would be refused. Use "
            "fp32, or --device cuda --gpu_memory 80GiB to plan for another GPU."
        )
    if model.load_in_4bit and step.sharding == "full":
        raise UserError("--load_in_4bit, --sharding full: cannot be planned together. Use --sharding none.")
    by_itself = "--persona_grad none" if memory.persona_grad == "none" else "--branches_per_forward"
    if (memory.on_trunks or memory.share_persona) and step.of_documents:
        option = by_itself if memory.on_trunks else "--share_persona"
        raise UserError(
            f"{option}: needs a persona, but --objective {step.objective} trains on documents. Leave it out."
        )
    if memory.on_trunks and step.sharding == "full":
        raise UserError(f"{by_itself}, --sharding full: do not work together. Use --sharding none.")
    requests = memory.share_persona or 1
    if requests > 1 and step.replies > 1:
        raise UserError(f"--share_persona {requests}, --replies {step.replies}: cannot be planned together. Use one.")
    if step.batch % requests:
        raise UserError(
            f"--per_device_train_batch_size: expected a multiple of --share_persona, which is {requests}, got "
            f"{step.batch}."
        )
    if memory.activation_offload and (device == "cpu" or not step.activation_checkpointing):
        raise UserError(
            "--activation_offload: moves the inputs of checkpointed layers from a GPU to host memory. Expected "
            "--activation_checkpointing and --device cuda as well."
        )


def largest_context(model_config: Any, options: PlanOptions, costs: Costs) -> int | None:
    """Tokens of the longest context whose peak fits --gpu_memory, up to the model's own limit; 0 if none does."""
    budget = options.step.memory_bytes()
    if budget is None:
        return None
    shortest = options.step.shortest
    longest = max(position_limit(model_config) or 2**20, shortest)

    def peak(context: int) -> int:
        return costs.of(replace(options, step=replace(options.step, context=context))).memory.peak

    return largest(peak, shortest, longest, budget)


def largest(peak: Callable[[int], int], low: int, high: int, budget: int) -> int:
    """The largest integer in [low, high] whose peak is within the budget; 0 if not even low's is. peak must not
    decrease.

    Every other guess bisects; the rest interpolate linearly, because peaks are linear over long ranges.
    """
    if (at_high := peak(high)) <= budget:
        return high
    if (at_low := peak(low)) > budget:
        return 0
    by_chord = True
    while high - low > 1:
        share = (budget - at_low) / (at_high - at_low) if by_chord else 0.5
        guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        if (at_guess := peak(guess)) <= budget:
            low, at_low = guess, at_guess
        else:
            high, at_high = guess, at_guess
        by_chord = not by_chord
    return low


def variants(options: PlanOptions, device: str) -> Iterator[tuple[str, PlanOptions]]:
    """(flags, options) for each single option whose change makes a difference here."""
    step, model, memory = options.step, options.model, options.memory

    def changed(flags: str, **changes: Any) -> tuple[str, PlanOptions]:
        parts = {
            part.name: replace(section, **{name: value for name, value in changes.items() if hasattr(section, name)})
            for part in fields(options)
            for section in [getattr(options, part.name)]
        }
        return flags, PlanOptions(**parts)

    low = is_low_precision(model, device)
    on = not step.activation_checkpointing
    yield changed(
        f"--activation_checkpointing {str(on).lower()}", activation_checkpointing=on,
        activation_offload=memory.activation_offload and on,
    )  # fmt: skip
    if device == "cuda" and step.activation_checkpointing:
        on = not memory.activation_offload
        yield changed(f"--activation_offload {str(on).lower()}", activation_offload=on)
    if not step.of_documents and step.sharding == "none":
        persona_grad = "full" if memory.persona_grad == "none" else "none"
        yield changed(f"--persona_grad {persona_grad}", persona_grad=persona_grad)
    tile = 0 if memory.mlp_tile else MLP_TILE
    yield changed(f"--mlp_tile {tile}", mlp_tile=tile)
    rank = 0 if model.lora_r else 16
    idle = {name: getattr(ModelConfig, name) for name in ("load_in_4bit", "lora_alpha", "lora_dropout")}
    yield changed(f"--lora_r {rank}", lora_r=rank, **({} if rank else idle))
    if model.lora_r and device == "cuda" and step.sharding == "none":
        four = not model.load_in_4bit
        yield changed(f"--load_in_4bit {str(four).lower()}", load_in_4bit=four)
    if low or is_low_precision(replace(model, precision="auto"), device):  # a run refuses bf16 that is not native
        precision = "fp32" if low else "bf16"
        yield changed(f"--precision {precision}", precision=precision)
    batch, fewest = step.batch, max(step.replies, memory.share_persona)
    if batch > fewest:
        yield changed(
            f"--per_device_train_batch_size {fewest}", per_device_train_batch_size=fewest,
            gradient_accumulation_steps=batch // fewest * step.forwards,
        )  # fmt: skip
    if memory.share_persona > 1 and step.sharding == "none":
        one = int(not memory.branches_per_forward)
        yield changed(f"--branches_per_forward {one}", branches_per_forward=one)
        with_it = " --branches_per_forward 0" if memory.branches_per_forward else ""
        yield changed(f"--share_persona 0{with_it}", share_persona=0, branches_per_forward=0)
    if step.replies > 1:  # a batch of as many separate rows, padded to the longest
        yield changed("--share none", replies=1, branches=False)
    if step.computed.products and not step.of_documents:  # a cross-entropy plan has rows with a persona
        yield changed("--objective ce", objective="ce")
    if model.attn_implementation == "eager":
        yield changed("--attn_implementation sdpa", attn_implementation="sdpa")
    if model.backend == "reference":
        yield changed("--backend torch", backend="torch")
