"""Objectives: each says what the cross-entropy of a token is multiplied by, in one entry of OBJECTIVES.

    signal    a function of the token's log-probabilities with and without the persona, of the entropy before it, or of
              whether it is personal by its word
    weight    clip(signal, clip_min, clip_max), a constant: no gradient flows through it
    loss      −(1/n) Σ weight · log p(token), over the n response tokens

All code that depends on the objective reads its entry: options and their help, datasets, the trainer, the head, meters,
estimates, reports, plans, the study. docs/EXTENDING.md adds one. torch is not imported here: `--help` answers at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

PERSONAS, DOCUMENTS = "rows with a persona", "documents"


class Measured(NamedTuple):
    """Numbers of the response tokens under a model. Each is (N,) and detached, except experts and loss."""

    logp: Tensor  # log p(token), with the persona
    logp_cf: Tensor  # log p(token) without the persona; 0 if that pass was not made
    signal: Tensor  # clipped, it is the weight; 1 if every weight is 1
    token_weight: Any = None  # after the clip and the normalisation; None in estimates, which are clipped later
    entropy: Tensor | None = None  # of the prediction of the token, with the persona, in nats
    experts: Any = None  # (2, E) over all tokens, if a RouterCall asked for it: tokens sent, Σ probability
    loss: Any = None  # 0-d, if it was asked for
    top1: Any = None  # (N,) bool, whether the token is the likeliest; if it was asked for


@dataclass(frozen=True)
class Signal:
    """What the clip acts on. `of` computes it; its parameters are some of logp, logp_cf, entropy and personal, by these
    names."""

    name: str
    of: Callable[..., Tensor]
    meaning: str
    """For readers of a report, after the name and a colon. {full} and {short}: with and without the persona."""


PIR = Signal("PIR", lambda logp, logp_cf: logp - logp_cf,
             "a token's log-probability {full} minus its log-probability {short}")  # fmt: skip
RATIO = Signal("exp(PIR)", lambda logp, logp_cf: (logp - logp_cf).exp(),
               "how many times as likely a token is {full} as {short}")  # fmt: skip
CONTRASTS = {"log": PIR, "ratio": RATIO}
"""Signals that the op computes itself, chosen by its argument `contrast`. A signal that is computed before the op
takes one product more."""


@dataclass(frozen=True)
class TokenWeighting:
    """A signal and its clip. Without a signal every weight is 1."""

    signal: Signal | None
    clip_min: float
    clip_max: float

    @property
    def contrast(self) -> str | None:
        """The op's name for this signal; None if the op does not compute it."""
        return next((name for name, signal in CONTRASTS.items() if signal == self.signal), None)

    @property
    def needs(self) -> frozenset[str]:
        """The ones of logp, logp_cf, entropy and personal that the signal is computed from."""
        return frozenset(inspect.signature(self.signal.of).parameters if self.signal else ())

    @property
    def of_model(self) -> bool:
        """Whether the signal depends on the model, and not on the words alone."""
        return bool(self.needs - {"personal"})

    def signal_of(self, **known: Tensor | None) -> Tensor:
        """(N,) signals, from at least what they need, by the names of Signal.of."""
        assert self.signal, "every weight is 1"
        return self.signal.of(**{name: known[name] for name in self.needs})

    def weight(self, signal: Tensor) -> Tensor:
        """(N,) weights; without a signal they are 1, whatever the clip."""
        return signal if self.signal is None else signal.clamp(self.clip_min, self.clip_max)

    @property
    def reported(self) -> TokenWeighting:
        """The weighting that reports tint tokens by: this one, or PIR under this clip if every weight is 1. It is only
        shown: what is trained on or written to a file has the weights of the objective itself."""
        return self if self.signal else replace(self, signal=PIR)

    @property
    def signal_name(self) -> str:
        return self.signal.name if self.signal else "1"

    def __str__(self) -> str:
        return f"{self.signal_name} clipped to {self.clip_min:g} … {self.clip_max:g}" if self.signal else "1"


@dataclass(frozen=True)
class HeadCall:
    """What the head is asked to compute for the N response tokens, in one call from the objective to the op."""

    target: Tensor  # (N,) token ids
    weighting: TokenWeighting
    hidden_cf: Tensor | None = None  # (N, D) hidden states without the persona
    personal: Tensor | None = None  # (N,) bool, whether its word is personal; if the weighting needs it
    signal: Tensor | None = None  # (N,) known from an earlier pass; None: computed here
    loss: bool = True  # False: measure only
    entropy: bool = False  # measure entropies even if the signal does not need them; only without a loss
    top1: bool = False  # measure top1 and entropies, for one product more
    seq_id: Tensor | None = None  # (N,) sequence of each token, if the weights are to have mean 1 over each sequence
    num_items: Tensor | int | None = None  # argument of fused_perce_loss
    data_weight: Tensor | None = None  # (N,), multiplies the weight of each token, normalised or not


@dataclass(frozen=True)
class RouterCall:
    """A request for sums over the routers of a mixture of experts in a pass; see expert_sums in model/auxiliary.py."""

    top_k: int  # number of experts that a token is sent to
    real: Tensor | None = None  # (B, T) bool: tokens that are not padding; None: all


