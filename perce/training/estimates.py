"""Token weights that are estimated apart from the steps that use them: the E-step of `--estimate epoch|frozen`.

    online   every step, by the model as it is then (no cache; the paper's setting)
    epoch    all training examples at each epoch's start
    frozen   all training examples once, by the model as it was before training

Estimates are fp32 and are saved with every checkpoint, with a digest of the pairs that they were made of: a resumed run
continues with the weights it had.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from perce.data.dataset import numbers, pairs_digest
from perce.errors import UserError, in_one_line
from perce.files.outputs import let_umask_decide
from perce.objectives import Measured

FILE = "estimates.safetensors"
TENSORS = ("logp", "logp_cf", "signal")
ABOUT = ("epoch", "pairs", "of_signal")


@dataclass(frozen=True)
class Estimates:
    """Estimates of the N response tokens of a dataset of pairs, in its order, and what they were made of."""

    logp: Tensor  # (N,) fp32
    logp_cf: Tensor  # (N,) fp32; 0 for objectives without a counterfactual pass
    signal: Tensor  # (N,) fp32; clipped, it is the weight
    places: Mapping[int, range]  # of the tokens of each example, by the dataset's column
    epoch: int
    pairs: str  # the dataset's pairs_digest
    of_signal: str  # the name of the signal

    def of(self, examples: Tensor, device: torch.device) -> Measured:
        """The estimates of the response tokens of these (B,) examples, in their order."""
        rows = torch.tensor([token for example in examples.tolist() for token in self.places[example]])
        return Measured(*(getattr(self, name)[rows].to(device) for name in TENSORS))

    def save(self, directory: Path) -> None:
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        about = {name: getattr(self, name) for name in ABOUT}
        save_file({name: getattr(self, name) for name in TENSORS}, directory / FILE, {"perce": json.dumps(about)})
        let_umask_decide(directory)

    @classmethod
    def load(cls, directory: Path, dataset: Any, of_signal: str) -> "Estimates":
        """A checkpoint's estimates; UserError unless they belong to these pairs and this signal."""
        from safetensors import safe_open

        path = directory / FILE
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["perce"])
                tensors = {name: file.get_tensor(name) for name in TENSORS}
        except Exception as error:  # whatever a missing or damaged file raises
            raise UserError(
                f"{path}: the token weights of this run cannot be read ({in_one_line(error)}). Resume from "
                "another checkpoint, or start a new run."
            ) from error
        if {*about} != {*ABOUT}:
            raise UserError(f"{path}: was written by another version of perce. Start a new run.")
        estimates = cls(**tensors, **about, places=places_of(dataset))
        if estimates.of_signal != of_signal:
            raise UserError(
                f"{path}: its weights come from {estimates.of_signal}, and those of this objective from {of_signal}. "
                "Resume with the --objective and --contrast of the run, or start a new one."
            )
        if estimates.pairs != pairs_digest(dataset):
            raise UserError(
                f"{path}: its weights belong to other training pairs than these. The data, the prompt, the tokenizer "
                "or --max_length has changed: put it back, or start a new run."
            )
        return estimates


def places_of(dataset: Any) -> dict[int, range]:
    """Where the response tokens of each example are among those of the dataset."""
    ends = numbers(dataset, "response_length").cumsum().tolist()
    return dict(zip(numbers(dataset, "example").tolist(), map(range, [0, *ends], ends), strict=True))


def check_estimable(dataset: Any, estimate: str) -> None:
    """UserError for a dataset whose examples cannot be told apart, or are not known beforehand."""
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"--estimate {estimate}: all examples are estimated before the steps that use them, and a stream is not "
            "known beforehand. Use --estimate online, or read the data whole."
        )
    if "example" not in dataset.column_names or len(np.unique(numbers(dataset, "example"))) < len(dataset):
        raise UserError(
            f"--estimate {estimate}: the training pairs need a column `example` with a different number for each. The "
            "pieces of a document that is longer than --max_length share one: use --estimate online for those."
        )


def estimate(
    dataset: Any, batches: Sequence[Sequence[int]], measure: Callable[[Sequence[int]], Measured], *, epoch: int,
    of_signal: str,
) -> Estimates:  # fmt: skip
    """One E-step over `dataset`; to be called on every process.

    Args:
        batches: rows of the dataset, batch by batch, that this process estimates.
        measure: rows → the measurements of their response tokens, including the signal.
    """
    length = numbers(dataset, "response_length")
    own: dict[int, tuple[Tensor, ...]] = {}
    for rows in batches:
        columns = [x.float().cpu().split(length[list(rows)].tolist()) for x in measure(rows)[:3]]
        own |= zip(rows, zip(*columns, strict=True), strict=True)
    of_row = {row: tensors for part in gather_object([own]) for row, tensors in part.items()}
    logp, logp_cf, signal = (torch.cat([of_row[row][i] for row in range(len(dataset))]) for i in range(3))
    return Estimates(logp, logp_cf, signal, places_of(dataset), epoch, str(pairs_digest(dataset)), of_signal)


def over_step(found: Sequence[Measured], rearrange: Callable[[Tensor], Tensor], rank: int) -> list[Measured]:
    """The measurements of each of this process's forward passes of a step, with their signals replaced.

    `rearrange` gets the signals of all processes in the order of the examples, however they were divided into batches:
    with two processes and two forward passes each, the first pass of both, then the second.
    """
    everybody = gather_object([[x.signal.cpu() for x in found]])
    signals = [signal for forward in zip(*everybody, strict=True) for signal in forward]
    given = rearrange(torch.cat(signals)).split([len(signal) for signal in signals])
    own = zip(found, given[rank :: len(everybody)], strict=True)
    return [mine._replace(signal=signal.to(mine.logp.device)) for mine, signal in own]


class EStep(TrainerCallback):
    """Estimates at the start of each epoch, or of the run; estimates of this epoch from a checkpoint are kept."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self.trainer.estimates = None  # an earlier run's, by the weights that the model had then

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epoch = int((state.epoch or 0.0) + 1e-6)
        known, frozen = self.trainer.estimates, self.trainer.args.loss.estimate == "frozen"
        if known is None or (not frozen and known.epoch != epoch):
            self.trainer.estimate(epoch)
