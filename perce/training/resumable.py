"""ResumableTrainer: a transformers.Trainer whose runs do not go wrong silently.

It resumes only from whole checkpoints, at the step at which they were saved, and trains no step beyond the last. It
stops if numbers are not finite, and saves none of those. It checks that it can upload before it trains.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import PushInProgress

from perce.errors import UserError, first_line
from perce.files.outputs import let_umask_decide
from perce.model.probe import unwrapped
from perce.training.best import check_first_value, evaluated_name, is_evaluated
from perce.training.checkpoints import check_whole, damage, model_files, resume_point, save_whole, state_of
from perce.training.divergence import check_finite, check_logged
from perce.training.parallel import found_by_first
from perce.training.weights import WeightsOfCheckpoints
from perce.visible import say


class ResumableTrainer(WeightsOfCheckpoints, Trainer):
    """A subclass saves what it adds to a checkpoint in `save_beside`, and reads it in `restore`."""

    _resumed: Path
    _resumed_state: dict[str, Any]
    _saved: tuple[Path, int] | None = None
    """Directory and step of the weights that were written last; None if there are none, or others were loaded since."""
    has_card: bool = False
    """Whether a card has been written to output_dir that is to be uploaded as it is."""

    def restore(self, checkpoint: Path) -> None:
        """Read what `save_beside` has written to a whole checkpoint; called on every process."""

    def save_beside(self, checkpoint: Path) -> None:
        """Write further files of a checkpoint, before its others; called on every process."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Like transformers.Trainer.train, but no step beyond the last; True resumes from the newest whole checkpoint.

        Raises:
            UserError: a checkpoint that is damaged or lacks what a resume needs; numbers that are no longer finite.
        """
        self._saved = None
        if not (asked := resume_from_checkpoint):
            return super().train(None, *args, **kwargs)
        self._resumed = checkpoint = found_by_first(lambda: self._whole_checkpoint(asked))
        self._resumed_state = state_of(checkpoint)
        self.restore(checkpoint)
        eval_on_start = self.args.eval_on_start  # as it is asked for: _settle_state decides it for this resume
        try:
            return super().train(str(checkpoint), *args, **kwargs)
        except FileNotFoundError as error:
            if str(checkpoint) not in str(error):
                raise
            raise self._gone() from error
        finally:
            self.args.eval_on_start = eval_on_start

    def _whole_checkpoint(self, asked: str | bool) -> Path:
        if isinstance(asked, bool):
            return resume_point(Path(str(self.args.output_dir)))
        check_whole(Path(asked))
        return Path(asked)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Like transformers.Trainer's, which would silently start anew if the files disappear while they are read."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            if self.state.global_step != self._resumed_state["global_step"]:
                raise self._gone()
            self._settle_state()

    def _settle_state(self) -> None:
        """Bring what the checkpoint holds up to date: intervals, and the place of the best weights. An evaluation may
        still be missing."""
        state, saved = self.state, self._resumed_state
        state.compute_steps(self.args, state.max_steps)  # the intervals of the options, not those of the checkpoint
        if self.args.load_best_model_at_end and saved["best_model_checkpoint"]:
            # In the same directory as this one, wherever the run is now.
            state.best_model_checkpoint = str(self._resumed.with_name(Path(saved["best_model_checkpoint"]).name))
        self.args.eval_on_start = self._evaluation_is_missing()
        if not self.args.eval_on_start:  # the missing evaluation may replace the best ones
            self._check_best()

    def _gone(self) -> UserError:
        return UserError(
            f"{self._resumed}: files disappeared while it was read, at step {self._resumed_state['global_step']}. Is "
            "another process writing there? Resume again when it has ended."
        )

    def _evaluation_is_missing(self) -> bool:
        """Whether an evaluation was due at the step that is resumed from and was not made: a signal stopped the run, or
        it is an epoch's evaluation, which comes after the checkpoint of the epoch's last step."""
        args, state = self.args, self.state
        epoch, step, last = state.epoch or 0.0, state.global_step, state.global_step >= state.max_steps
        due = {
            "epoch": (last or abs(epoch - round(epoch)) < 1e-6) and args.eval_delay <= epoch,
            "steps": (last or step % (state.eval_steps or 1) == 0) and args.eval_delay <= step,
        }.get(args.eval_strategy, False)
        return due and not is_evaluated(state)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Like transformers.Trainer's, but a missing evaluation that a resume makes counts like any other."""
        made_up = skip_scheduler and self.state.global_step > 0
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler and not made_up)
        check_first_value(self.args, self.state, metrics)
        if made_up and self._determine_best_metric(metrics, trial):
            self.state.best_model_checkpoint = str(self._resumed)
        elif made_up:
            self._check_best()
        return metrics

    def _load_best_model(self) -> None:
        self._check_best()
        self._saved = None
        super()._load_best_model()

    def _check_best(self) -> None:
        """UserError if the best weights are to be loaded at the end, and are not as they were saved."""
        if not self.args.load_best_model_at_end or self.state.best_model_checkpoint is None:
            return
        best = Path(self.state.best_model_checkpoint)
        if reason := damage(best):
            raise UserError(
                f"{best}: has the best weights of the run (by {evaluated_name(self.args)}), but {reason}. Put it back, "
                "or start a new run from the weights of another checkpoint (--model)."
            )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Like transformers.Trainer's, which would begin a step even if all have been made."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        check_logged(self, logs, Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Like transformers.Trainer.save_model, but without uploading, which push_to_hub does. UserError if the weights
        are not finite."""
        saved = Path(output_dir or str(self.args.output_dir)), self.state.global_step
        if _internal_call and self._saved == saved:
            return
        if not _internal_call:  # for a checkpoint, all processes have been asked already
            check_finite(self, everywhere=False)
        super().save_model(output_dir, _internal_call=True)
        self._saved = saved

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_finite(self)
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"

        def save_weights() -> None:
            self.save_beside(checkpoint)
            self.save_model(str(checkpoint), _internal_call=True)

        # A save of its own, because the Trainer may wait after the weights for a process that failed while saving them.
        self._saved = None
        self._finish_current_push()  # its checkpoint may be deleted now
        save_whole(self, checkpoint, save_weights, lambda: super(ResumableTrainer, self)._save_checkpoint(model, trial))
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END and self.is_world_process_zero():
            self._upload_checkpoint(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Like transformers.Trainer's, but with the generation config, which PEFT does not save with an adapter."""
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        let_umask_decide(Path(str(output_dir or self.args.output_dir)))
        base = unwrapped(self.model)
        if base is not self.model and base.generation_config is not None:
            base.generation_config.save_pretrained(output_dir or self.args.output_dir)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # from huggingface_hub, or from the network library that it uses
            raise UserError(
                f"--push_to_hub: the repository cannot be reached or made ({self._told(error)}). Log in (hf auth "
                "login, or HF_TOKEN), check that HF_HUB_OFFLINE is not set, or leave --push_to_hub out."
            ) from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Like transformers.Trainer's, but it uploads only the files that a model is saved as (SAVED in
        checkpoints.py), and saves nothing that is saved already.

        An upload that fails does not end the run, whose files are saved locally."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            if private is not None:  # read by init_hf_repo, to which transformers 5.16 cannot hand it
                self.args.hub_private_repo = private
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if not self.has_card:
            self.create_model_card(**kwargs)
        self._finish_current_push()
        output_dir = Path(str(self.args.output_dir))
        given = {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
        options = {"allow_patterns": model_files(output_dir), "run_as_future": not blocking, **given}
        return self._upload(output_dir, str(commit_message), **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: transformers.Trainer calls it before the checkpoint is whole, and would upload all of output_dir."""

    def _upload_checkpoint(self, checkpoint: Path) -> None:
        """Upload in the background the model of a checkpoint and, if --hub_strategy asks for it, all of its files."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        options = {"token": self.args.hub_token, "revision": self.args.hub_revision, "run_as_future": True}
        message = f"Training in progress, step {self.state.global_step}"
        files = [name for name in model_files(checkpoint) if name != "README.md"]  # PEFT's, which has a path in it
        jobs = [self._upload(checkpoint, message, allow_patterns=files, **options)]
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        if place := places.get(HubStrategy(self.args.hub_strategy)):
            jobs.append(self._upload(checkpoint, f"{message}, checkpoint", path_in_repo=place, **options))
        self.push_in_progress: Any = PushInProgress([job for job in jobs if job is not None])  # type: ignore[arg-type]

    def _upload(self, folder: Path, message: str, **options: Any) -> Any:
        def tell_if_failed(done: Any) -> None:
            if not done.cancelled() and (error := done.exception()):
                self._tell_failed(error)

        try:
            job = HfApi(library_name="perce").upload_folder(
                repo_id=str(self.hub_model_id), folder_path=folder, commit_message=message, **options
            )
        except Exception as error:  # as above
            return self._tell_failed(error)
        if options["run_as_future"]:
            job.add_done_callback(tell_if_failed)
        return job

    def _tell_failed(self, error: Exception) -> None:
        note = f"the upload failed ({self._told(error)}). Everything is in {self.args.output_dir}; upload it later."
        say(f"--push_to_hub: {note}", error=True)

    def _told(self, error: Exception) -> str:
        """The first line of the error, without the token."""
        token = str(self.args.hub_token or "").strip()
        return first_line(error).replace(token, "…") if token else first_line(error)
