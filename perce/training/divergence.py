"""A run whose numbers are no longer finite is stopped: they are checked at each log and before each save."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from perce.errors import UserError
from perce.training.checkpoints import LIST, newest_whole

WATCHED = ("loss", "grad_norm", "ce", "eval_loss")


class Diverged(UserError):
    """The results of the last steps are unusable and are not saved; earlier checkpoints are untouched."""


def check_logged(trainer: Trainer, logs: Mapping[str, float], checkpoint: Path | None = None) -> None:
    """Diverged if a loss or the gradient norm is not finite. A checkpoint of these weights then no longer counts as
    whole."""
    for name in WATCHED:
        if not math.isfinite(value := logs.get(name, 0.0)):
            if checkpoint is not None and trainer.args.should_save:
                (checkpoint / LIST).unlink(missing_ok=True)
            raise Diverged(_told(trainer, f"{name} is {value}"))


def check_finite(trainer: Trainer, everywhere: bool = True) -> None:
    """Diverged if a trained weight or a state of the optimiser is not finite.

    everywhere: ask all processes, which must then all call this.
    """
    weights = (p for p in trainer.model.parameters() if p.requires_grad)  # type: ignore[union-attr]
    states = getattr(trainer.optimizer, "state", None) or {}  # DeepSpeed's optimisers have none to read
    parts = {
        "weights": _all_finite(weights),
        "states of the optimiser": _all_finite(x for state in states.values() for x in state.values()),
    }
    finite = torch.stack([flag.to(trainer.args.device, torch.float32) for flag in parts.values()])
    if everywhere:
        finite = trainer.accelerator.reduce(finite, "sum") / trainer.accelerator.num_processes
    for name, share in zip(parts, finite.tolist(), strict=True):
        if share < 1:
            raise Diverged(_told(trainer, f"the {name} are not finite, and were not saved"))


def _all_finite(tensors: Iterable[Any]) -> Tensor:
    """Whether all numbers are finite, as a flag on the device; no tensor is copied."""
    flags = []
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # this process's part
        if isinstance(local, Tensor) and local.is_floating_point() and local.numel():
            flags.append(torch.stack(local.detach().aminmax()).isfinite().all())
    return torch.stack([flag.to(flags[0].device) for flag in flags]).all() if flags else torch.tensor(True)


def _told(trainer: Trainer, what: str) -> str:
    args, step = trainer.args, trainer.state.global_step
    where = f"step {step}" if step else "before the first step"
    standing = newest_whole(Path(str(args.output_dir)))
    kept = f"{standing.name} is the last good one and is kept." if standing else "No checkpoint was saved before."
    if not step:
        return f"{where}: {what}. The model itself is at fault: look at its weights, or try --precision fp32."
    return (
        f"{where}: {what}. The run has diverged and was stopped. Likely causes: --learning_rate "
        f"{args.learning_rate:g} is too high (try a tenth of it, in a new run), --warmup_steps are too few, "
        f"--max_grad_norm {args.max_grad_norm:g} is too high, or that step's rows are not text. {kept}"
    )
