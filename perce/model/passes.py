"""Per-token statistics of a batch under a model: training weights by them, evaluation averages them, score shows them.

counterfactual_hidden   pass 1: without the persona, no grad, eval mode
factual                 pass 2: the loss, inside the forward of the head
experts_used            pass 2 without the head: tokens sent to each expert, no grad, eval mode
measured                both passes, no grad: log-probabilities and entropies
token_statistics        the same per example, on the CPU, with the weights of an objective
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perce.data.batch import Batch, token_inputs
from perce.model.probe import evaluating
from perce.objectives import HeadCall, Measured, RouterCall, TokenWeighting


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of the response tokens of one example, each (n,) and on the CPU, and the index of the example."""

    target: Tensor
    logp: Tensor
    logp_cf: Tensor
    signal: Tensor  # clipped, it is the weight
    token_weight: Tensor
    personal: Tensor
    example: int
    entropy: Tensor | None = None  # if it was asked for, or is the signal

    @property
    def pir(self) -> Tensor:
        return self.logp - self.logp_cf


@torch.no_grad()
def counterfactual_hidden(model: nn.Module, inputs: Batch) -> Tensor:
    """(N, D) hidden states of the response tokens without the persona. Dropout is off: with it on, the PIR of identical
    prompts would not be 0."""
    with evaluating(model):
        hidden: Tensor = model(**token_inputs(inputs, "_cf"), perce={"rows": inputs["rows_cf"]})
    return hidden


def factual(model: nn.Module, inputs: Batch, call: HeadCall, *, top_k: int = 0) -> Measured:
    """Run the factual pass, and compute in the head what `call` asks for. top_k: experts per token, if the sums per
    expert are wanted too."""
    return Measured(*model(**token_inputs(inputs), perce=_factual_call(inputs, top_k) | {"head": call}))


@torch.no_grad()
def experts_used(model: nn.Module, inputs: Batch, top_k: int) -> Tensor:
    """(E,) numbers of tokens of the factual pass that are sent to each expert, over all layers."""
    with evaluating(model):
        return model(**token_inputs(inputs), perce=_factual_call(inputs, top_k))[0]


def _factual_call(inputs: Batch, top_k: int) -> dict[str, Any]:
    call: dict[str, Any] = {name: inputs[name] for name in ("rows", "trunks") if name in inputs}
    if top_k:  # on trunks each sequence runs by itself, without padding; see training/shared.py
        call["router"] = RouterCall(top_k, None if "trunks" in inputs else inputs["uses"])
    return call


@torch.no_grad()
def measured(
    model: nn.Module, inputs: Batch, weighting: TokenWeighting, *, counterfactual: bool = True, entropy: bool = False
) -> Measured:  # fmt: skip
    """Statistics of the response tokens under a model as it is; also without the persona if `counterfactual`."""
    hidden_cf = counterfactual_hidden(model, inputs) if counterfactual else None
    call = HeadCall(inputs["target"], weighting, hidden_cf, inputs.get("personal"), loss=False, entropy=entropy)
    return factual(model, inputs, call)


def token_statistics(
    model: nn.Module, inputs: Batch, weighting: TokenWeighting, *, entropy: bool = False
) -> list[TokenStatistics]:  # fmt: skip
    """Statistics of one batch under a model in eval mode, whatever objective it is trained with."""
    found = measured(model, inputs, weighting, entropy=entropy)
    columns = {name: inputs[name] for name in ("target", "personal")}
    columns |= {name: column for name, column in found._asdict().items() if column is not None}
    split = per_example(inputs, *columns.values())
    return [
        TokenStatistics(**dict(zip(columns, tensors, strict=True)), example=example)
        for *tensors, example in zip(*split, inputs["example"].tolist(), strict=True)
    ]


def per_example(inputs: Batch, *columns: Tensor) -> list[tuple[Tensor, ...]]:
    """Each (N,) column split into one (n,) tensor per example, on the CPU."""
    lengths = torch.bincount(inputs["sequence"]).tolist()
    return [column.cpu().split(lengths) for column in columns]
