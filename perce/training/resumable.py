"""ResumableTrainer: a transformers.Trainer whose runs do not go wrong in silence.

It resumes from what is whole and at the step that it was saved at, trains no step beyond the last, stops where numbers
are not finite and saves none of those, and finds out that it cannot upload before it trains.
"""

import sys
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from perce.environment import let_umask_decide
from perce.errors import UserError, first_line
from perce.model.probe import unwrapped
from perce.training.best import check_first_value, is_evaluated
from perce.training.checkpoints import check_whole, resume_point, save_whole, step_of
from perce.training.divergence import check_finite, check_logged
from perce.training.parallel import found_by_first


class ResumableTrainer(Trainer):
    """What a subclass keeps beside a checkpoint it saves in `save_beside` and reads in `restore`."""

    def restore(self, checkpoint: Path) -> None:
        """Read what `save_beside` has written to a checkpoint that is whole; on every process."""

    def save_beside(self, checkpoint: Path) -> None:
        """Write more files of a checkpoint, before its others; on every process."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As transformers.Trainer.train, but no step beyond the last; True resumes from the newest whole checkpoint.

        Raises:
            UserError: a checkpoint that is damaged or lacks what a resume needs; numbers that are no longer finite.
        """
        if asked := resume_from_checkpoint:
            checkpoint = found_by_first(lambda: self._whole_checkpoint(asked))
            self.restore(checkpoint)
            resume_from_checkpoint = str(checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _whole_checkpoint(self, asked: str | bool) -> Path:
        if isinstance(asked, bool):
            return resume_point(Path(str(self.args.output_dir)))
        check_whole(Path(asked))
        return Path(asked)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As transformers.Trainer's, which takes a checkpoint for a beginning if its files go while they are read."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.state.global_step != (step := step_of(Path(checkpoint))):
            raise UserError(
                f"{checkpoint}: the run should go on after step {step}, and what was read is of step "
                f"{self.state.global_step}. Is another process writing there? Resume again when it has ended."
            )
        # An epoch's evaluation comes after a checkpoint of its last step, and may be missing.
        epoch = self.state.epoch or 0.0
        ended = self.args.eval_strategy == "epoch" and abs(epoch - round(epoch)) < 1e-6
        self.args.eval_on_start = ended and not is_evaluated(self.state)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As transformers.Trainer's, which would begin a step whatever the number of those that are made."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super()._evaluate(*args, **kwargs)
        check_first_value(self.args, self.state, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        check_logged(self, logs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers.Trainer.save_model; UserError instead of weights that are not finite."""
        if not _internal_call:  # a checkpoint has asked all processes
            check_finite(self, everywhere=False)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_finite(self)
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"

        def save() -> None:
            self.save_beside(checkpoint)
            super(ResumableTrainer, self)._save_checkpoint(model, trial)

        save_whole(self, checkpoint, save)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As transformers.Trainer's; PEFT saves no generation config beside an adapter."""
        super()._save(output_dir, state_dict)
        let_umask_decide(Path(str(output_dir or self.args.output_dir)))
        base = unwrapped(self.model)
        if base is not self.model and base.generation_config is not None:
            base.generation_config.save_pretrained(output_dir or self.args.output_dir)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # of huggingface_hub, of whichever network library it uses
            raise UserError(
                f"--push_to_hub: the repository cannot be reached or made ({first_line(error)}). Log in (hf auth "
                "login, or HF_TOKEN), see that HF_HUB_OFFLINE is not set, or leave --push_to_hub out."
            ) from error

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers.Trainer's; an upload that fails does not end a run whose files are saved here."""
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception as error:  # as above
            note = f"the upload failed ({first_line(error)}). Everything is in {self.args.output_dir}; upload it later."
            print(f"--push_to_hub: {note}", file=sys.stderr)
