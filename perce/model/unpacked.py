"""transformers' questions whether a row is several packed sequences, answered without waiting for the device.

Without an attention mask it looks for positions that begin again: in each forward pass, where masks are made, and under
flash attention in each layer. The host waits for what it sees, and could not launch a step while the GPU is at work on
the one before. perce knows the answer.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers import modeling_flash_attention_utils as flash

_here = threading.local()  # `unpacked`: whether a forward pass with unpacked rows is running in this thread


@contextlib.contextmanager
def known_unpacked(known: bool = True) -> Iterator[None]:
    """Inside the context each row is one sequence, or attention is told where its sequences begin. That is kept with
    the positions, so that it also holds where checkpointed layers are computed again in backward."""
    if torch.compiler.is_compiling() or not known:
        yield
        return
    before = getattr(_here, "unpacked", False)
    _here.unpacked = True
    try:
        yield
    finally:
        _here.unpacked = before


def answer_transformers() -> None:
    """Let perce answer, for all models of this process; other forward passes are looked at as before."""
    for module, name, answer in (
        (masking_utils, "find_packed_sequence_indices", None), (flash, "_is_packed_sequence", False),
    ):  # fmt: skip
        if not hasattr(own := getattr(module, name), "perce"):
            setattr(module, name, _answering(own, answer))


def _answering(own: Any, answer: Any) -> Any:
    @functools.wraps(own)
    def asked(position_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not isinstance(position_ids, Tensor):
            return own(position_ids, *args, **kwargs)
        if getattr(_here, "unpacked", False):
            position_ids.perce_unpacked = True  # type: ignore[attr-defined]
        return answer if hasattr(position_ids, "perce_unpacked") else own(position_ids, *args, **kwargs)

    asked.perce = True  # type: ignore[attr-defined]
    return asked
