"""Per-token statistics of a batch under a model: what training weights by, evaluation averages and score shows.

counterfactual_hidden   pass 1: without the persona, no grad, eval mode
token_statistics        both passes, per example, on the CPU
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perce.data.batch import Batch, token_inputs
from perce.model.probe import evaluating

OWN_SIGNAL = {"lossce": "loss", "entce": "entropy"}
"""Objectives without a counterfactual pass, and what of the factual one their weights are clipped from."""


class FactualPass(NamedTuple):
    """What the factual pass returns: the loss, 0-d, and per response token, each (N,) and detached:"""

    loss: Tensor
    logp: Tensor
    logp_cf: Tensor
    signal: Tensor
    """What the clip acts on: PIR, its exponential, the token's loss or the predictive entropy."""
    token_weight: Tensor


@dataclass(frozen=True)
class TokenStatistics:
    """Per response token of one example, on the CPU, each (n,); and the index of the example."""

    target: Tensor
    logp: Tensor
    logp_cf: Tensor
    token_weight: Tensor
    personal: Tensor
    example: int

    @property
    def pir(self) -> Tensor:
        return self.logp - self.logp_cf


@torch.no_grad()
def counterfactual_hidden(model: nn.Module, inputs: Batch) -> Tensor:
    """(N, D) hidden states of the response tokens without the persona. Dropout is off: with it on, the PIR of identical
    prompts would not be 0."""
    with evaluating(model):
        return model(**token_inputs(inputs, "_cf"), perce={"rows": inputs["rows_cf"]})


@torch.no_grad()
def token_statistics(
    model: nn.Module, inputs: Batch, *, clip_min: float, clip_max: float, contrast: str, detach_persona: bool = False
) -> list[TokenStatistics]:
    """Statistics of one batch under a model in eval mode, whatever it is trained for."""
    call: dict[str, Any] = {
        "hidden_cf": counterfactual_hidden(model, inputs), "clip_min": clip_min, "clip_max": clip_max,
        "contrast": contrast,
    }  # fmt: skip
    done = factual(model, inputs, call, detach_persona=detach_persona)
    tokens = (inputs["target"], done.logp, done.logp_cf, done.token_weight, inputs["personal"])
    columns = per_example(inputs, *tokens)
    return [TokenStatistics(*row) for row in zip(*columns, inputs["example"].tolist(), strict=True)]


@torch.no_grad()
def token_entropies(model: nn.Module, inputs: Batch) -> list[Tensor]:
    """Predictive entropy in nats at each response token of each example, with the persona; (n,), on the CPU."""
    call = {"weight_from": "entropy", "clip_min": 0.0, "clip_max": 1e30}
    return list(per_example(inputs, factual(model, inputs, call).signal)[0])


def factual(model: nn.Module, inputs: Batch, call: dict[str, Any], *, detach_persona: bool = False) -> FactualPass:
    """Pass 2, the loss inside the forward of the head. `call`: arguments of the loss.

    detach_persona: run the prompt through the persona for its keys and values alone; see prefill.py.
    """
    names = ("rows", "target", "prefix") if detach_persona else ("rows", "target")
    return FactualPass(*model(**token_inputs(inputs), perce={name: inputs[name] for name in names} | {"loss": call}))


def per_example(inputs: Batch, *columns: Tensor) -> list[tuple[Tensor, ...]]:
    """Each (N,) column as one (n,) tensor an example, on the CPU."""
    lengths = torch.bincount(inputs["sequence"]).tolist()
    return [column.cpu().split(lengths) for column in columns]
