"""Per-token statistics of a batch under a model: what training weights by, evaluation averages and score shows.

counterfactual_hidden   pass 1: without the persona, no grad, eval mode
factual                 pass 2: the loss, inside the forward of the head
measured                both, no grad: log-probabilities and entropies
token_statistics        the same per example, on the CPU, with the weights of an objective
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perce.data.batch import Batch, token_inputs
from perce.model.head import FactualPass
from perce.model.probe import evaluating
from perce.objectives import HeadCall, Measured, StatisticsCall, TokenWeighting


@dataclass(frozen=True)
class TokenStatistics:
    """Per response token of one example, on the CPU, each (n,); and the index of the example."""

    target: Tensor
    logp: Tensor
    logp_cf: Tensor
    signal: Tensor
    """What the weight was clipped from."""
    token_weight: Tensor
    personal: Tensor
    example: int
    entropy: Tensor | None = None
    """Where it was asked for."""

    @property
    def pir(self) -> Tensor:
        return self.logp - self.logp_cf


@torch.no_grad()
def counterfactual_hidden(model: nn.Module, inputs: Batch) -> Tensor:
    """(N, D) hidden states of the response tokens without the persona. Dropout is off: with it on, the PIR of identical
    prompts would not be 0."""
    with evaluating(model):
        return model(**token_inputs(inputs, "_cf"), perce={"rows": inputs["rows_cf"]})


def factual(model: nn.Module, inputs: Batch, call: HeadCall, *, detach_persona: bool = False) -> FactualPass:
    """The factual pass with its loss.

    detach_persona: run the prompt through the persona for its keys and values alone; see prefill.py.
    """
    return FactualPass(*_asked(model, inputs, call, detach_persona))


@torch.no_grad()
def measured(
    model: nn.Module, inputs: Batch, *, counterfactual: bool = True, entropy: bool = False, detach_persona: bool = False
) -> Measured:
    """What the response tokens have under a model as it is; without the persona too if `counterfactual`."""
    hidden_cf = counterfactual_hidden(model, inputs) if counterfactual else None
    return Measured(*_asked(model, inputs, StatisticsCall(inputs["target"], hidden_cf, entropy), detach_persona))


def token_statistics(
    model: nn.Module, inputs: Batch, weighting: TokenWeighting, *, entropy: bool = False, detach_persona: bool = False
) -> list[TokenStatistics]:
    """Statistics of one batch under a model in eval mode, whatever it is trained for."""
    entropy = entropy or weighting.needs("entropy")
    found = measured(model, inputs, entropy=entropy, detach_persona=detach_persona)
    signal = weighting.signal_of(found)
    columns = {"target": inputs["target"], "signal": signal, "token_weight": weighting.weight(signal)}
    columns |= {"personal": inputs["personal"]} | {k: v for k, v in found._asdict().items() if v is not None}
    split = per_example(inputs, *columns.values())
    return [
        TokenStatistics(**dict(zip(columns, tensors, strict=True)), example=example)
        for *tensors, example in zip(*split, inputs["example"].tolist(), strict=True)
    ]


def _asked(model: nn.Module, inputs: Batch, call: HeadCall | StatisticsCall, detach_persona: bool) -> tuple:
    names = ("rows", "prefix") if detach_persona else ("rows",)
    return model(**token_inputs(inputs), perce={name: inputs[name] for name in names} | {"head": call})


def per_example(inputs: Batch, *columns: Tensor) -> list[tuple[Tensor, ...]]:
    """Each (N,) column as one (n,) tensor an example, on the CPU."""
    lengths = torch.bincount(inputs["sequence"]).tolist()
    return [column.cpu().split(lengths) for column in columns]
