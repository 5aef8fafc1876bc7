"""persona_grad="none": the prompt up to the persona's end as keys and values alone, the rest trained on top of them.

    prefix   input_ids[:persona_end]   no grad, PREFILL_CHUNK tokens a forward → keys and values of every layer
    rest     input_ids[persona_end:]   query and response; attends to the prefix, and is all that backward sees

The loss is the same function, so its value is that of persona_grad="full". The gradient is that of autograd with the
prefix's keys and values detached: a truncation. How the weights encode the persona gets no gradient, how the response
reads it does. In return no activation of the persona is kept: what grows with it is keys and values.

Each sequence runs by itself, so that personas of different lengths need no padding and no mask for it. Attention masks
are (chunk × keys) and (rest × keys), never T × T.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from perce.errors import UserError

# The activations of a chunk and its mask (4 · PREFILL_CHUNK · T bytes) are the prefill's only memory beside the cache.
PREFILL_CHUNK = 1024
# What the models call their cache: transformers 5.24 renamed it.
CACHE_ARGUMENT = (
    "cache" if "cache" in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)} else "past_key_values"
)


class PrefixCache(DynamicCache):
    """Keys and values of a prefix, read only once it is `filled`: a layer that is recomputed in backward finds what it
    found in forward, where a DynamicCache would have its keys appended twice."""

    filled = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.filled:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)


@torch.no_grad()
def prefill(base_model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> PrefixCache:
    """The cache of one sequence's prefix, (1, P)."""
    cache = PrefixCache(config=base_model.config)
    for chunk in input_ids.split(PREFILL_CHUNK, dim=1):
        base_model(input_ids=chunk, use_cache=False, **{CACHE_ARGUMENT: cache}, **kwargs)
    cache.filled = True
    return cache


def hidden_after_prefix(
    base_model: PreTrainedModel,
    rows: Tensor,  # (N,) of the B · T flattened tokens, none in a prefix
    prefix: Tensor,  # (B, 2) tokens of the prefix, and tokens in all
    input_ids: Tensor,  # (B, T), right-padded
    **kwargs: Any,
) -> Tensor:
    """(N, D) hidden states at `rows`, with the first prefix[b, 0] tokens of sequence b detached.

    What follows each prefix is run alone, and the results are laid end to end. Of sequences of 3 and 4 tokens (T = 4)
    behind prefixes of 1 and 2 these are tokens 1, 2 and 2, 3: rows 1, 2, 6, 7 are found at places 0, 1, 2, 3.
    """

    def rests() -> Iterator[Tensor]:
        for ids, (start, length) in zip(input_ids, prefix.tolist(), strict=True):
            cache = prefill(base_model, ids[None, :start], **kwargs)
            rest = {"input_ids": ids[None, start:length], CACHE_ARGUMENT: cache}
            yield base_model(**rest, use_cache=False, **kwargs)[0][0]

    start, length = prefix.unbind(1)
    rest_length = length - start  # (B,)
    first_place = rest_length.cumsum(0) - rest_length  # (B,) of each sequence's rest
    sequence, token = rows // input_ids.shape[1], rows % input_ids.shape[1]
    return torch.cat(list(rests()))[first_place[sequence] + token - start[sequence]]


def prepare_prefill(model: Any) -> None:
    """Let checkpointed layers keep the read-only cache; UserError for a model that cannot go on from a prefix. Whether
    it really does is found out by trial.py."""
    config = model.config.get_text_config()
    _check_attention(model, config)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._can_checkpoint_with_cache = True


def _check_attention(model: Any, config: Any) -> None:
    kind = config._attn_implementation
    if kind not in ("sdpa", "eager", "flex_attention") and not kind.startswith("flash_attention"):
        raise UserError(
            f"persona_grad=none with attn_implementation={kind}: it is not known whether that lines queries up with "
            "the end of a longer row of keys. Use --attn_implementation sdpa or flash_attention_2."
        )
    layers = [type(layer) for layer in DynamicCache(config=model.config).layers]
    other = [layer.__name__ for layer in layers if layer not in (DynamicLayer, DynamicSlidingWindowLayer)]
    if other:
        raise UserError(
            f"persona_grad=none: {config.model_type} has layers with a state of another kind than keys and values "
            f"({other[0]}), which cannot be read without being changed. Use --persona_grad full."
        )
    if any(part.is_prompt_learning for part in getattr(model, "peft_config", {}).values()):
        raise UserError("persona_grad=none: prefix tuning puts a cache of its own before the prompt. Use LoRA.")
