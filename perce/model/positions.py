"""Positions: how many a model has, and encodings whose frequencies depend on the length of a forward pass.

dynamic NTK   frequencies change with every length beyond max_position_embeddings, so longer sequences are refused
longrope      one set of factors for forward passes up to a length (the switch), another for longer ones. A run uses one
              set throughout; otherwise an example's encoding would differ between its two passes, and between batches
"""

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from perce.errors import UserError
from perce.hub import stated
from perce.model.patch import forward_of, is_patched
from perce.model.probe import unwrapped


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """The parameters of each rotary encoding: a config has one, or one for each kind of layer."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    yield from (part for part in (rope, *rope.values()) if isinstance(part, dict) and part.get("rope_type"))


def is_dynamic(config: Any) -> bool:
    return any("dynamic" in rope["rope_type"] for rope in _ropes(config))


def position_limit(config: Any) -> int | None:
    """The number of tokens that the model has positions for; None if its config does not say. A factor may stretch
    rotary encodings."""
    text = config.get_text_config()
    limit = stated(text, "max_position_embeddings")
    limit = limit if limit and limit > 0 else None  # XLNet says −1
    for rope in () if is_dynamic(config) else _ropes(config):
        if limit and rope.get("factor") and rope.get("original_max_position_embeddings"):
            limit = max(limit, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return limit


def switch_length(config: Any) -> int | None:
    """The number of tokens beyond which a forward pass uses longrope's long factors; None without such a switch."""
    text = config.get_text_config()
    lengths = [
        rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        for rope in _ropes(config) if rope["rope_type"] == "longrope"
    ]  # fmt: skip
    return min(filter(None, lengths), default=None)


def needs_long_factors(config: Any, longest: int) -> bool:
    """Whether a sequence of `longest` tokens is beyond the switch."""
    switch = switch_length(config)
    return switch is not None and longest > switch


def settle_lengths(model: Any, longest: Callable[[], int]) -> None:
    """Prepare a model for inference on sequences of up to longest() tokens, replies included. UserError if they exceed
    the limit of dynamic NTK; longrope uses its long factors if a sequence needs them. `longest` is called only for
    models with such encodings."""
    config = unwrapped(model).config
    if not is_dynamic(config) and switch_length(config) is None:
        return
    length, limit = longest(), position_limit(config)
    if is_dynamic(config) and limit and length > limit:
        raise UserError(
            f"sequences have up to {length} tokens, and beyond {limit} (max_position_embeddings) the position encoding "
            f"of {config.model_type} (rope_type dynamic) depends on the longest sequence of a batch. Use a "
            f"--max_length that is at most {limit} together with the tokens of a reply."
        )
    choose_factors(model, long=needs_long_factors(config, length))


def choose_factors(model: nn.Module, *, long: bool) -> None:
    """Make every forward pass of the model, however short, use longrope's long factors, or let its length decide
    (long=False). Changes the model in place."""
    for rotary in _switching(model):
        if not is_patched(rotary):
            _see_beyond(rotary, cast(int, switch_length(rotary.config)))
        rotary.perce_long = long


def has_long(model: nn.Module) -> bool:
    """Whether every forward pass uses the long factors."""
    return any(is_patched(rotary) and rotary.perce_long for rotary in _switching(model))


def _switching(model: nn.Module) -> Iterator[Any]:
    """The rotary encodings with two sets of factors."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        if "longrope" in (kinds.values() if isinstance(kinds, dict) else (kinds,)):
            yield module


def _see_beyond(rotary: Any, position: int) -> None:
    """While perce_long is set, add a position beyond the switch to every call of a rotary encoding, and drop its
    result: the largest position decides which factors are used."""
    own = forward_of(rotary)

    @functools.wraps(own)
    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        if not self.perce_long:
            return own(self, x, position_ids, *args, **kwargs)
        beyond = torch.full_like(position_ids[..., :1], position)
        encoded = own(self, x, torch.cat([position_ids, beyond], dim=-1), *args, **kwargs)
        return tuple(part[..., :-1, :] for part in encoded)

    forward.perce = True  # type: ignore[attr-defined]
    rotary.forward = types.MethodType(forward, rotary)
