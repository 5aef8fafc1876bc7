"""Losses that a model's own forward adds to the cross-entropy.

    load balancing   E · Σ_e f_e · P_e of mixtures of experts: added here too, over a whole step (training/balancing.py)
    any other        for example a z-loss: refused, because perce would silently leave it out

Over all tokens except padding, in all layers with a router, f_e counts the tokens that have expert e among their top_k,
and P_e sums the probability of e. Both are divided by (tokens · layers), as in load_balancing_loss_func of
transformers. f_e has no gradient.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from perce.errors import UserError, in_one_line
from perce.model.probe import PROBE_TOKENS, attention_of_any_device, evaluating, probe_ids, unwrapped
from perce.objectives import RouterCall

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # names that models give the load-balancing coefficient
# Largest allowed difference from a model's own loss, relative to that loss.
TOLERANCE = 1e-5
TOLERANCE_LOW_PRECISION = 0.1
OFF = "Use --router_aux_loss_coef 0 to train without it."


@dataclass(frozen=True)
class Router:
    """How the load-balancing loss of a model is added."""

    top_k: int  # experts per token
    coefficient: float


def router_of(model: Any, coefficient: float | None) -> Router | None:
    """The router to balance, with this coefficient or, if it is None, as the model's config asks. None: no router.

    Raises:
        UserError: a coefficient is given for a model whose own forward has no load-balancing loss, or the model's
            load-balancing loss has another formula.
    """
    base = unwrapped(model)
    asks = [getattr(config, "output_router_logits", None) for config in (base.config, base.config.get_text_config())]
    if coefficient == 0 or (coefficient is None and not any(asks)):
        return None
    top_k = _of(base, "num_experts_per_tok") or 1  # if the model has another name for it, _is_balanced finds 1 wrong
    if asks == [None, None] or not _is_balanced(base, top_k):
        if coefficient is None:  # its own forward adds nothing either
            return None
        raise UserError(
            f"router_aux_loss_coef: {type(base).__name__} ({base.config.model_type}) has no router whose load its "
            "forward in transformers balances. Leave the option out."
        )
    coefficient = _of(base, *COEFFICIENTS) if coefficient is None else coefficient
    return Router(top_k, coefficient) if coefficient else None


@torch.no_grad()
def _is_balanced(model: Any, top_k: int) -> bool:
    """Whether the model's own forward has a load-balancing loss; UserError unless ours equals it on a few tokens."""
    ids, own = probe_ids(model), None
    call = {"rows": torch.arange(PROBE_TOKENS, device=ids.device), "router": RouterCall(top_k)}
    with evaluating(model), attention_of_any_device(model):
        experts = model(input_ids=ids, perce=call)
        with suppress(IndexError):  # transformers raises it if all layers are dense
            own = getattr(model(input_ids=ids, output_router_logits=True, use_cache=False), "aux_loss", None)
    if not isinstance(own, Tensor):
        return False
    ours = own.new_tensor(torch.nan) if experts is None else load_balance(experts[1], experts[0], top_k)
    tolerance = TOLERANCE if next(model.parameters()).dtype.itemsize > 2 else TOLERANCE_LOW_PRECISION
    if not abs(ours - own) <= tolerance * own:
        raise UserError(
            f"router_aux_loss_coef: {type(model).__name__} ({model.config.model_type}) has a load-balancing loss of "
            f"another formula than perce's: {own.item():.6g} on a few tokens, not {ours.item():.6g}. {OFF}"
        )
    return True


def load_balance(probabilities: Tensor, counts: Tensor, top_k: int) -> Tensor:
    """E · Σ_e f_e · P_e, or the share of it that one forward pass contributes.

    probabilities: (E,) sums over the tokens and layers of the pass. counts: (E,) of the whole step. For example, two
    tokens in one layer, both sent to the first of two experts with probabilities 0.9 and 0.7, give counts (2, 0),
    probabilities (1.6, 0.4), and 2 · (1 · 0.8 + 0 · 0.2) = 1.6.
    """
    rows = counts.sum() / top_k  # tokens · layers
    return len(counts) * (counts / rows * probabilities / rows).sum()


