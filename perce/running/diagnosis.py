"""What the numbers of a run mean: a few sentences, each with its number and what to do about it.

Numbers that are as they should be are not mentioned. Everything is read from what a resumed run has too: the log, the
evaluations before and after, the token pairs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import Trainer

from perce.config.schema import LossConfig
from perce.data.splits import RunPairs
from perce.measuring.metrics import FEW
from perce.training.best import FOLLOW_THE_METRIC

AT_FLOOR = 0.995  # share of the tokens that counts as all of them
NOISE = 0.01  # share of a loss by which evaluations of equally good models may differ
DROPPED = 0.5  # share of the persona entries
LOOK_AT_PERSONA = (
    "Is the persona in another column (--columns persona=NAME), was what matters dropped to fit --max_length, or is "
    "the model too small to use it (--model)? report.html shows it reply by reply."
)
LOOK_AT_CONTEXT = "Are the documents longer than --short_context, and does the model use such lengths?"


@dataclass(frozen=True)
class Outcome:
    """What is known of a run at its end."""

    log: Sequence[Mapping[str, Any]]
    loss: LossConfig
    before: Mapping[str, float]
    """Numbers of the evaluation before training by their names in the log; empty if there was none."""
    after: Mapping[str, float]
    documents: bool
    unit: str
    """What the validation is counted in: "users", or "rows" if no users are named."""
    units: int
    keeps_best: bool
    """Whether the run itself saves its best weights."""
    warmup: int
    """Steps in which the learning rate rises."""
    steps: int
    entries: int
    """Persona entries in the training prompts; `dropped`: those dropped to fit max_length. Both are 0 for a stream."""
    dropped: int
    max_length: int
    cut: bool = False
    """Whether the data has more validation examples."""
    marked: bool = False
    """Whether the data itself marks personal spans in any of the validation's examples."""


def outcome_of(trainer: Any, pairs: RunPairs, before: Mapping[str, float], after: Mapping[str, float]) -> Outcome:
    """The outcome of a run of `python -m perce.train`."""
    evaluated = [pairs.examples[index] for index in set(pairs.validation["example"])]
    named = any(example.user_id for example in evaluated)
    names, train = ["passages", "dropped_passages"], pairs.train
    columns = dict.fromkeys(names, ())
    if isinstance(train, Dataset) and {*names} <= {*train.column_names}:
        columns = train.select_columns(names)[:]
    args, state = trainer.args, trainer.state
    return Outcome(
        state.log_history, args.loss, before, after, documents=pairs.format == "text",
        unit="users" if named else "rows", units=len({example.user_id or example.source for example in evaluated}),
        keeps_best=args.load_best_model_at_end, warmup=_warmup(trainer), steps=state.global_step,
        entries=sum(map(len, columns["passages"])), dropped=sum(columns["dropped_passages"]),
        max_length=args.data.max_length, cut=pairs.uncut is not None,
        marked=any(getattr(example, "personal_spans", None) is not None for example in evaluated),
    )  # fmt: skip


def _warmup(trainer: Trainer) -> int:
    args = trainer.args
    has_none = args.lr_scheduler_type in ("constant", *FOLLOW_THE_METRIC)
    return 0 if has_none else args.get_warmup_steps(trainer.state.max_steps)


def diagnose(run: Outcome) -> list[str]:
    """A few sentences about each number that is not as it should be; empty if all are."""
    found = (
        _persona(run), _personal_tokens(run), _validation(run), _weighted_loss(run), _dropped(run),
        _short(run), _few(run),
    )  # fmt: skip
    return [text for text in found if text]


def _persona(run: Outcome) -> str:
    """Whether the persona (for documents, the long context) helps this model at all."""
    said, weighting, amount = [], run.loss.weighting, _at_floor(run.loss)
    share = _thirds(run.log, "frac_at_floor")[1]
    if amount and share >= AT_FLOOR and run.loss.entry.counterfactual and weighting.clip_min < weighting.clip_max:
        said.append(
            f"{weighting.signal_name} is at most {weighting.clip_min:g} for {share:.1%} of the tokens at the end of "
            f"training: {amount}."
        )
    pir, earlier = run.after.get("eval_pir_mean", math.nan), run.before.get("eval_pir_mean", math.nan)
    if pir <= 0:
        name, found = "Mean PIR", "with the persona the replies are no likelier than without"
        if run.documents:
            name, found = "The mean log-ratio", "the long context makes the text no likelier"
        before = "" if math.isnan(earlier) else f" (before training {earlier:+.4f})"
        said.append(f"{name} of the validation is {pir:+.4f}{before}: {found}.")
    return " ".join([*said, LOOK_AT_CONTEXT if run.documents else LOOK_AT_PERSONA]) if said else ""


