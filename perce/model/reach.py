"""The parts of a model that a text reaches: which weights it trains, and which layers take an adapter.

A vision tower runs only for images. A router returns more than a tensor, and other code may read the weight of a layer
without calling the layer: an adapter there fails, or is never trained and stops the other processes of a run.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from perce.model.probe import attention_of_any_device, decoder_of, in_mode, probe_ids, unwrapped

PROBE_LENGTH = 64  # tokens; enough for layers that pool several tokens
# Modules that decide which expert a token goes to.
ROUTER = re.compile(r"(^|\.)(\w*router\w*|gate|shared_expert_gate)(\.|$)")
# Fused GPU kernels read these weights of a Mamba layer without calling the modules; PEFT refuses some of them for that.
READ_BY_KERNELS = ("x_proj", "dt_proj", "out_proj")
# RWKV halves these weights repeatedly in eval mode, in place, so an adapter on them would weigh more there.
RESCALED = re.compile(r"\.(attention\.output|feed_forward\.value)$")
EXPERT = re.compile(r"(experts)\.\d+")


def beside_text(model: Any) -> dict[str, int]:
    """The names of the parts of a model that no text reaches, such as a vision tower, and their parameter counts."""
    base = unwrapped(model)
    decoder, head = decoder_of(base), base.get_output_embeddings()
    of_text = {id(p) for part in (decoder, head) for p in part.parameters()}

    def parts(module: nn.Module, path: str) -> Iterator[tuple[str, int]]:
        for name, child in module.named_children():
            parameters = list(child.parameters())
            if parameters and not any(id(p) in of_text for p in parameters):
                yield path + name, sum(p.numel() for p in parameters)
            elif child is not decoder:
                yield from parts(child, f"{path}{name}.")

    return dict(parts(base, ""))


def freeze_beside_text(model: Any) -> None:
    """Freeze the parts that no text reaches: other processes would wait for their gradients."""
    base = unwrapped(model)
    for name in beside_text(base):
        base.get_submodule(name).requires_grad_(False)


def linear_layers(model: Any, unused: set[str]) -> list[str]:
    """The layers that "all-linear" means here: the linear layers of the text decoder, except the output embedding,
    routers, layers whose adapters would be ignored or go wrong, and those that `unused_layers` found."""
    inside = set(decoder_of(model).modules()) - {model.get_output_embeddings()}
    names = [name for name, layer in _linear(model) if layer in inside and not ROUTER.search(name)]
    names = [name for name in names if not _is_read_by_kernels(model, name)]
    if model.config.model_type == "rwkv":
        names = [name for name in names if not RESCALED.search(name)]
    return [name for name in names if name not in unused]


def unused_layers(model: Any) -> set[str]:
    """The linear layers that a text does not use as such: no hidden state depends on the tensor that the layer's own
    forward makes of its input. Empty if the model has no weights to try it with."""
    if model.get_input_embeddings().weight.is_meta:
        return set()
    zeros: dict[str, list[Tensor]] = {}

    def watch(name: str, layer: Any) -> Any:
        width = layer.nf if isinstance(layer, Conv1D) else layer.out_features

        def add_zero(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not isinstance(output, Tensor) or not args or output.shape != (*args[0].shape[:-1], width):
                return output
            zero = output.new_zeros((), requires_grad=True)
            zeros.setdefault(_any_expert(name), []).append(zero)
            return output + zero

        return layer.register_forward_hook(add_zero)

    with contextlib.ExitStack() as stack, torch.enable_grad(), trying(model):
        for name, layer in _linear(model):
            stack.callback(watch(name, layer).remove)
        hidden = decoder_of(model)(input_ids=probe_ids(model, PROBE_LENGTH), use_cache=False)[0]
        every = [zero for several in zeros.values() for zero in several]
        gradients = torch.autograd.grad(hidden.sum(), every, allow_unused=True) if every else ()
    reached = {id(zero) for zero, gradient in zip(every, gradients, strict=True) if gradient is not None}
    used = {name for name, several in zeros.items() if any(id(zero) in reached for zero in several)}
    return {
        name for name, layer in _linear(model)
        if _any_expert(name) not in used and layer is not model.get_output_embeddings()
    }  # fmt: skip


def without_gradient(model: Any) -> list[str]:
    """The names of the trained parameters that have no gradient after a short text. A parameter of an expert is among
    them only if it has none in any expert."""
    head = set(unwrapped(model).get_output_embeddings().parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p not in head}
    reached: set[str] = set()

    def watch(name: str, parameter: Tensor) -> Any:
        def note(_: Tensor) -> None:
            reached.add(_any_expert(name))
            parameter.grad = None  # freed at once, so that the gradients of a whole model are never held together

        return parameter.register_post_accumulate_grad_hook(note)

    if not trained:
        return []
    with contextlib.ExitStack() as stack, torch.enable_grad(), trying(model):
        for name, parameter in trained.items():
            stack.callback(watch(name, parameter).remove)
        ids = probe_ids(model, PROBE_LENGTH)
        model(input_ids=ids, perce={"rows": torch.arange(PROBE_LENGTH, device=ids.device)}).sum().backward()
    return [name for name in trained if _any_expert(name) not in reached]


@contextlib.contextmanager
def trying(model: Any) -> Iterator[None]:
    """Training mode (whose kernels may differ from those of eval mode) on any device, with the random state restored
    afterwards."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with in_mode(model, training=True), torch.random.fork_rng(devices=devices), attention_of_any_device(model):
        yield


def _linear(model: Any) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)]


def _any_expert(name: str) -> str:
    """The name with * for the number of the expert, because a text's tokens decide which experts it reaches."""
    return EXPERT.sub(r"\1.*", name)


def _is_read_by_kernels(model: Any, name: str) -> bool:
    parent, _, own = name.rpartition(".")
    layer = model.get_submodule(parent)
    return own in READ_BY_KERNELS and hasattr(layer, "A_log") and hasattr(layer, "D")
