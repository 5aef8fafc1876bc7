"""One training step on made-up examples, made as the run will make its steps, is compared with the model's own logits.

    ours    training mode, all sequences in one batch, padded, packed or shared, with the run's checkpointing, tiles and
            persona_grad; windows of attention, tiles and chunks of the persona shorter than the sequences
    own     the model's own forward in eval mode, one sequence at a time, and PerCE's formula on its whole logits

Compared are log-probabilities with and without the persona, and the loss's gradient with respect to the embedding of
each token id, which has come through every layer. Ids differ except where sequences share tokens. With
persona_grad="none" only the tokens behind the persona are compared. Their gradient is the same as without that option,
because by causality nothing that they compute reaches the persona's keys and values.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from perce.data.batch import Batch
from perce.data.sharing import UnitKind
from perce.errors import UserError, in_one_line
from perce.model import prefill
from perce.model.memory import checkpointed, tiles_of
from perce.model.noise import REMEDY, without_adapter_noise
from perce.model.passes import counterfactual_hidden, factual
from perce.model.probe import (
    attention_of_any_device,
    evaluating,
    in_mode,
    unwrapped,
    vocabulary_of,
    windows_of,
    with_attributes,
)
from perce.objectives import OBJECTIVES, HeadCall

# (tokens before the persona, of it, of the query, of the response). The shorter one is padded, or packed second.
SHAPES = ((4, 13, 6, 7), (3, 6, 5, 4))
GOES_ON = 9, 5  # tokens of a second query and reply in the first one's conversation: the two are a chain
REQUEST = 3, 5  # tokens of another query and reply under the first persona
THOUGHT = 3  # tokens that precede the second reply when it is given once more: a branch
SHORT = 8  # tokens of a window, a tile and a chunk of the persona in a trial: fewer than a sequence or its persona has
DRAWS_AMONG_TIES = ("phimoe",)  # SparseMixer: draws too seldom to be noticed on few tokens of few layers
SHARED = "share conversations"
WEIGHTING = OBJECTIVES["perce"].weighting()
# Largest allowed difference of log-probabilities (root mean square over the tokens), and of a gradient (relative to its
# norm). Both are 1e-5 in fp32, and 0.03 in bf16 with 30 layers; if a persona is lost, both are 1.
TOLERANCE, TOLERANCE_LOW_PRECISION = (2e-3, 1e-2), (0.25, 0.25)
AGREEMENT, AGREEMENT_LOW_PRECISION = 1e-4, 0.1  # between log-probabilities of the same forward pass, run twice


@dataclass(frozen=True)
class Manner:
    """How a run makes its steps."""

    collate: Callable[..., Batch]
    checkpointing: Mapping[str, Any] | None = None  # the arguments of torch's checkpoint; None: no checkpointing
    tiles: bool = False
    of_batches: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options in use that decide how a batch is made, each with the arguments of `collate` that leave it out."""
    unit: UnitKind | None = None  # the unit whose tokens are shared; None: nothing is shared

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """The names of the options in use, each with the changed fields that leave it out."""
        return (
            ({"activation_checkpointing": {"checkpointing": None}} if self.checkpointing is not None else {})
            | ({"mlp_tile": {"tiles": False}} if self.tiles else {})
            | {option: {"collate": partial(self.collate, **without)} for option, without in self.of_batches.items()}
        )


@dataclass(frozen=True)
class Step:
    """Log-probabilities of the response tokens (N,), and a gradient (D,) for each embedded token id."""

    logp: Tensor
    logp_cf: Tensor
    gradients: dict[int, Tensor]


