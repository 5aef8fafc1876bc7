"""python -m perce.plan: what a training step takes, before a GPU is spent on it.

config.json → the model without data → a rehearsed step (memory by phase) and its operations (time) → what fits, and
what each option buys. No weights are read.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perce.config import MemoryConfig, ModelConfig, is_training_option
from perce.errors import UserError
from perce.options import Options
from perce.plan_config import PlanConfig

if TYPE_CHECKING:
    from perce.plan_memory import Counts, Memory
    from perce.plan_rehearsal import Recipe
    from perce.plan_time import Flops

MLP_TILE = 1024  # of the variant that is shown

OPTIONS = Options(
    prog="python -m perce.plan",
    description="Peak memory and least time of a training step, the largest context that fits, and what each option "
    "buys. Reads the model's config.json only.",
    sections={"model": ModelConfig, "memory": MemoryConfig, "plan": PlanConfig},
    passes_over=is_training_option,
    renames={"max_length": "context"},
)


@dataclass(frozen=True)
class Config:
    model: ModelConfig
    plan: PlanConfig
    memory: MemoryConfig = field(default_factory=MemoryConfig)


@dataclass(frozen=True)
class Plan:
    """One configuration, estimated."""

    counts: Counts
    memory: Memory
    flops: Flops


@dataclass(frozen=True)
class Variant:
    """The same run with one option changed."""

    flags: str
    plan: Plan


@dataclass(frozen=True)
class Result:
    """Everything that is shown."""

    config: Config
    device: str
    precision: str
    plan: Plan
    rate: float | None  # FLOP/s, where known
    largest_context: int | None  # None without --gpu_memory; 0 where nothing fits
    variants: list[Variant]


main = OPTIONS.command(Config, lambda config: run(config))


def run(config: Config) -> None:
    """Estimate, print, and write the JSON."""
    from perce.environment import quiet_libraries
    from perce.files import claim_files

    quiet_libraries()
    claim_files([config.plan.json])
    from perce.plan_report import print_plan, to_json

    result = make_result(config)
    print_plan(result)
    if config.plan.json:
        Path(config.plan.json).expanduser().write_text(json.dumps(to_json(result), indent=2) + "\n", encoding="utf-8")
        print(f"written  {config.plan.json}")


def make_result(config: Config) -> Result:
    from perce.plan_time import matmul_rate

    model_config = load_config(config.model)
    check_context(model_config, config)
    device = resolve_device(config.plan)
    config = replace(config, model=with_backend(config.model, device))
    check_options(config, device)
    low = is_low_precision(config.model, device)
    rate = config.plan.tflops * 1e12 if config.plan.tflops else matmul_rate(device, low)
    return Result(
        config,
        device,
        "bf16" if low else "fp32",
        estimate(model_config, config, device),
        rate,
        largest_context(model_config, config, device),
        list(planned_variants(model_config, config, device)),
    )


def planned_variants(model_config: Any, config: Config, device: str) -> Iterator[Variant]:
    """Those of `variants` that this architecture can do."""
    for flags, changed in variants(config, device):
        with contextlib.suppress(UserError):
            yield Variant(flags, estimate(model_config, changed, device))


def estimate(model_config: Any, config: Config, device: str) -> Plan:
    """Memory and operations of one configuration. UserError for a model that cannot be planned."""
    from perce.plan_memory import count, memory
    from perce.plan_time import flops

    recipe = recipe_of(config, device)
    counts = count(model_config, recipe)
    return Plan(
        counts,
        memory(model_config, recipe, config.plan, counts, device),
        flops(model_config, recipe, config.plan, counts),
    )


def recipe_of(config: Config, device: str) -> Recipe:
    from perce.plan_rehearsal import Recipe

    low = is_low_precision(config.model, device)
    return Recipe(config.model, low, config.plan.activation_checkpointing, config.memory)


def resolve_device(plan: PlanConfig) -> str:
    import torch

    if plan.device != "auto":
        return plan.device
    return "cuda" if plan.gpu_memory or torch.cuda.is_available() else "cpu"


def with_backend(model: ModelConfig, device: str) -> ModelConfig:
    """With the backend that a run would take there. UserError for one that cannot run."""
    import torch

    from perce.checks import check_backend

    return replace(model, backend=check_backend(model.backend, torch.device(device)))  # type: ignore[arg-type]


def is_low_precision(model: ModelConfig, device: str) -> bool:
    """As perce.model.resolve_precision, for a device that need not be here."""
    from perce.model import bf16_is_sound

    return model.precision == "bf16" or (model.precision == "auto" and (device == "cuda" or bf16_is_sound("cpu")))


def load_config(options: ModelConfig) -> Any:
    """The model's config, its dropout off as in training. UserError for what is no decoder-only dense model."""
    from transformers import PretrainedConfig

    from perce.demo import default_model_path
    from perce.model import read_config

    if options.load_in_4bit:
        raise UserError(
            "--load_in_4bit: plans of quantised models are not made. Plan with bf16 weights: an upper bound."
        )
    path = options.model or str(default_model_path())
    config = read_config(path)
    check_architecture(config, path)
    local = Path(path).expanduser()
    raw, _ = PretrainedConfig.get_config_dict(str(local) if local.exists() else path)
    text, names = config.get_text_config(), ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    written = raw.get("text_config", raw)
    missing = [name for name in names if getattr(text, name, None) is None]
    # A size left out of config.json has the architecture's default, which is that of another model.
    missing += [
        name
        for name in ("hidden_size", "num_hidden_layers")
        if written.keys().isdisjoint({name, text.attribute_map.get(name)})
    ]
    if missing:
        raise UserError(f"--model {path}: {missing[0]} is missing from its config.json, and a plan needs it.")
    return config


