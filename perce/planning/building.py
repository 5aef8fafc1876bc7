"""Models without data: built from a config on the meta device, whole or cut to a few layers. Their sizes are exact."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from perce.config.schema import MemoryConfig, ModelConfig
from perce.errors import UserError, in_one_line
from perce.model.loading import add_adapter, lora_config
from perce.model.memory import enable_checkpointing, prepare_memory
from perce.model.probe import decoder_of, unwrapped
from perce.model.reach import freeze_beside_text
from perce.planning.four_bit import quantised


@dataclass(frozen=True)
class Setup:
    """Everything besides its config that decides how a model is built and run."""

    model: ModelConfig
    low_precision: bool  # bf16 autocast, and bf16 weights under LoRA
    checkpointing: bool
    memory: MemoryConfig = field(default_factory=MemoryConfig)


def build(config: Any, setup: Setup) -> Any:
    """The model of a config as load_model would make it, on the meta device. UserError if none can be built."""
    from transformers import AutoModelForCausalLM

    options = setup.model
    dtype = torch.bfloat16 if setup.low_precision and options.lora_r else torch.float32
    attention = options.attn_implementation
    flash = "flash" in (attention or "")  # needs a package and a GPU: see _flash_attention
    kwargs = {"attn_implementation": "sdpa" if flash else attention} if attention else {}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, **kwargs)
            if options.load_in_4bit:
                model = quantised(model, dtype)
            if options.lora_r:
                model = add_adapter(model, lora_config(options))
            else:
                freeze_beside_text(model)
    except UserError:
        raise
    except (ValueError, ImportError, AttributeError, TypeError, KeyError, AssertionError) as error:
        raise UserError(
            f"--model {options.model}: transformers cannot build a model from its config.json: {in_one_line(error)}"
        ) from error
    base = unwrapped(model)
    if setup.checkpointing:
        enable_checkpointing(base)
    prepare_memory(base, setup.memory)
    if flash:
        base.config.get_text_config()._attn_implementation = _flash_attention()
    return model.train()


def _flash_attention() -> str:
    """The name under which sdpa without any mask is registered. It holds the same tensors as flash attention, which
    needs no mask for prefixes, windows and branches."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("perce_flash", sdpa_attention_forward)
    AttentionMaskInterface.register("perce_flash", lambda *args, **kwargs: None)
    return "perce_flash"


def decoder_layers(model: Any, count: int) -> nn.ModuleList:
    """The list of the language model's layers."""
    for module in decoder_of(unwrapped(model)).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(unwrapped(model)).__name__}: expected a ModuleList of {count} layers, found none.")


def layer_kinds(config: Any) -> list[str]:
    """The kind of each layer (full or sliding attention, …) by the config: layers of one kind are alike."""
    text = config.get_text_config()
    return list(getattr(text, "layer_types", None) or [""] * text.num_hidden_layers)


def cut(config: Any, stack: Sequence[int]) -> Any:
    """The config of a model that has only the layers `stack` of this one."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, [value[index] for index in stack])
    text.num_hidden_layers = len(stack)
    return config
