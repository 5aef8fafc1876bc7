"""One step of two made-up examples, made as the run will make its own, against the model's own logits.

    ours    training mode, both sequences in one batch, padded or packed, with the run's checkpointing, tiles and
            persona_grad; windows of attention, tiles and chunks of the persona shorter than the sequences
    own     the model's own forward in eval mode, one sequence at a time, and PerCE's formula on its whole logits

What is compared: log-probabilities with and without the persona, and the loss's gradient with respect to the embedded
tokens, which has come through every layer. With persona_grad="none" that of the tokens behind the persona, which is
the same: by causality nothing they compute reaches the persona's keys and values.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from perce.data.batch import Batch
from perce.errors import UserError, in_one_line
from perce.model import prefill
from perce.model.memory import checkpointed, tiles_of
from perce.model.noise import REMEDY
from perce.model.passes import counterfactual_hidden, factual
from perce.model.probe import attention_of_any_device, evaluating, unwrapped
from perce.objectives import OBJECTIVES, HeadCall

# (tokens before the persona, of it, of the query, of the response): the longer one is padded to, or packed before
SHAPES = ((4, 13, 6, 7), (3, 6, 5, 4))
SHORT = 8  # tokens of a window, a tile and a chunk of the persona meanwhile: less than a sequence, or its persona
# Of attention, and tokens that an index lets through, as configs and modules call them.
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "sliding_window_size", "index_topk")
WEIGHTING = OBJECTIVES["perce"].weighting()
# Largest difference of a log-probability, and of a gradient in parts of its norm. fp32 shows 1e-5, bf16 3e-2; what the
# check is there for is far above.
TOLERANCE, TOLERANCE_LOW_PRECISION = (1e-2, 2e-2), (0.25, 0.3)
AGREEMENT, AGREEMENT_LOW_PRECISION = 1e-4, 0.1  # of log-probabilities of the same forward, made twice


@dataclass(frozen=True)
class Manner:
    """How a run makes its steps."""

    collate: Callable[[Sequence[Mapping[str, Any]]], Batch]
    checkpointing: Mapping[str, Any] | None = None  # the arguments of torch's checkpoint; None: there is none
    detach_persona: bool = False
    tiles: bool = False

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """Of those in use, by name, what leaves it out."""
        return (
            ({"activation_checkpointing": {"checkpointing": None}} if self.checkpointing is not None else {})
            | ({"persona_grad none": {"detach_persona": False}} if self.detach_persona else {})
            | ({"mlp_tile": {"tiles": False}} if self.tiles else {})
        )


@dataclass(frozen=True)
class Step:
    """Of the response's tokens (N,), and of the embedded tokens of each sequence (T, D)."""

    logp: Tensor
    logp_cf: Tensor
    gradients: list[Tensor]


def check_step(model: Any, manner: Manner) -> None:
    """UserError unless a step made in this manner has the loss and the gradient of the model's own logits."""
    name = f"{type(unwrapped(model)).__name__} ({unwrapped(model).config.model_type})"
    pairs = made_up_pairs(model)
    with attention_of_any_device(model), _short_windows(model):
        try:
            own = _own_step(model, pairs)
            difference = _difference(own, _step(model, pairs, manner))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: the model's own code
            raise UserError(
                f"{name}: a trial step of two short sequences fails{_with(manner.options)}: {in_one_line(error)}"
            ) from error
        if difference is None:
            return
        if _is_noisy(model, pairs, manner):
            raise UserError(
                f"{name}: two forwards in training mode differ. What is random in it acts in the factual pass and not "
                f"in the counterfactual one, and would bias every PIR. {REMEDY}"
            )
        for option, without in manner.options.items():
            if _difference(own, _step(model, pairs, replace(manner, **without))) is None:
                raise UserError(
                    f"{name}: with {option}, {difference}. Without, a trial step is right: leave {option} out."
                )
        raise UserError(
            f"{name}: {difference}{_with(manner.options)}. Its training would be wrong, in a way not known here."
        )


def _with(options: Mapping[str, Any]) -> str:
    return f", with {', '.join(options)}" if options else ""


def made_up_pairs(model: Any) -> list[dict[str, Any]]:
    """Two pairs, as data.pairs makes them, of token ids from all over the vocabulary."""
    vocabulary, pairs, first = model.get_input_embeddings().weight.shape[0], [], 1
    for before, persona, query, response in SHAPES:
        length = before + persona + query + response
        pairs.append(
            {
                "input_ids": [n * 97 % vocabulary for n in range(first, first + length)],
                "persona_span": (before, before + persona), "response_length": response, "personal": [False] * response,
            }
        )  # fmt: skip
        first += length
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
        gradients = torch.autograd.grad(-(weight * with_persona).mean(), embedded)
    return Step(with_persona.detach(), without, [gradient[0] for gradient in gradients])