def _at_floor(loss: LossConfig) -> str:
    """What tokens weigh whose signals are all at most clip_min; "" if their weights may differ, because the bounds of a
    schedule lie between 1 and those of the clip."""
    floor, schedule = loss.weighting.clip_min, loss.clip_schedule
    if schedule != "constant" and floor > 1:
        return ""
    if schedule == "constant" and floor == 0:
        return "they weigh 0, and nothing is learned from them"
    if loss.normalize != "none":
        return f"rescaled by --normalize {loss.normalize}, all weigh 1, which is cross-entropy"
    bound = (
        f"{floor:g}"
        if schedule == "constant" or floor == 1
        else f"a bound between {floor:g} and 1 (--clip_schedule {schedule})"
    )
    return f"all weigh the same, which is cross-entropy times {bound}"


def _personal_tokens(run: Outcome) -> str:
    old, new = (part.get("eval_loss_personal_tokens", 0.0) for part in (run.before, run.after))
    if math.isnan(new) and run.marked:
        return (
            "No token of the validation's replies is personal: the data's own marks (personal_spans) cover none. Check "
            "their places, in characters of the response, or leave them out: then words of the persona are marked."
        )
    if math.isnan(new) and not run.documents:
        return (
            "No token of the validation's replies is personal: none of their words is in the persona but not in the "
            "conversation. Is the persona in another column (--columns persona=NAME)?"
        )
    if not old or not new > old * (1 + NOISE):
        return ""
    return (
        f"The loss on personal tokens rose from {old:.4f} to {new:.4f}: train for fewer steps, or with a lower "
        "--learning_rate."
    )


def best_evaluation(log: Sequence[Mapping[str, Any]]) -> tuple[int, float] | None:
    """(step, loss) of the earliest evaluation with the lowest loss; None if nothing was evaluated."""
    losses = [(line["eval_loss"], line["step"]) for line in log if math.isfinite(line.get("eval_loss", math.nan))]
    return min(losses)[::-1] if losses else None


def _validation(run: Outcome) -> str:
    best, last = best_evaluation(run.log), [line for line in run.log if "eval_loss" in line][-1:]
    if best is None or run.keeps_best or not last[0]["eval_loss"] > best[1] * (1 + NOISE):
        return ""
    (step, low), high = best, last[0]["eval_loss"]
    when = f"at step {step}" if step else "before training"
    return (
        f"The validation loss was lowest {when} ({low:.4f}) and is {high:.4f} at step {last[0]['step']}, "
        f"{high / low - 1:.1%} higher: "
        + (
            "train for fewer steps, or save the best weights by --early_stopping 3, which also ends the run, or by "
            "--load_best_model_at_end true."
            if step
            else "try a tenth of the --learning_rate."
        )
    )


def _weighted_loss(run: Outcome) -> str:
    """Weights grow as the model learns to use the persona, so the weighted training loss does not measure a run. If
    weights are rescaled to mean 1, they do not grow."""
    (loss, loss_after), (ce, ce_after), (weight, weight_after) = (
        _thirds(run.log, name) for name in ("loss", "ce", "weight_mean")
    )
    if run.loss.normalize != "none" or not (loss_after > loss and ce_after < ce and weight_after > weight):
        return ""
    return (
        f"The weighted training loss rose from {loss:.4f} to {loss_after:.4f} from the first third of the run to the "
        f"last while cross-entropy fell from {ce:.4f} to {ce_after:.4f}: the mean weight grew, from {weight:.3f} to "
        f"{weight_after:.3f}. That is no reason to stop; judge a run by its validation loss."
    )


def _thirds(log: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """The means of a logged number in the first third of the run and in the last; nan for the first if there are fewer
    than three values."""
    values = [line[name] for line in log if name in line]
    count = max(len(values) // 3, 1)
    first, last = values[:count], values[-count:]
    return sum(first) / count if len(values) > 2 else math.nan, sum(last) / count if values else math.nan


def _dropped(run: Outcome) -> str:
    every = run.entries + run.dropped
    if not every or run.dropped <= DROPPED * every:
        return ""
    return (
        f"{run.dropped / every:.0%} of the persona entries were dropped in training ({run.dropped:,} of {every:,}) "
        f"to fit --max_length {run.max_length}: raise it."
    )


def _short(run: Outcome) -> str:
    if run.warmup <= run.steps / 2:
        return ""
    return (
        f"The learning rate was still rising in {min(run.warmup, run.steps)} of {run.steps} steps: train longer, "
        "or with fewer --warmup_steps."
    )


def _few(run: Outcome) -> str:
    if run.units >= FEW:
        return ""
    unit = run.unit if run.units != 1 else run.unit.removesuffix("s")
    how = "--eval_examples 0 takes all that there are" if run.cut else "put them into a validation file"
    return f"The validation has only {run.units} {unit}: its numbers may be chance. Validate on {FEW} or more ({how})."
