"""What running a model beside its training takes: eval mode and back; a few tokens to check a loaded model on."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

PROBE_TOKENS = 8


def unwrapped(model: Any) -> Any:
    """The model inside a PEFT model, or the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within, and the mode before it afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def probe_ids(model: Any, length: int = PROBE_TOKENS) -> Tensor:
    """(1, length) token ids from all over the vocabulary, where the embeddings are."""
    embeddings = model.get_input_embeddings().weight
    return torch.arange(1, length + 1, device=embeddings.device)[None] * 97 % embeddings.shape[0]


@contextlib.contextmanager
def attention_of_any_device(model: Any) -> Iterator[None]:
    """sdpa in place of flash kernels, which need a GPU and 16 bits; the model's own attention is back afterwards."""
    own = model.config.get_text_config()._attn_implementation
    if not str(own).startswith("flash"):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(own)