def check_architecture(config: Any, path: str) -> None:
    """UserError for encoders, and for mixtures of experts: which of them run depends on the data."""
    if config.is_encoder_decoder:
        raise UserError(f"--model {path}: PerCE needs a decoder-only model, and {config.model_type} has an encoder.")
    text = config.get_text_config()
    if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UserError(f"--model {path}: {text.model_type} has a mixture of experts. Only dense models are planned.")


def check_context(model_config: Any, config: Config) -> None:
    from perce.memory import position_limit

    limit = position_limit(model_config)
    if limit is not None and config.plan.context > limit:
        raise UserError(
            f"--context {config.plan.context}: the model has positions for {limit} tokens (max_position_embeddings in "
            f"its config.json). Expected at most {limit}, or a config.json that stretches them (rope_scaling)."
        )


def check_options(config: Config, device: str) -> None:
    """UserError for options that a training run would refuse together."""
    plan, memory = config.plan, config.memory
    if memory.persona_grad == "none" and plan.objective == "longce":
        raise UserError("--persona_grad none: needs a persona, and --objective longce has documents. Use full.")
    if memory.persona_grad == "none" and plan.sharding == "full":
        raise UserError("--persona_grad none, --sharding full: do not work together. Use --sharding none.")
    if memory.activation_offload and (device == "cpu" or not plan.activation_checkpointing):
        raise UserError(
            "--activation_offload: moves the inputs of checkpointed layers from a GPU to host memory. Expected "
            "--activation_checkpointing and --device cuda beside it."
        )


def largest_context(model_config: Any, config: Config, device: str) -> int | None:
    """Tokens of the longest context whose peak fits --gpu_memory, up to the model's own limit; 0 if none does."""
    from perce.memory import position_limit
    from perce.plan_memory import count, memory

    budget = config.plan.memory_bytes()
    if budget is None:
        return None
    recipe = recipe_of(config, device)
    counts = count(model_config, recipe)
    shortest = 2 if config.plan.objective == "longce" else config.plan.query + config.plan.response + 1
    longest = max(position_limit(model_config) or 2**20, shortest)

    def peak(context: int) -> int:
        return memory(model_config, recipe, replace(config.plan, context=context), counts, device).peak

    return largest(peak, shortest, longest, budget)


def largest(peak: Callable[[int], int], low: int, high: int, budget: int) -> int:
    """The largest integer in [low, high] whose peak is within the budget; 0 if not even low's is. peak must not fall.

    Bisection, every other guess by the chord between the ends: peaks are straight lines over long stretches.
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


def variants(config: Config, device: str) -> Iterator[tuple[str, Config]]:
    """(flags, config) with one option changed, where that is a change."""
    plan, model, memory = config.plan, config.model, config.memory

    def changed(flags: str, **changes: Any) -> tuple[str, Config]:
        parts = {
            part.name: replace(section, **{name: value for name, value in changes.items() if hasattr(section, name)})
            for part in fields(config)
            for section in [getattr(config, part.name)]
        }
        return flags, Config(**parts)

    low = is_low_precision(model, device)
    on = not plan.activation_checkpointing
    yield changed(
        f"--activation_checkpointing {str(on).lower()}", activation_checkpointing=on,
        activation_offload=memory.activation_offload and on,
    )  # fmt: skip
    if device == "cuda" and plan.activation_checkpointing:
        on = not memory.activation_offload
        yield changed(f"--activation_offload {str(on).lower()}", activation_offload=on)
    if plan.objective != "longce" and plan.sharding == "none":
        persona_grad = "full" if memory.persona_grad == "none" else "none"
        yield changed(f"--persona_grad {persona_grad}", persona_grad=persona_grad)
    tile = 0 if memory.mlp_tile else MLP_TILE
    yield changed(f"--mlp_tile {tile}", mlp_tile=tile)
    rank = 0 if model.lora_r else 16
    yield changed(f"--lora_r {rank}", lora_r=rank)
    precision = "fp32" if low else "bf16"
    yield changed(f"--precision {precision}", precision=precision)
    if (batch := plan.per_device_train_batch_size) > 1:
        from perce.plan_memory import accumulation

        yield changed(
            "--per_device_train_batch_size 1", per_device_train_batch_size=1,
            gradient_accumulation_steps=batch * accumulation(plan),
        )  # fmt: skip
    if plan.objective != "ce":
        yield changed("--objective ce", objective="ce")
    if model.attn_implementation == "eager":
        yield changed("--attn_implementation sdpa", attn_implementation="sdpa")
    if model.backend == "reference":
        yield changed("--backend torch", backend="torch")


if __name__ == "__main__":
    sys.exit(main())