def check_step(model: Any, manner: Manner) -> None:
    """UserError unless a step made in this manner has the log-probabilities and the gradient that the model's own
    logits give."""
    name = f"{type(unwrapped(model)).__name__} ({unwrapped(model).config.model_type})"
    pairs, low = made_up_pairs(model, manner.unit), _in_low_precision(model)
    if low and unwrapped(model).config.model_type in DRAWS_AMONG_TIES:
        raise UserError(
            f"{name}: in training mode its routers draw among experts whose scores tie, and scores rounded to 16 bits "
            "do tie. That would be noise in the factual pass only. Use --precision fp32."
        )
    with attention_of_any_device(model), windows_of(model, SHORT):
        try:
            own = _own_step(model, pairs)
            difference = _difference(own, _step(model, pairs, manner), low)
            noisy = _is_noisy(model, pairs, manner, low)
            alone = difference and next(
                (
                    option for option, without in manner.options.items()
                    if _difference(own, _step(model, pairs, replace(manner, **without)), low) is None
                ), None,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the model's own code may raise anything
            raise UserError(
                f"{name}: a trial step of a few short sequences fails{_with(manner.options)}: {in_one_line(error)}"
            ) from error
    if noisy:
        raise UserError(
            f"{name}: two forward passes in training mode differ. Its randomness would act in the factual pass and not "
            f"in the counterfactual one, and bias every PIR. {REMEDY}"
        )
    if alone:
        remedy = "use --share none" if alone == SHARED else f"leave {alone} out"
        raise UserError(f"{name}: with {alone}, {difference}. Without it, a trial step is right: {remedy}.")
    if difference:
        raise UserError(
            f"{name}: {difference}{_with(manner.options)}. Its training would be wrong, for a reason unknown to perce."
        )


def _in_low_precision(model: nn.Module) -> bool:
    """Whether its matrix products have fewer bits than fp32: 16-bit or quantised weights, autocast, TF32."""
    device = next(model.parameters()).device.type
    exact = all(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters())
    tf32 = device == "cuda" and torch.backends.cuda.matmul.fp32_precision not in ("ieee", "none")
    return not exact or torch.is_autocast_enabled(device) or tf32


def _with(options: Mapping[str, Any]) -> str:
    return f", with {', '.join(options)}" if options else ""


def made_up_pairs(model: Any, unit: UnitKind | None) -> list[dict[str, Any]]:
    """Pairs, as data.pairs makes them, of token ids from all over the vocabulary. Two have different lengths. If the
    pairs of a unit share tokens, two more are a chain and a branch of the first; if the unit is a persona, one more is
    another request under it."""
    vocabulary = vocabulary_of(model)
    drawn = (n * 97 % vocabulary for n in itertools.count(1))

    def tokens(count: int) -> list[int]:
        return list(itertools.islice(drawn, count))

    def pair(ids: list[int], before: int, persona: int, response: int, conversation: int) -> dict[str, Any]:
        return {
            "input_ids": ids, "persona_span": (before, before + persona), "response_length": response,
            "personal": [False] * response, "conversation": conversation, "persona": ids[before],
        }  # fmt: skip

    pairs = []
    for number, (before, persona, query, response) in enumerate(SHAPES):
        ids = tokens(before + persona + query + response)
        pairs.append(pair(ids, before, persona, response, number))
    if unit is None:
        return pairs
    (before, persona, *_), first, (query, response) = SHAPES[0], pairs[0]["input_ids"], GOES_ON
    prompt, reply = first + tokens(query), tokens(response)
    pairs.append(pair(prompt + reply, before, persona, response, 0))
    pairs.append(pair(prompt + tokens(THOUGHT) + reply, before, persona, THOUGHT + response, 0))
    if unit == "persona":
        pairs.append(pair(first[: before + persona] + tokens(sum(REQUEST)), before, persona, REQUEST[1], len(SHAPES)))
    return pairs


def _own_step(model: Any, pairs: Sequence[Mapping[str, Any]]) -> Step:
    device, found = model.get_input_embeddings().weight.device, []

    def logp(ids: Sequence[int], n: int) -> Tensor:
        tokens = torch.tensor([ids], device=device)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[0, -n:]
        return logits.float().log_softmax(-1).gather(1, tokens[0, -n:, None])[:, 0]

    with evaluating(model), tiles_of(model, 0), _embedded(model) as embedded:
        for pair in pairs:
            ids, n, (start, end) = pair["input_ids"], pair["response_length"], pair["persona_span"]
            with torch.no_grad():
                without = logp([*ids[:start], *ids[end:]], n)
            found.append((logp(ids, n), without))
        with_persona, without = map(torch.cat, zip(*found, strict=True))
        weight = WEIGHTING.weight((with_persona - without).detach())
        gradients = _by_id(-(weight * with_persona).mean(), embedded)
    return Step(with_persona.detach(), without, gradients)


def _step(model: Any, pairs: Sequence[Mapping[str, Any]], manner: Manner) -> Step:
    with _as_in_training(model, manner):
        batch = send_to_device(manner.collate(pairs), model.get_input_embeddings().weight.device)
        hidden_cf = counterfactual_hidden(model, batch)
        with _embedded(model) as embedded:
            call = HeadCall(batch["target"], WEIGHTING, hidden_cf)
            done = factual(model, batch, call)
            gradients = _by_id(done.loss, embedded)
    return Step(done.logp, done.logp_cf, gradients)


def _by_id(loss: Tensor, embedded: Sequence[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """The gradient with respect to the embedding of each token id, summed over the tokens that have this id."""
    ids, outputs = zip(*embedded, strict=True)
    gradients = [gradient.flatten(0, -2) for gradient in torch.autograd.grad(loss, outputs)]
    known, place = torch.cat([x.flatten() for x in ids]).unique(return_inverse=True)
    summed = torch.zeros(len(known), gradients[0].shape[-1], dtype=gradients[0].dtype, device=place.device)
    return dict(zip(known.tolist(), summed.index_add(0, place, torch.cat(gradients)), strict=True))


def _difference(own: Step, ours: Step, low: bool) -> str | None:
    """The difference in words, if it is larger than rounding explains."""
    allowed_logp, allowed_gradient = TOLERANCE_LOW_PRECISION if low else TOLERANCE
    for what, one, other in (("with", own.logp, ours.logp), ("without", own.logp_cf, ours.logp_cf)):
        if not (found := (one - other).square().mean().sqrt().item()) <= allowed_logp:
            return (
                f"log-probabilities of a response {what} the persona are off by {found:.2g} (allowed {allowed_logp:g}) "
                "from those of the model's own logits"
            )
    both = sorted(own.gradients.keys() & ours.gradients)  # only ours has padding, only own a detached persona
    one, other = (torch.stack([gradients[token] for token in both]) for gradients in (own.gradients, ours.gradients))
    found = ((one - other).float().norm() / one.float().norm()).item()
    if not found <= allowed_gradient:
        return (
            f"the gradient of the loss is off by {found:.0%} of its norm (allowed {allowed_gradient:.0%}) from that "
            "through the model's own logits"
        )
    return None


@torch.no_grad()
def _is_noisy(model: Any, pairs: Sequence[Mapping[str, Any]], manner: Manner, low: bool) -> bool:
    with _as_in_training(model, manner):
        batch = send_to_device(manner.collate(pairs), model.get_input_embeddings().weight.device)
        call = HeadCall(batch["target"], OBJECTIVES["ce"].weighting(), loss=False)
        one, other = (factual(model, batch, call).logp for _ in range(2))
    return bool((one - other).abs().max() > (AGREEMENT_LOW_PRECISION if low else AGREEMENT))


@contextlib.contextmanager
def _as_in_training(model: nn.Module, manner: Manner) -> Iterator[None]:
    """Training mode, except that adapters, which may have dropout, have none."""
    with (
        in_mode(model, training=True),
        without_adapter_noise(model),
        checkpointed(model, manner.checkpointing),
        tiles_of(model, SHORT if manner.tiles else 0),
        with_attributes([(prefill, "PREFILL_CHUNK", SHORT)]),
    ):
        yield


@contextlib.contextmanager
def _embedded(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The token ids that the input embeddings are given inside the context, and the tensors that they return, with
    respect to which to differentiate. Calls without gradients are left out."""
    outputs: list[tuple[Tensor, Tensor]] = []

    def keep(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        outputs.append((args[0], output.detach().requires_grad_()))
        return outputs[-1][1].clone()  # the model may change the clone in place

    with model.get_input_embeddings().register_forward_hook(keep), torch.enable_grad():
        yield outputs