def expert_sums(router_logits: Sequence[Tensor], call: RouterCall) -> Tensor:
    """(2, E): for each expert, the number of tokens sent to it and the sum of its probability, over one forward pass.

    router_logits: (rows, E) per layer, in order; with --mlp_tile, per tile of each layer, from left to right.
    """
    sums, place = [], 0
    dtype, device = torch.promote_types(router_logits[0].dtype, torch.float32), router_logits[0].device
    for logits in router_logits:
        probability = logits.to(device, dtype).softmax(-1)
        sent = torch.zeros_like(probability).scatter_(1, probability.detach().topk(call.top_k).indices, 1.0)
        if call.real is not None:
            sequences, tokens = call.real.shape
            width = len(logits) // sequences
            real = call.real[:, place : place + width].reshape(-1, 1)
            sent, probability = sent * real, probability * real
            place = (place + width) % tokens
        sums.append(torch.stack([sent.sum(0), probability.sum(0)]))
    return torch.stack(sums).sum(0)


@contextmanager
def recorded(decoder: nn.Module, call: RouterCall | None) -> Iterator[list[Tensor]]:
    """Collects the expert_sums of each forward pass of the decoder; none without a call, or without a router."""
    sums: list[Tensor] = []

    def add(_module: nn.Module, _args: Any, output: Any) -> None:
        if logits := getattr(output, "router_logits", None):
            sums.append(expert_sums(logits, call))  # type: ignore[arg-type]

    with decoder.register_forward_hook(add) if call else nullcontext():
        yield sums


@torch.no_grad()
def check_own_loss(model: Any) -> None:
    """UserError for a model whose own loss has a part that perce would leave out: a z-loss, or a difference from the
    cross-entropy on a few tokens.

    The cross-entropy is taken of shifted labels and of unshifted ones, because the decoders of some encoder-decoder
    models leave the shift to their caller.
    """
    model, ids = unwrapped(model), probe_ids(model)
    target = ids % len(model.get_output_embeddings().weight)  # some embed more tokens than they predict
    with evaluating(model), attention_of_any_device(model):
        try:
            own = model(input_ids=ids, labels=target, use_cache=False)
        except Exception as error:  # the model's own code may raise anything
            raise UserError(
                f"{type(model).__name__} ({model.config.model_type}): its own loss on a few tokens, which may have "
                f"parts besides the cross-entropy, fails: {in_one_line(error)}"
            ) from error
    if getattr(own, "loss", None) is None:
        return
    logits = own.logits[0].to(torch.promote_types(own.logits.dtype, torch.float32))
    target, rest = target[0].to(logits.device), own.loss
    plain = torch.stack([cross_entropy(logits[:-1], target[1:]), cross_entropy(logits, target)])
    if isinstance(balance := getattr(own, "aux_loss", None), Tensor):
        rest = rest - (_of(model, *COEFFICIENTS) or 0.0) * balance
    tolerance = TOLERANCE if own.loss.dtype.itemsize > 2 else TOLERANCE_LOW_PRECISION
    known = (rest - plain).abs().min() <= tolerance * max(1.0, own.loss.abs().item())
    z_losses = [f"{name}={value:g}" for name, value in vars(model).items() if "z_loss" in name and value]
    if known and not z_losses:
        return
    raise UserError(
        f"{type(model).__name__} ({model.config.model_type}): its own loss on a few tokens is {own.loss.item():.8g}, "
        f"and their cross-entropy is {plain[0].item():.8g}. perce would leave out what the model adds: "
        f"{', '.join(z_losses) or 'a term that perce does not know'}. Set its coefficient to 0 in config.json, and "
        "load the model again."
    )


def _of(model: Any, *names: str) -> Any:
    """The first of these attributes that the model itself has set, or else its config; None if neither has one."""
    holders = (model, model.config.get_text_config())
    found = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in found if value is not None), None)
