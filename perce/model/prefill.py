"""The persona in a forward pass of its own, whose keys and values the later tokens read: Trunks of data/sharing.py.

    trunk      input_ids[:persona_end]   → keys and values of every layer, for all requests that begin with it
    forwards   input_ids[persona_end:]   queries and responses, which attend to the trunk

persona_grad="none": the trunk has no gradient, and is run PREFILL_CHUNK tokens at a time. The loss is the same
function, so its value is that of persona_grad="full". The gradient is a truncation: it is that of autograd with the
trunk's keys and values detached. How the weights encode the persona gets no gradient; how the response reads it does.
In return no activation of the persona is kept, and only its keys and values grow with its length.

branches_per_forward: only the outputs of the forward passes behind a trunk are kept. Backward recomputes these passes
one after the other, adds up their gradients of the trunk's keys and values, and then goes through the trunk once. The
gradient is exact, and takes the memory of the trunk and of one forward pass.

Attention masks are (chunk × keys) and (segment × keys), never T × T.
"""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from perce.data.sharing import Forward, Spans, Trunks
from perce.errors import UserError
from perce.model.unpacked import known_unpacked

# Besides the cache, the prefill's only memory is a chunk's activations and its mask (4 · PREFILL_CHUNK · T bytes).
PREFILL_CHUNK = 1024
BY_ITSELF = "persona_grad=none, branches_per_forward"  # the options under which a persona runs by itself
# The models' name for the cache argument, which transformers 5.24 renamed.
CACHE_ARGUMENT = (
    "cache" if "cache" in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)} else "past_key_values"
)


class PrefixCache(DynamicCache):
    """Keys and values of a prefix, which are not changed once the cache is `filled`. A layer that is recomputed in
    backward finds the same cache as in forward; a DynamicCache would append its keys twice."""

    filled = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.filled:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)


class Recorder(DynamicCache):
    """Records the keys and values of a forward pass over a whole trunk. For that pass it is an empty cache, so a layer
    that is recomputed in backward computes the same again."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recorded: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.recorded.setdefault(layer_idx, (key_states, value_states))
        return key_states, value_states


@torch.no_grad()
def prefill(base_model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> PrefixCache:
    """The cache of one sequence's prefix, (1, P)."""
    cache = PrefixCache(config=base_model.config)
    for chunk in input_ids.split(PREFILL_CHUNK, dim=1):
        base_model(input_ids=chunk, use_cache=False, **{CACHE_ARGUMENT: cache}, **kwargs)
    cache.filled = True
    return cache


def prefill_with_gradient(base_model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> PrefixCache:
    """Like `prefill`, but in one forward pass, and the keys and values have a gradient."""
    cache, recorder = PrefixCache(config=base_model.config), Recorder(config=base_model.config)
    base_model(input_ids=input_ids, use_cache=False, **{CACHE_ARGUMENT: recorder}, **kwargs)
    for index, (keys, values) in recorder.recorded.items():
        cache.update(keys, values, index)
        layer: Any = cache.layers[index]
        if type(layer) is DynamicLayer:  # update() has copied them
            layer.keys, layer.values = keys, values
    cache.filled = True
    return cache


def hidden_on_trunks(
    base_model: PreTrainedModel,
    rows: Tensor,  # (N,) indices of tokens behind trunks
    trunks: Trunks,
    input_ids: Tensor,  # (1, T)
    position_ids: Tensor,  # (1, T)
    **kwargs: Any,
) -> Tensor:
    """(N, D) hidden states at `rows` of the forward passes behind the trunks, concatenated."""

    def behind(ids: Tensor, cache: PrefixCache, forward: Forward) -> Tensor:
        spans = {}
        if forward.spans is not None:
            positions = position_ids[:, forward.start : forward.end]
            spans = {"position_ids": positions, **spans_arguments(forward.spans, position_ids)}
        given = {"input_ids": ids, "use_cache": False, CACHE_ARGUMENT: cache}
        with known_unpacked():  # in backward too, in whose thread this is not known
            return base_model(**(kwargs | given | spans))[0][0]

    has_gradient = torch.is_grad_enabled()
    fill = prefill if trunks.detached or not has_gradient else prefill_with_gradient
    run = partial(checkpoint, behind, use_reentrant=False) if trunks.recomputed and has_gradient else behind
    outputs = []
    for trunk in trunks.trunks:
        cache = fill(base_model, input_ids[:, trunk.start : trunk.end], **kwargs)
        # The ids are an argument because checkpoint keeps the random state of its arguments' devices only.
        outputs += [run(input_ids[:, forward.start : forward.end], cache, forward) for forward in trunk.forwards]
    return torch.cat(outputs)[rows]


def spans_arguments(spans: Spans, like: Tensor) -> dict[str, Any]:
    """A decoder's arguments for a row of segments. It passes on a mask of four dimensions unchanged, and attention
    makes its own masks; see branches.py."""
    return {"spans": spans, "attention_mask": like.new_ones(1, 1, 1, 1)}


def prepare_prefill(model: Any) -> None:
    """Let checkpointed layers keep the read-only cache; UserError for a model that cannot continue from a cached
    prefix. trial.py checks that it continues correctly."""
    _check_attention(model.config)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._can_checkpoint_with_cache = True


def _check_attention(config: Any) -> None:
    text = config.get_text_config()
    kind = text._attn_implementation
    if kind not in ("sdpa", "eager", "flex_attention") and not kind.startswith("flash_attention"):
        raise UserError(
            f"{BY_ITSELF} with attn_implementation={kind}: it is not known whether this attention aligns queries with "
            "the end of a longer row of keys. Use --attn_implementation sdpa or flash_attention_2."
        )
    kinds = [type(layer) for layer in DynamicCache(config=config).layers]
    if other := [kind.__name__ for kind in kinds if kind not in (DynamicLayer, DynamicSlidingWindowLayer)]:
        raise UserError(
            f"{BY_ITSELF}: {text.model_type} has layers whose state is not keys and values ({other[0]}), and cannot be "
            "read without being changed. Leave these options out."
        )
