"""Noise of training mode, such as dropout: in only one of the two passes it would bias every PIR."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from perce.errors import UserError
from perce.hub import NOISE, noisy_fields
from perce.model.probe import decoder_of


def check_noise(model: nn.Module) -> None:
    """UserError for a base model whose text decoder has dropout or other noise in training mode. Adapters may have
    dropout (see training/checks.py). trial.py finds noise whose name is unknown here."""
    decoder = decoder_of(model)
    for place, name, value in noise_of(decoder):
        raise UserError(
            f"{type(model).__name__}: {name}={value:g} in {place or type(decoder).__name__} would act in the factual "
            f"pass and not in the counterfactual one, and bias every PIR. {REMEDY}"
        )


REMEDY = "Call perce.disable_dropout(model) first, or give the model's path: perce then loads it without dropout."


def noise_of(model: nn.Module) -> Iterator[tuple[str, str, float]]:
    """(module, attribute, value) of everything that is random in training mode, except in adapters."""
    adapters = {id(part) for layer in model.modules() if hasattr(layer, "base_layer") for part in _beside_base(layer)}
    for place, module in model.named_modules():
        if id(module) not in adapters:
            yield from ((place, *field) for field in noisy_fields(module).items())
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                yield place, "p", module.p


def _beside_base(layer: Any) -> set[nn.Module]:
    return set(layer.modules()) - set(layer.base_layer.modules())


def adapter_noise(model: nn.Module) -> list[tuple[Any, Any, float]]:
    """(module or mapping, attribute or key, value) of everything in adapters that is random in training mode."""
    found: list[tuple[Any, Any, float]] = []
    for layer in model.modules():
        if hasattr(layer, "base_layer"):
            parts = [part for part in _beside_base(layer) if type(getattr(part, "p", None)) is float]
            found += [(part, "p", float(part.p)) for part in parts]  # type: ignore[arg-type]
            by_adapter = (held for name, held in vars(layer).items() if NOISE.search(name) and isinstance(held, dict))
            found += [(held, name, value) for held in by_adapter for name, value in held.items()]
    return [(holder, name, value) for holder, name, value in found if isinstance(value, float) and value > 0]


@contextlib.contextmanager
def without_adapter_noise(model: nn.Module) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for holder, name, value in adapter_noise(model):
            put = holder.__setitem__ if isinstance(holder, dict) else holder.__setattr__
            stack.callback(put, name, value)
            put(name, 0.0)
        yield


def disable_dropout(model: nn.Module) -> nn.Module:
    """Set dropout, layer drop and router jitter of a loaded model and its config to 0, in place; adapters keep
    theirs."""
    for place, name, _ in list(noise_of(model)):
        setattr(model.get_submodule(place), name, 0.0)
    configs = (getattr(module, "config", None) for module in model.modules())
    for config in {id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values():
        for name in noisy_fields(config):
            setattr(config, name, 0.0)
    return model
