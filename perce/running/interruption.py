"""Ctrl-C and SIGTERM while training: the step under way is finished and saved, so that --resume continues bitwise.

    first signal     the run stops at the end of the step (in an evaluation: of the batch), with a checkpoint; with
                     several processes at the end of the next step
    a later one      it stops at once; the newest whole checkpoint is kept

A signal to one of several processes stops all of them at the same step.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from perce.errors import UserError
from perce.training.checkpoints import SaveError
from perce.training.divergence import Diverged
from perce.visible import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FORWARDED_SECONDS = 3.0
"""torchrun passes on what it receives, and one Ctrl-C arrives twice: a signal this soon after the first is the same."""


class Interrupted(KeyboardInterrupt):
    """Raised between two steps, on all processes; `signal` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


class Received:
    """How many processes have received each of SIGNALS, summed on the device. Reading it waits for this sum, and not
    for what the device was given after it."""

    def __init__(self, accelerator: Any, own: int | None) -> None:
        # torch.tensor would wait until all earlier work on the device is done.
        flags = [torch.full((), float(own == number), device=accelerator.device) for number in SIGNALS]
        counts = accelerator.reduce(torch.stack(flags), "sum")
        self._counts = counts.to("cpu", non_blocking=counts.is_cuda)
        self._copied = torch.cuda.Event() if counts.is_cuda else None
        if self._copied:
            self._copied.record()

    def signal(self) -> int | None:
        """One that any process received."""
        if self._copied:
            self._copied.synchronize()
        return next((number for number, count in zip(SIGNALS, self._counts.tolist(), strict=True) if count), None)


class Interruption(TrainerCallback):
    """Raises Interrupted when the state is that of a finished step: after a checkpoint, or between evaluated batches.

    At a step's end it asks for a checkpoint, which the Trainer writes after the log and evaluation that may be due.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.received: int | None = None
        # Step of the newest checkpoint with all that a resume needs, or of the one resumed from; None: not begun yet.
        self.saved_step: int | None = None
        self._received_at = 0.0
        self._step_before: Received | None = None

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Inside the context signals are received here; afterwards they have their earlier handlers. Nothing is changed
        in threads other than the main one, which receive none."""
        with contextlib.ExitStack() as stack:
            if threading.current_thread() is threading.main_thread():
                for number in SIGNALS:
                    stack.callback(signal.signal, number, signal.signal(number, self._receive))
            yield

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() - self._received_at < FORWARDED_SECONDS:
                return
            raise KeyboardInterrupt
        self.received, self._received_at = number, time.monotonic()
        step = "this step" if self.trainer.accelerator.num_processes == 1 else "the next step"
        # Not print: a handler may run in the middle of another print.
        os.write(
            2, f"\nStopping after {step}, with a checkpoint. A second signal stops at once, without one.\n".encode()
        )

    def _asked(self) -> int | None:
        """The signal that any process received."""
        accelerator = self.trainer.accelerator
        return self.received if accelerator.num_processes == 1 else Received(accelerator, self.received).signal()

    def _asked_at_step_end(self) -> int | None:
        """Like _asked. Several processes learn a step later what the others had received, so that none waits for its
        device after each step."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return self.received
        before, self._step_before = self._step_before, Received(accelerator, self.received)
        return before.signal() if before else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.saved_step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._asked_at_step_end():
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not args.save_only_model:
            self.saved_step = state.global_step
        self._stop_if_asked()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if (number := self._asked()) is not None:
            raise Interrupted(number)


def train_interruptibly(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train. If something stops it midway, a checkpoint of the last finished step is saved, or the newest one kept."""
    interruption = Interruption(trainer)
    trainer.add_callback(interruption)
    with interruption.caught():
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            number = interruption._asked()
            if number is not None and interruption.saved_step == trainer.state.global_step:
                raise Interrupted(number)  # in the run's last moments: a resume writes what is left to write
        except (UserError, KeyboardInterrupt, BrokenPipeError) as stopped:  # BrokenPipeError: `| head` has ended
            say("", error=True)  # ends the line of the progress bar
            alone, step = trainer.accelerator.num_processes == 1, trainer.state.global_step
            by_itself = isinstance(stopped, UserError | BrokenPipeError)
            between_steps = isinstance(stopped, Interrupted) or (by_itself and alone)
            begun = interruption.saved_step is not None
            if step and begun and between_steps and not isinstance(stopped, SaveError | Diverged):
                if interruption.saved_step != step:
                    trainer.args.save_only_model = False
                    trainer._save_checkpoint(trainer.model, None)  # type: ignore[arg-type]
                if trainer.is_world_process_zero():
                    again = f"--resume --output_dir {trainer.args.output_dir}"
                    say(f"Stopped at step {step}; {again} continues.", error=True)
            if by_itself:
                raise
            number = stopped.signal if isinstance(stopped, Interrupted) else interruption.received
            raise SystemExit(128 + (number or signal.SIGINT)) from None
        finally:
            trainer.remove_callback(interruption)
