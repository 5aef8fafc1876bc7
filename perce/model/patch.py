"""Extend a loaded causal language model's own forward so that it returns what PerCE needs.

`prepare_model` gives the model two extra ways to be called, always through whatever wraps it (DDP, FSDP, PEFT):

    model(input_ids, perce={"rows": rows})                   → hidden states (N, D) at those rows
    model(input_ids, perce={"rows": rows, "head": call})     → what head.py computes from them, including the loss

If perce has "trunks", personas are run by themselves; see prefill.py. If it has "router", a RouterCall, the result
includes `experts`; without "head" it is `experts` alone. See auxiliary.py.

The loss runs inside the forward of the output-embedding module. Reading the head's weight anywhere else would bypass
the hooks that gather and reduce sharded parameters, and silently yield wrong gradients.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from perce.errors import UserError, in_one_line
from perce.hub import stated
from perce.model.auxiliary import recorded
from perce.model.head import LogitTransform, answer, logit_transforms
from perce.model.noise import check_noise
from perce.model.prefill import hidden_on_trunks, spans_arguments
from perce.model.probe import PROBE_TOKENS, attention_of_any_device, decoder_of, evaluating, probe_ids, unwrapped
from perce.model.unpacked import answer_transformers, known_unpacked
from perce.objectives import HeadCall
from perce_kernels import reference

# Largest allowed difference of log-probabilities between the model's logits and ours. fp32 shows 1e-5, bf16 1e-2.
SELF_CHECK_TOLERANCE = 1e-3
SELF_CHECK_TOLERANCE_LOW_PRECISION = 0.25
# Largest allowed change of a hidden state, relative to the largest one, when other tokens follow it.
CAUSALITY_TOLERANCE = 1e-3
CAUSALITY_TOLERANCE_LOW_PRECISION = 0.1
CALLED_PAST_US = (
    "compute_loss: no forward pass computed perce's loss. A class replaces compute_loss, or calls another model than "
    "the one it is given. Call super().compute_loss there, or put PerceMixin first and your compute_loss into a class "
    "behind it, class Ours(PerceMixin, Yours), which calls model(**inputs)."
)


def prepare_model(model: Any, backend: str = "auto") -> Any:
    """Patch a model (of a PEFT model the base) and its head in place, before any parallel wrapper, unless they are
    patched already. `backend` computes its losses from now on.

    Raises:
        UserError: a model whose logits perce cannot reproduce, that has an encoder or noise in training mode, or with
            an adapter on its output embedding.
    """
    base = unwrapped(model)
    if not (hasattr(base, "perce_logit_transform") and is_patched(base)):
        check_head_unwrapped(model)
        head = base.get_output_embeddings()
        _check_head(base, head)
        if getattr(base.config, "is_encoder_decoder", False):
            raise UserError(
                f"{base.config.model_type}: PerCE needs a decoder-only causal model, and this one has an encoder."
            )
        check_noise(base)
        answer_transformers()
        _patch_model(base)
        base.perce_logit_transform = _self_check(base, head)
    base.perce_backend = backend
    patched_head(base).perce_backend = backend
    return model


def is_patched(module: Any) -> bool:
    """Whether the module's forward is perce's. A model that was pickled comes back with its own forward."""
    return hasattr(getattr(module, "forward", None), "perce")


def patched_head(model: Any) -> Any:
    """The output embedding, patched. resize_token_embeddings and set_output_embeddings replace it by a new module,
    which is patched here."""
    head = model.get_output_embeddings()
    if not is_patched(head):
        _check_head(model, head)
        _patch_head(head, model.perce_logit_transform)
        head.perce_backend = model.perce_backend
    return head


def _check_head(model: Any, head: Any) -> None:
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        kind = f" ({head.weight.dtype})" if isinstance(head, nn.Linear) else ""
        raise UserError(
            f"{type(model).__name__}: expected a floating-point linear output embedding, got {type(head).__name__}"
            f"{kind}. Quantised or custom heads are not supported."
        )


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The module's forward as a function of the module, so that a deep copy of a patched model runs its own weights."""
    own = module.forward
    return getattr(own, "__func__", lambda _, *args, **kwargs: own(*args, **kwargs))