@dataclass(frozen=True)
class Objective:
    """One objective. `over_step` is for weights that depend on other tokens: it takes the signals of all tokens of an
    optimiser step, (N,), and the seed of the step, and returns the values that are clipped in their place."""

    name: str  # on the command line
    title: str  # in tables and pictures
    help: str  # when to use it, in one line
    signal: Signal | None  # None: every weight is 1
    clip: tuple[float, float]  # defaults of clip_min and clip_max
    takes: tuple[str, ...]  # PERSONAS, DOCUMENTS or both
    over_step: Callable[[Tensor, int], Tensor] | None = None

    @property
    def counterfactual(self) -> bool:
        """Whether the signal needs a pass without the persona."""
        return "logp_cf" in self.weighting().needs

    @property
    def fused(self) -> bool:
        """Whether the op computes the signal from both passes itself."""
        return self.weighting().contrast is not None and self.over_step is None

    @property
    def contrasts(self) -> bool:
        """Whether a step's own forward pass, in training mode, is compared with a pass without the persona."""
        return self.counterfactual and not self.over_step

    @property
    def products(self) -> int:
        """Extra products of (N, D) and (D, V), of 2·N·D·V operations each, of a step compared with cross-entropy."""
        return self.counterfactual + (self.weighting().of_model and not self.fused)

    @property
    def cost(self) -> str:
        """The name of what makes a step take longer than with cross-entropy."""
        return "counterfactual pass" if self.contrasts else "token weights"

    def weighting(
        self, contrast: str | None = None, clip_min: float | None = None, clip_max: float | None = None
    ) -> TokenWeighting:
        """The weighting of this objective, with the given contrast and clip in place of its own."""
        low, high = self.clip
        low, high = low if clip_min is None else clip_min, high if clip_max is None else clip_max
        return TokenWeighting(CONTRASTS[contrast] if contrast else self.signal, low, high)


def permuted(signal: Tensor, seed: int) -> Tensor:
    """The same values, assigned to the tokens in random order."""
    import torch

    return signal[torch.randperm(len(signal), generator=torch.Generator().manual_seed(seed))]


def _word_match(personal: Tensor) -> Tensor:
    import torch

    return torch.full_like(personal, 0.8, dtype=torch.float32).masked_fill(personal, 5.0)


def _preferred(logp: Tensor, logp_cf: Tensor) -> Tensor:
    return logp.new_full((), 0.9).where(logp.exp() - logp_cf.exp() > 0.05, 0.1)


_ENTRIES = (
    Objective("perce", "PerCE", "a token counts by how much likelier the persona makes it (arXiv 2603.06595)",
              PIR, clip=(0.8, 5.0), takes=(PERSONAS,)),
    Objective("ce", "CE", "plain cross-entropy, to compare with: every token counts the same",
              signal=None, clip=(0.8, 5.0), takes=(PERSONAS, DOCUMENTS)),
    Objective("lossce", "LossCE", "tokens with a high loss count more; a baseline of the paper, after Rho-1",
              Signal("−log p", lambda logp: -logp, "a token's own loss {full}, so that surprising tokens count more"),
              clip=(0.8, 5.0), takes=(PERSONAS, DOCUMENTS)),
    Objective("entce", "EntCE", "tokens that are predicted with high entropy count more; a baseline of the paper",
              Signal("entropy", lambda entropy: entropy,
                     "the entropy of the model's prediction before a token, {full}, in nats"),
              clip=(0.8, 5.0), takes=(PERSONAS, DOCUMENTS)),
    Objective("longce", "LongCE", "a token counts by how much likelier the long context makes it (arXiv 2410.23771)",
              RATIO, clip=(0.0, 5.0), takes=(DOCUMENTS,)),
    Objective("dft", "DFT", "likely tokens count more, so that the model stays close to what it was (arXiv 2508.05629)",
              Signal("p", lambda logp: logp.exp(), "a token's probability {full}, so that likely tokens count more"),
              clip=(0.0, 1.0), takes=(PERSONAS, DOCUMENTS)),
    Objective("nextquill", "NextQuill's weights",
              "0.9 if the persona raises p by more than 0.05, else 0.1 (arXiv 2506.02368)",
              Signal("preference (0.9 or 0.1)", _preferred,
                     "0.9 for a token whose probability is more than 0.05 higher {full} than {short}, else 0.1"),
              clip=(0.1, 0.9), takes=(PERSONAS,)),
    Objective("random", "random", "a control: PerCE's weights, permuted over the tokens of each step",
              PIR, clip=(0.8, 5.0), takes=(PERSONAS,), over_step=permuted),
    Objective("wordmatch", "WordMatch", "a control: 5 for words that the reply quotes from the persona, else 0.8",
              Signal("word match (5 or 0.8)", _word_match,
                     "5 for a token of a word that the data marks or, if it marks none, that is in the persona but not "
                     "in the conversation; else 0.8"),
              clip=(0.8, 5.0), takes=(PERSONAS,)),
)  # fmt: skip
OBJECTIVES = {objective.name: objective for objective in _ENTRIES}


def in_one_pass() -> list[str]:
    """The names of the objectives whose weights, of rows with a persona, come from the predictions of a single forward
    pass: all that the trainers of other libraries give."""

    def fits(entry: Objective) -> bool:
        return PERSONAS in entry.takes and not entry.over_step and "personal" not in entry.weighting().needs

    return [name for name, entry in OBJECTIVES.items() if fits(entry)]