def _step(model: Any, pairs: Sequence[Mapping[str, Any]], manner: Manner) -> Step:
    with _as_in_training(model, manner):
        batch = _batch(model, pairs, manner)
        hidden_cf = counterfactual_hidden(model, batch)
        with _embedded(model) as embedded:
            call = HeadCall(batch["target"], WEIGHTING, hidden_cf)
            done = factual(model, batch, call, detach_persona=manner.detach_persona)
            gradients = torch.autograd.grad(done.loss, embedded)
    return Step(done.logp, done.logp_cf, _by_sequence(gradients, [len(pair["input_ids"]) - 1 for pair in pairs]))


def _by_sequence(gradients: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """Of each sequence (T, D), without padding; gradients: of each forward that embedded something."""
    first = gradients[0]
    if len(gradients) == len(lengths):  # one sequence after the other
        return [gradient[0] for gradient in gradients]
    if first.shape[:2] == (len(lengths), max(lengths)):  # padded
        return [gradient[:length] for gradient, length in zip(first, lengths, strict=True)]
    if first.shape[:2] == (1, sum(lengths)):  # packed
        return list(first[0].split(list(lengths)))
    raise ValueError(f"it embeds {len(lengths)} sequences of {max(lengths)} tokens as {tuple(first.shape)}")


def _batch(model: Any, pairs: Sequence[Mapping[str, Any]], manner: Manner) -> Batch:
    device = model.get_input_embeddings().weight.device
    batch = manner.collate(pairs)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _difference(own: Step, ours: Step) -> str | None:
    """In words, where it is larger than rounding explains."""
    low = own.gradients[0].dtype != torch.float32
    allowed_logp, allowed_gradient = TOLERANCE_LOW_PRECISION if low else TOLERANCE
    allowed_logp = max(allowed_logp, own.logp.abs().max().item() * 2**-6 if low else 0.0)
    for what, one, other in (("with", own.logp, ours.logp), ("without", own.logp_cf, ours.logp_cf)):
        if not (found := (one - other).abs().max().item()) <= allowed_logp:
            return (
                f"log-probabilities of a response {what} the persona are off by up to {found:.2g} (allowed "
                f"{allowed_logp:.2g}) from those of the model's own logits"
            )
    pairs = zip(own.gradients, ours.gradients, strict=True)
    one, other = map(torch.cat, zip(*((one[-len(other) :], other) for one, other in pairs), strict=True))
    found = ((one - other).float().norm() / one.float().norm()).item()
    if not found <= allowed_gradient:
        return (
            f"the gradient of the loss is off by {found:.0%} of its norm (allowed {allowed_gradient:.0%}) from that "
            "through the model's own logits"
        )
    return None


@torch.no_grad()
def _is_noisy(model: Any, pairs: Sequence[Mapping[str, Any]], manner: Manner) -> bool:
    with _as_in_training(model, manner):
        batch = _batch(model, pairs, manner)
        call = HeadCall(batch["target"], OBJECTIVES["ce"].weighting(), loss=False)
        one, other = (factual(model, batch, call).logp for _ in range(2))
    low = model.get_input_embeddings().weight.dtype != torch.float32
    return bool((one - other).abs().max() > (AGREEMENT_LOW_PRECISION if low else AGREEMENT))


@contextlib.contextmanager
def _as_in_training(model: nn.Module, manner: Manner) -> Iterator[None]:
    """Training mode, but for the dropout of adapters, which is allowed."""
    was_training, chunk = model.training, prefill.PREFILL_CHUNK
    dropouts = [(module, module.p) for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    try:
        with checkpointed(model, manner.checkpointing), tiles_of(model, SHORT if manner.tiles else 0):
            prefill.PREFILL_CHUNK = SHORT
            for module, _ in dropouts:
                module.p = 0.0
            model.train()
            yield
    finally:
        prefill.PREFILL_CHUNK = chunk
        for module, p in dropouts:
            module.p = p
        model.train(was_training)


@contextlib.contextmanager
def _embedded(model: Any) -> Iterator[list[Tensor]]:
    """What the input embeddings return meanwhile, where gradients are on: tensors to differentiate with respect to."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            outputs.append(output if output.requires_grad else output.requires_grad_())

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            yield outputs
    finally:
        handle.remove()


@contextlib.contextmanager
def _short_windows(model: nn.Module) -> Iterator[None]:
    """Windows of SHORT tokens, so that short sequences reach beyond them, in modules, masks and caches alike."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    before = [
        (holder, name, value)
        for holder, name in itertools.product([*model.modules(), *configs.values()], WINDOWS)
        if type(value := vars(holder).get(name)) is int and value > SHORT
    ]
    try:
        for holder, name, _ in before:
            setattr(holder, name, SHORT)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)
