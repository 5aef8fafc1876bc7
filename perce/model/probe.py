"""Running a model outside its training steps: eval mode and back, and a few tokens to check a loaded model with."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from perce.data.batch import packed
from perce.errors import UserError

PROBE_TOKENS = 8


def unwrapped(model: Any) -> Any:
    """The model inside a PEFT model, or the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: Any) -> nn.Module:
    """The text decoder inside a causal language model: the innermost model that holds the input embeddings.

    base_model is not always it: it may be a vision-language model, which needs more than tokens, or the whole model if
    base_model_prefix names nothing. The same holds for get_decoder().
    """
    embeddings = model.get_input_embeddings()
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model]
    return next((module for module in reversed(inner) if embeddings in set(module.modules())), model.base_model)


@contextlib.contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or eval mode inside the context, and each module's earlier mode again afterwards.

    Past nn.Module.__setattr__, because each step comes here: of 2,559 modules (30 layers with adapters), train() and
    back took 23 ms of a CPU's time, this takes 4 ms.
    """
    changed = [vars(module) for module in model.modules() if module.training != training]
    try:
        for fields in changed:
            fields["training"] = training
        yield
    finally:
        for fields in changed:
            fields["training"] = not training


def evaluating(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    return in_mode(model, training=False)


@contextlib.contextmanager
def with_attributes(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """(object, attribute, value): the values inside the context, and the earlier ones again afterwards."""
    with contextlib.ExitStack() as stack:
        for holder, name, value in changes:
            stack.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, value)
        yield


def vocabulary_of(model: Any) -> int:
    """The number of token ids that a model both reads and predicts: Moshi has one more embedding than logits."""
    return min(len(model.get_input_embeddings().weight), len(model.get_output_embeddings().weight))


def check_ids(largest: int, vocabulary: int, name: str) -> None:
    """UserError for a token id without an embedding or a logit: on a GPU it would end the process with a device-side
    assert."""
    if largest >= vocabulary:
        raise UserError(
            f"{name}: token id {largest} is outside the model's vocabulary of {vocabulary}. Expected the model's own "
            "tokenizer; after adding tokens, call model.resize_token_embeddings(len(tokenizer))."
        )


def probe_ids(model: Any, length: int = PROBE_TOKENS) -> Tensor:
    """(1, length) token ids from all over the vocabulary, on the device of the embeddings."""
    device = model.get_input_embeddings().weight.device
    return torch.arange(1, length + 1, device=device)[None] * 97 % vocabulary_of(model)


@contextlib.contextmanager
def attention_of_any_device(model: Any) -> Iterator[None]:
    """sdpa instead of flash kernels, which need a GPU and 16 bits; afterwards the model has its own attention again."""
    own = model.config.get_text_config()._attn_implementation
    with contextlib.ExitStack() as stack:
        if str(own).startswith("flash"):
            stack.callback(model.set_attn_implementation, own)
            model.set_attn_implementation("sdpa")
        yield


# Names, in configs and modules, of attention windows and of the number of tokens that an index selects.
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "sliding_window_size", "index_topk")


def windows_of(model: nn.Module, tokens: int) -> contextlib.AbstractContextManager[None]:
    """Windows of `tokens` tokens in modules, masks and caches, so that short sequences reach beyond them."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    return with_attributes(
        (holder, name, tokens)
        for holder, name in itertools.product([*model.modules(), *configs.values()], WINDOWS)
        if type(value := vars(holder).get(name)) is int and value > tokens
    )


PACKING_TOLERANCE = 0.1  # relative to the change if the sequence before is seen; bf16 noise is far below


def check_packing(model: Any, device: str) -> None:
    """UserError unless the model's attention keeps packed sequences apart, and does so without a T × T mask."""
    attention = model.config.get_text_config()._attn_implementation
    if device == "cpu" or not str(attention).startswith(("flash_attention", "flex_attention")):
        raise UserError(
            f"packing: expected flash_attention_2, flash_attention_3 or flex_attention on a GPU, got {attention} on "
            f"{device}. The others build a T × T mask to keep packed sequences apart. Choose one with "
            "--attn_implementation, or leave --packing out: --tokens_per_batch groups by length and pads little."
        )
    check_sequences_apart(model)


@torch.no_grad()
def check_sequences_apart(model: Any) -> None:
    """UserError if the second of two packed sequences sees the first: some architectures ignore position_ids."""
    ids = probe_ids(model, 2 * PROBE_TOKENS)
    lengths = send_to_device(packed([PROBE_TOKENS] * 2), ids.device)
    rows = torch.arange(PROBE_TOKENS, device=ids.device)
    with evaluating(model):
        alone = model(input_ids=ids[:, PROBE_TOKENS:], perce={"rows": rows})
        apart = model(input_ids=ids, **lengths, perce={"rows": rows + PROBE_TOKENS})
        mixed = model(input_ids=ids, perce={"rows": rows + PROBE_TOKENS})
    error, leak = (apart - alone).float().norm().item(), (mixed - alone).float().norm().item()
    if not error <= PACKING_TOLERANCE * leak:
        raise UserError(
            f"packing: the attention of this {model.config.model_type} model does not keep packed sequences apart: the "
            f"hidden states of the second change by {error / leak:.0%} of the change that seeing the first causes. "
            "Leave --packing out."
        )
