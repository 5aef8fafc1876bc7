"""Checks that run a model on a few tokens when it has just been loaded: on a CPU, perhaps in fp32."""

import contextlib
from collections.abc import Iterator
from typing import Any


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
