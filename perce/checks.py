"""What PerceTrainer refuses or warns of on construction: what would fail later, on a GPU, or in silence."""

import warnings
from collections.abc import Mapping
from typing import Any

import pyarrow.compute
import torch
from datasets import Dataset
from torch import nn

from perce.errors import UserError
from perce.loader import token_ids
from perce_kernels.loss import resolve_backend


def warn_of_dropout(model: nn.Module) -> None:
    """Adapters may have dropout; a base model may not (see perce.model)."""
    dropout = max((module.p for module in model.modules() if isinstance(module, nn.Dropout)), default=0.0)
    if dropout > 0:
        warnings.warn(
            f"Dropout of {dropout} in the adapter acts in the factual pass and not in the counterfactual one: every "
            "PIR is a little too low. Leave it at 0, or use --estimate epoch or frozen, which have none then.",
            stacklevel=3,
        )


def check_hooks(kwargs: Mapping[str, Any]) -> None:
    """UserError for what the Trainer would call with logits, or instead of the loss: neither happens here."""
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if kwargs.get(name) is not None:
            raise UserError(
                f"{name}: PerceTrainer computes its own loss and never holds logits, so this would not be called. Read "
                "trainer.last_evaluation for per-token log-probabilities, or use python -m perce.evaluate."
            )


def check_backend(backend: str, device: torch.device) -> str:
    """The backend that is meant, PERCE_BACKEND looked up; UserError for one that cannot run on this device."""
    try:
        return resolve_backend(backend, device)
    except ValueError as error:
        raise UserError(f"{error}. Choose another with --backend, or in PERCE_BACKEND.") from error


def check_vocabulary(dataset: Any, name: str, vocabulary: int) -> None:
    """UserError for a token id without an embedding: on a GPU it would end the process with a device-side assert."""
    largest = -1
    if isinstance(dataset, Dataset):
        for column in token_ids(dataset):
            largest = max(largest, pyarrow.compute.max(pyarrow.compute.list_flatten(column)).as_py())
    elif isinstance(dataset, list):
        largest = max((max(pair["input_ids"]) for pair in dataset), default=-1)
    if largest >= vocabulary:
        raise UserError(
            f"{name}: token id {largest} is outside the model's vocabulary of {vocabulary}. Expected the model's own "
            "tokenizer; after adding tokens, call model.resize_token_embeddings(len(tokenizer))."
        )