def _patch_head(head: Any, transform: LogitTransform) -> None:
    own_forward = forward_of(head)

    @functools.wraps(own_forward)
    def forward(self, hidden: Tensor, perce: HeadCall | None = None):
        if perce is None:
            return own_forward(self, hidden)
        own = {"lm_head": self.weight, "bias": self.bias, "backend": self.perce_backend}
        if not torch.is_autocast_enabled(hidden.device.type):  # some models cast their fp32 hidden states for the head
            hidden_cf = None if perce.hidden_cf is None else perce.hidden_cf.to(self.weight.dtype)
            hidden, perce = hidden.to(self.weight.dtype), replace(perce, hidden_cf=hidden_cf)
        return answer(perce, hidden, **own, **vars(transform))

    forward.perce = True  # type: ignore[attr-defined]
    head.forward = types.MethodType(forward, head)


def _patch_model(model: Any) -> None:
    own_forward = forward_of(model)
    decoder = decoder_of(model)
    # By its name, because a deep copy has a decoder of its own.
    model.perce_decoder = next(name for name, module in model.named_modules() if module is decoder)

    @functools.wraps(own_forward)  # generate() reads the signature
    def forward(self, *args, perce: dict[str, Any] | None = None, **kwargs):
        if perce is None:
            if "rows_cf" in kwargs:  # a batch of both passes, which the model's own loss would fail on, or pass over
                raise UserError(CALLED_PAST_US)
            return own_forward(self, *args, **kwargs)
        decoder = self.get_submodule(self.perce_decoder)
        if "spans" in kwargs:
            kwargs |= spans_arguments(kwargs["spans"], kwargs["position_ids"])
        if router := perce.get("router"):
            kwargs |= {"output_router_logits": True, "return_dict": True}
        with recorded(decoder, router) as sums, known_unpacked(_is_unpacked(self, perce, args, kwargs)):
            if "trunks" in perce:
                hidden = hidden_on_trunks(decoder, perce["rows"], perce["trunks"], *args, **kwargs)
            else:
                # use_cache=False: a cache would keep every layer's keys and values alive through the backward.
                output = decoder(*args, use_cache=False, **kwargs)
                hidden = output[0].flatten(0, 1)[perce["rows"]]
        experts = torch.stack(sums).sum(0) if sums else None
        if "head" not in perce:
            return experts if router else hidden
        found = patched_head(self)(hidden, perce=perce["head"])
        return found._replace(experts=experts) if router else found

    forward.perce = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def _is_unpacked(model: Any, perce: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether attention need not look for packed sequences. With positions of its own a row may be packed, but segments
    have theirs because they are parts of a sequence, and flash attention is told where packed sequences begin."""
    if "spans" in kwargs or "trunks" in perce:
        return True
    if "cu_seq_lens_q" in kwargs:
        return str(model.config.get_text_config()._attn_implementation).startswith("flash")
    return "position_ids" not in kwargs and len(args) < 3  # which may be the third argument


@torch.no_grad()
def _self_check(model: Any, head: Any) -> LogitTransform:
    """How the model makes logits from hidden states and head, found from its own logits of a few tokens. UserError if
    no known transform reproduces them, or if tokens see later ones."""
    ids = probe_ids(model).to(head.weight.device)
    rows = torch.arange(PROBE_TOKENS, device=ids.device)
    name = f"{type(model).__name__} ({model.config.model_type})"
    with evaluating(model), attention_of_any_device(model):
        try:
            own = model(input_ids=ids, use_cache=False).logits[0].double()
            hidden = model(input_ids=ids, perce={"rows": rows})
        except Exception as error:  # the model's own code may raise anything
            raise UserError(f"{name}: its forward fails on a few tokens: {in_one_line(error)}") from error
        if own.isnan().any():
            raise UserError(
                f"{name}: its logits on a few tokens are NaN. Expected undamaged weights, and a precision with enough "
                "range for them (--precision fp32)."
            )
        _check_causal(model, name, ids, hidden)
    if own.shape[-1] != len(head.weight):
        raise UserError(
            f"{name}: expected one logit per row of its output embedding ({len(head.weight)}), got {own.shape[-1]}."
        )
    low = head.weight.dtype in (torch.bfloat16, torch.float16)
    exact = torch.float32 if low else torch.float64
    bias = None if head.bias is None else head.bias.to(exact)

    def difference(transform: LogitTransform) -> float:
        ours = reference.logits(hidden.to(exact), head.weight.to(exact), bias, **vars(transform)).double()
        return (own.log_softmax(-1) - ours.log_softmax(-1)).abs().max().nan_to_num(torch.inf).item()

    readings = {transform: difference(transform) for transform in logit_transforms(model.config)}
    # The likeliest of those that are about as close as the closest: rounding must not decide, as between a high cap
    # and none.
    transform = next(reading for reading, found in readings.items() if found <= 2 * min(readings.values()))
    tolerance = SELF_CHECK_TOLERANCE
    if low:  # the model's own logits are rounded to 8 bits, so large ones are off by 2 ** -8 of their size
        tolerance = max(SELF_CHECK_TOLERANCE_LOW_PRECISION, own.abs().max().item() * 2**-6)
    if not (found := readings[transform]) <= tolerance:
        raise UserError(
            f"{name}: its log-probabilities differ from those computed from its hidden states and head by up to "
            f"{found:.3g} (allowed {tolerance:g}), with softcap={transform.softcap}, logit_scale="
            f"{transform.logit_scale:g}. The architecture does something between the two that perce does not know, so "
            "training it would be wrong."
        )
    return transform


def _check_causal(model: Any, name: str, ids: Tensor, hidden: Tensor) -> None:
    """UserError if a token's hidden states depend on a later token, for example on padding."""
    seen = PROBE_TOKENS // 2
    pad = stated(model.config.get_text_config(), "pad_token_id")
    pad = pad if pad in range(len(model.get_input_embeddings().weight)) else 0  # some configs say −1
    others = {"other tokens": ids.flip(1)[:, :seen], "padding": torch.full_like(ids[:, :seen], pad)}
    batch = torch.cat([torch.cat([ids[:, :seen], rest], dim=1) for rest in others.values()])
    rows = torch.arange(seen, device=ids.device)
    allowed = CAUSALITY_TOLERANCE if hidden.dtype == torch.float32 else CAUSALITY_TOLERANCE_LOW_PRECISION
    for place, what in enumerate(others):
        found = model(input_ids=batch, perce={"rows": rows + place * PROBE_TOKENS})
        change = (found - hidden[:seen]).abs().max() / hidden.abs().max()
        if not change <= allowed:
            raise UserError(
                f"{name}: hidden states of the first {seen} tokens change by {change:.2g} of the largest when {what} "
                "follow them. PerCE needs a causal model, whose tokens see only earlier ones. Some architectures are "
                "causal only if their config says so (is_decoder)."
            )


def check_head_unwrapped(model: Any) -> None:
    """UserError when PEFT put an adapter on the output embedding: the loss would ignore it."""
    head = unwrapped(model).get_output_embeddings()
    if hasattr(head, "base_layer") or hasattr(head, "original_module"):  # the latter of modules_to_save, for example
        raise UserError(
            "peft_config: an adapter is on the output embedding, and the fused loss reads only the embedding. Leave "
            "lm_head (and, with tied embeddings, embed_tokens) out of target_modules and modules_to_save."
        )
