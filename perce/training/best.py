"""The best weights of a run: the metric that decides, when a run without better ones stops, which ones are saved."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from perce.errors import UserError
from perce.visible import say

METRICS = {
    "loss": False, "loss_with_persona": False, "loss_without_persona": False, "loss_personal_tokens": False,
    "pir_mean": True,
}  # fmt: skip
"""The numbers of an evaluation, and whether a greater one is better."""
FOLLOW_THE_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Kinds of schedules that change the learning rate by metric_for_best_model, after evaluations. None has a warm-up."""


def evaluated_name(args: TrainingArguments) -> str:
    """The evaluation's name for metric_for_best_model."""
    name = "loss" if args.metric_for_best_model is None else args.metric_for_best_model
    return f"eval_{name.removeprefix('eval_')}"


def metric_of(args: TrainingArguments) -> str | None:
    """The number that metric_for_best_model is, of all examples or of a part; None if it is not one of METRICS."""
    return next((metric for metric in METRICS if evaluated_name(args).endswith(f"_{metric}")), None)


def check_direction(args: TrainingArguments, metric: str) -> None:
    """UserError if greater_is_better is not what this metric needs."""
    if args.greater_is_better not in (None, METRICS[metric]):
        better = "greater" if METRICS[metric] else "smaller"
        raise UserError(f"greater_is_better: a {better} {evaluated_name(args)} is better. Use {METRICS[metric]}.")


def check_schedule(args: TrainingArguments) -> None:
    """UserError for a schedule that follows the metric and takes better values for worse."""
    metric, given = metric_of(args), (args.lr_scheduler_kwargs or {}).get("mode", "min")  # type: ignore[union-attr]
    if metric is None or args.lr_scheduler_type not in FOLLOW_THE_METRIC:
        return
    better, mode = ("greater", "max") if METRICS[metric] else ("smaller", "min")
    if given != mode:
        raise UserError(
            f"lr_scheduler_kwargs: a {better} {evaluated_name(args)} is better, and the learning rate follows it. Give "
            f'{{"mode": "{mode}"}} with this --lr_scheduler_type.'
        )


def settle_metric(args: Any) -> None:
    """Set greater_is_better from the metric; UserError for a metric that no evaluation has, or the wrong direction.

    For TrainingArguments, greater values of every metric are better unless its name ends in "loss".
    """
    if args.load_best_model_at_end and args.eval_strategy == "no":
        raise UserError(
            "load_best_model_at_end: nothing is evaluated with --eval_strategy no, so no weights are known as the "
            "best. Use --eval_strategy epoch or steps."
        )
    metric = metric_of(args)
    if metric is None:
        raise UserError(_not_there(args, [f"eval_{metric}" for metric in METRICS]))
    check_direction(args, metric)
    if args.metric_for_best_model is not None:
        args.greater_is_better = METRICS[metric]


def check_metric(args: TrainingArguments, eval_dataset: Any) -> None:
    """UserError for a metric that the evaluation of these examples will not have."""
    parts = [f"{part}_" for part in eval_dataset] if isinstance(eval_dataset, Mapping) else [""]
    there = [f"eval_{part}{metric}" for part in parts for metric in METRICS]
    if args.metric_for_best_model is not None and eval_dataset is not None and evaluated_name(args) not in there:
        raise UserError(_not_there(args, there))


def _not_there(args: TrainingArguments, there: list[str]) -> str:
    return f"metric_for_best_model: expected one of {', '.join(there)}, got {args.metric_for_best_model!r}."


def check_first_value(args: TrainingArguments, state: TrainerState, metrics: Mapping[str, float]) -> None:
    """UserError if the metric is NaN before there is a best value: no later value would be better."""
    name = evaluated_name(args)
    if args.metric_for_best_model is None or state.best_metric is not None or not math.isnan(metrics.get(name, 0.0)):
        return
    personal = name.endswith("_loss_personal_tokens")
    raise UserError(
        f"metric_for_best_model: {name} is nan in the first evaluation"
        f"{', because its examples have no personal token' if personal else ''}, so no weights would be the "
        "best. Use another metric, such as eval_loss."
    )


def is_evaluated(state: TrainerState) -> bool:
    """Whether an evaluation is logged for the step that the run has reached."""
    of_step = [line for line in state.log_history if line["step"] == state.global_step]
    return any(name.startswith("eval_") for line in of_step for name in line)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' EarlyStoppingCallback; in addition, a run that has stopped early stays stopped when resumed."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step == 0:
            self.early_stopping_patience_counter = 0  # not what an earlier train() has counted
        self.early_stopping_patience = args.early_stopping  # type: ignore[attr-defined]  # not the checkpoint's
        # A checkpoint of a run without early stopping has no entry, and saving expects one.
        cast(dict, state.stateful_callbacks).setdefault(type(self).__name__, self.state())

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True
            if state.is_world_process_zero:
                say(f"stopped early at step {state.global_step}, and is not trained further (--early_stopping)")


def kept_step(trainer: Trainer) -> int | None:
    """The step whose weights replaced the last ones when training ended; None if the last ones stayed."""
    best = trainer.state.best_model_checkpoint
    if not trainer.args.load_best_model_at_end or best is None:
        return None
    step = int(Path(best).name.rpartition("-")[2])
    return step if step != trainer.state.global_step else None


def kept_weights(trainer: Trainer) -> str:
    """Which weights are saved, in words; "" for those of the last step."""
    step = kept_step(trainer)
    return "" if step is None else f"weights of step {step}, the best by {evaluated_name(trainer.args)}"
