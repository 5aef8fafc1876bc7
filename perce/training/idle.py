"""Options that would have no effect: fields of TrainingArguments that nothing reads here, that other options leave
without an effect, or that the optimiser does not read. They are refused, with what to do instead."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import Trainer, TrainingArguments

from perce.config.schema import RunConfig
from perce.errors import UserError
from perce.model.memory import CHECKPOINTING
from perce.training.best import FOLLOW_THE_METRIC

# TrainingArguments fields that an option of perce's decides.
OURS = {"bf16": "precision", "fp16": "precision", "gradient_checkpointing": "activation_checkpointing"}
_EVALUATION = "an evaluation computes losses and keeps no logits; trainer.last_evaluation has each token's numbers"
_COLUMNS = "the columns of token pairs are read by their names"
_PRECISION = "evaluations have the precision of training; use --precision"
# TrainingArguments fields that change nothing under PerceTrainer, or that it decides, and what to do instead.
NOT_READ = {
    "do_train": "perce.train always trains; leave it out",
    "do_eval": "--eval_strategy no, steps or epoch says whether and when validation examples are evaluated",
    "do_predict": "python -m perce.evaluate writes and scores replies",
    "resume_from_checkpoint": "use --resume; in Python, trainer.train(resume_from_checkpoint=True)",
    "local_rank": "torchrun sets it in LOCAL_RANK",
    "fp16_full_eval": _PRECISION,
    "bf16_full_eval": _PRECISION,
    "prediction_loss_only": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "remove_unused_columns": _COLUMNS,
    "label_names": _COLUMNS,
    "length_column_name": "--tokens_per_batch puts sequences of similar length together, by their input_ids",
    "average_tokens_across_devices": "the loss is always divided by the tokens of all processes",
    "enable_jit_checkpoint": "SIGTERM is handled already: it finishes the step and saves it",
    "auto_find_batch_size": (
        "after a step that did not fit, it begins again with weights that are already trained; python -m perce.plan "
        "finds a batch that fits, and a run checks that before its first step"
    ),
    "hub_always_push": "every checkpoint is uploaded, and the next one waits for the upload",
    "logging_nan_inf_filter": "it would hide a loss that diverges",
    "label_smoothing_factor": "the PerCE loss has no label smoothing. Leave it at 0",
}
OF_THE_HUB = ("hub_model_id", "hub_token", "hub_private_repo", "hub_strategy", "hub_revision")
OF_THE_TRAINERS_LOADER = ("dataloader_drop_last", "train_sampling_strategy")
OF_SOME_OPTIMIZERS = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules")
OF_LOGGERS = ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
# Allowed in Python: fields that TrainingArguments set themselves, so that a copy has another value, and fields that
# callbacks read.
LEFT_OPEN = ("do_eval", "fsdp_config", *OF_LOGGERS)
# Options of perce's, each with a TrainingArguments field and the values of it that leave the option without an effect.
IDLE_WITH = {
    "eval_steps": ("eval_strategy", "no", "epoch"),
    "save_steps": ("save_strategy", "no", "epoch", "best"),
    "logging_steps": ("logging_strategy", "no", "epoch"),
    "warmup_steps": ("lr_scheduler_type", "constant", *FOLLOW_THE_METRIC),
}


def changed(args: TrainingArguments) -> dict[str, Any]:
    """The defaults of the fields that do not have their default value."""
    missing = dataclasses.MISSING
    defaults = {
        field.name: field.default if field.default_factory is missing else field.default_factory()
        for field in dataclasses.fields(args)
    }
    return {name: default for name, default in defaults.items() if getattr(args, name) != default}


def refuse_fields(names: Iterable[str], idle: Mapping[str, str], but: Iterable[str] = LEFT_OPEN) -> None:
    """UserError for a field that would have no effect. `idle` has these fields, and what to do instead."""
    for name in names:
        if name in idle and name not in but:
            raise UserError(f"{name}: has no effect here: {idle[name]}.")


def idle_beside(args: Any) -> dict[str, str]:
    """Fields that other options leave without an effect, and why."""
    idle: dict[str, str] = {}
    if args.tokens_per_batch is not None or args.data.streaming:
        loader = "--streaming" if args.data.streaming else "--tokens_per_batch"
        idle |= dict.fromkeys(OF_THE_TRAINERS_LOADER, f"{loader} forms the batches in its own way")
    if args.data.streaming:
        idle["data_seed"] = "a stream's order follows --seed"
    if args.lr_scheduler_type in ("constant", "constant_with_warmup"):
        idle["lr_scheduler_kwargs"] = "a constant --lr_scheduler_type takes none"
    if not args.push_to_hub:
        idle |= dict.fromkeys(OF_THE_HUB, "nothing is uploaded without --push_to_hub true")
    if args.report_to in (None, "none", [], ["none"]):
        idle |= dict.fromkeys(OF_LOGGERS, "nothing is reported without --report_to")
    if not args.dataloader_num_workers:
        idle["dataloader_in_order"] = "batches come in order without --dataloader_num_workers"
    if not args.fsdp:
        idle["fsdp_config"] = "weights are not sharded without --fsdp true"
    if not getattr(args, CHECKPOINTING):
        why = "nothing is recomputed without --activation_checkpointing"
        idle |= {"gradient_checkpointing_kwargs": why, "activation_checkpointing_kwargs": why}
    return idle


def check_run(run: RunConfig, fields: Mapping[str, Any]) -> None:
    """UserError for an option of perce's that one of these TrainingArguments fields leaves without an effect."""
    for option, (field, *values) in IDLE_WITH.items():
        default, value = getattr(RunConfig, option), fields.get(field)
        if getattr(run, option) not in (0, default) and value in values:
            raise UserError(
                f"{option}: has no effect with --{field} {value}. Leave one of them out; instead of a recipe's number "
                f"give --{option} {default}."
            )


def check_optimizer(args: TrainingArguments) -> None:
    """UserError for optimiser options that the chosen optimiser does not read.

    An option counts as read if another value makes a difference, or an error. Optimisers whose package is missing, or
    that need the model, are not checked.
    """
    name = str(getattr(args.optim, "value", args.optim))
    items = [item.split("=") for item in str(args.optim_args or "").replace(" ", "").split(",") if item]
    if any(len(item) != 2 for item in items):
        raise UserError(f"optim_args: expected name=value,name=value, got {args.optim_args!r}.")

    def made(**changes: Any) -> Any:
        other = copy.copy(args)
        vars(other).update({"optim_args": None, **changes})
        return Trainer.get_optimizer_cls_and_kwargs(other)

    def is_read(**changes: Any) -> bool:
        try:
            return made(**changes) != plain
        except Exception:
            return True

    try:
        plain = made()
    except Exception:
        return
    for key, _ in items:
        if not is_read(optim_args=f"{key}=?"):
            raise UserError(f"optim_args: --optim {name} does not read {key}. Was it mistyped?")
    for field, default in changed(args).items():
        if field in OF_SOME_OPTIMIZERS and not is_read(**{field: default}):
            raise UserError(f"{field}: --optim {name} does not read it. Leave it out, or choose another --optim.")
