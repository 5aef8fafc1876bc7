"""The numbers of an evaluation, from the statistics of its batches on all processes."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from perce.model.passes import TokenStatistics

Batches = Sequence[Sequence[TokenStatistics]]


def in_order_of_dataset(batches: Batches, loader: Any) -> list[TokenStatistics]:
    """This process's examples in the order of the dataset; as they came if the loader is not one of own_eval_loader."""
    examples = [*chain.from_iterable(batches)]
    if not isinstance(loader.batch_sampler, list):
        return examples
    places = chain.from_iterable(loader.batch_sampler)
    return [example for _, example in sorted(zip(places, examples, strict=True), key=lambda x: x[0])]


def sums_of(batches: Batches, dataset: Any) -> Tensor:
    """(examples, 5) sums over the tokens of each example of the dataset, from all processes: see `metrics_of`."""
    own = [torch.tensor([_sums(example) for example in batch]) for batch in batches]
    # Processes take turns. Examples that are repeated to give each as many batches come last, and are cut off.
    turns = zip(*gather_object([own]), strict=True)
    return torch.cat([*chain.from_iterable(turns)])[: len(dataset)]


def _sums(example: TokenStatistics) -> list[Tensor | int]:
    logp, personal = example.logp, example.personal
    return [len(logp), -logp.sum(), -example.logp_cf.sum(), personal.sum(), -logp[personal].sum()]


def metrics_of(sums: Tensor) -> dict[str, float]:
    """Mean loss per response token with and without the persona and of personal tokens, and mean PIR."""
    n, ce, ce_cf, n_personal, ce_personal = sums.double().sum(0).tolist()
    return {
        "loss": ce / n,  # the name that load_best_model_at_end and schedulers look for
        "loss_with_persona": ce / n,
        "loss_without_persona": ce_cf / n,
        "loss_personal_tokens": ce_personal / n_personal if n_personal else float("nan"),
        "pir_mean": (ce_cf - ce) / n,
    }
