"""Token weights that are estimated apart from the steps that use them: the E-step of `--estimate epoch|frozen`.

    online   every step, by the model as it is then (no cache; the paper's setting)
    epoch    all training examples at each epoch's start
    frozen   all training examples once, by the model as it was before training

Estimates are fp32, keyed by example and checked against the ids of its response, and are saved with every checkpoint:
a resumed run continues with the weights it had.
"""

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from perce.data.dataset import numbers, pieces_of
from perce.environment import let_umask_decide
from perce.errors import UserError, in_one_line
from perce.objectives import Measured

FILE = "estimates.safetensors"
TENSORS = ("example", "length", "response_crc", "logp", "logp_cf", "signal")


@dataclass(frozen=True)
class Estimates:
    """E examples with N response tokens in all, in the order of the dataset that was estimated."""

    example: Tensor  # (E,) int64, the dataset's column
    length: Tensor  # (E,) int64 response tokens of each
    response_crc: Tensor  # (E,) int64 CRC-32 of the response ids
    logp: Tensor  # (N,) fp32
    logp_cf: Tensor  # (N,) fp32; 0 for objectives without a counterfactual pass
    signal: Tensor  # (N,) fp32; clipped, it is the weight
    epoch: int
    vocabulary: int
    of_signal: str  # the name of the signal

    def __post_init__(self) -> None:
        starts = torch.cat([self.length.new_zeros(1), self.length.cumsum(0)[:-1]])
        places = zip(starts.tolist(), self.length.tolist(), strict=True)
        object.__setattr__(self, "_places", dict(zip(self.example.tolist(), places, strict=True)))

    def of(self, examples: Tensor, device: torch.device) -> Measured:
        """The estimates of the response tokens of these (B,) examples, in their order."""
        places: dict[int, tuple[int, int]] = self._places  # type: ignore[attr-defined]
        rows = torch.cat([torch.arange(start, start + n) for start, n in map(places.__getitem__, examples.tolist())])
        return Measured(*(x[rows].to(device) for x in (self.logp, self.logp_cf, self.signal)))

    def save(self, directory: Path) -> None:
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        facts = {"epoch": self.epoch, "vocabulary": self.vocabulary, "of_signal": self.of_signal}
        save_file({name: getattr(self, name) for name in TENSORS}, directory / FILE, {"perce": json.dumps(facts)})
        let_umask_decide(directory)

    @classmethod
    def load(cls, directory: Path, dataset: Any, vocabulary: int, of_signal: str) -> "Estimates":
        """A checkpoint's estimates; UserError unless they belong to this dataset, this signal and a model with this
        vocabulary."""
        from safetensors import safe_open

        path = directory / FILE
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["perce"])
                estimates = cls(*(file.get_tensor(name) for name in TENSORS), **facts)
        except Exception as error:  # whatever a missing or damaged file raises
            raise UserError(
                f"{path}: the token weights of this run cannot be read ({in_one_line(error)}). Resume from "
                "another checkpoint, or start a new run."
            ) from error
        if estimates.vocabulary != vocabulary:
            raise UserError(
                f"{path}: its weights were estimated by a model with a vocabulary of {estimates.vocabulary}, and this "
                f"one has {vocabulary}. Resume with the model that the run began with, or start a new run."
            )
        if estimates.of_signal != of_signal:
            raise UserError(
                f"{path}: its weights come from {estimates.of_signal}, and those of this objective from {of_signal}. "
                "Resume with the --objective and --contrast of the run, or start a new one."
            )
        now = response_keys(dataset)
        before = (estimates.example, estimates.length, estimates.response_crc)
        for name, saved, present in zip(TENSORS[:3], before, now, strict=True):
            if not torch.equal(saved, present):
                differing = (saved != present).nonzero() if saved.shape == present.shape else None
                where = f"from example {int(differing[0])} on" if differing is not None else "in their number"
                raise UserError(
                    f"{path}: its weights belong to other training examples than these, which differ {where} ({name}). "
                    "The data, the tokenizer or --max_length has changed: put it back, or start a new run."
                )
        return estimates


def response_keys(dataset: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(example, length, CRC-32 of the response ids), each (E,) int64, by which estimates are keyed and checked."""
    length, crcs = numbers(dataset, "response_length"), []
    of_row = iter(length.tolist())
    for column in pieces_of(dataset, "input_ids"):
        for ids in column.to_numpy(zero_copy_only=False):
            crcs.append(zlib.crc32(ids[-next(of_row) :].astype(np.int32).tobytes()))
    columns = (numbers(dataset, "example"), length, np.array(crcs))
    example, response_length, crc = (torch.from_numpy(column.astype(np.int64)) for column in columns)
    return example, response_length, crc


def check_estimable(dataset: Any, estimate: str) -> None:
    """UserError for a dataset whose examples cannot be told apart, or are not known beforehand."""
    if not hasattr(dataset, "select_columns") or not hasattr(dataset, "__len__"):
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
    dataset: Any,
    batches: Sequence[Sequence[int]],
    statistics: Callable[[Sequence[int]], Measured],
    gather: Callable[[Mapping[int, list[Tensor]]], Mapping[int, list[Tensor]]],
    *,
    epoch: int,
    vocabulary: int,
    of_signal: str,
) -> Estimates:
    """One E-step over `dataset`.

    Args:
        batches: rows of the dataset, batch by batch, that this process estimates.
        statistics: rows → the measurements of their response tokens, including the signal.
        gather: {row: its three tensors} of this process → the same of all processes.
    """
    example, length, crc = response_keys(dataset)
    of_row: dict[int, list[Tensor]] = {}
    for rows in batches:
        columns = [x.float().cpu().split(length[list(rows)].tolist()) for x in statistics(rows)[:3]]
        of_row.update({row: list(tensors) for row, tensors in zip(rows, zip(*columns, strict=True), strict=True)})
    of_row = dict(gather(of_row))
    logp, logp_cf, signal = (torch.cat([of_row[row][i] for row in range(len(dataset))]) for i in range(3))
    return Estimates(example, length, crc, logp, logp_cf, signal, epoch, vocabulary, of_signal)


def over_step(
    found: Sequence[Measured], rearrange: Callable[[Tensor], Tensor], gather: Callable[[list], list], rank: int
) -> list[Measured]:  # fmt: skip
    """The measurements of each of this process's forward passes of a step, with their signals replaced.

    `rearrange` gets the signals of all processes in the order of the examples, however they were divided into batches:
    with two processes and two forward passes each, the first pass of both, then the second.
    """
    everybody = gather([[x.signal.cpu() for x in found]])
    in_order = [signal for forward in zip(*everybody, strict=True) for signal in forward]
    given = rearrange(torch.cat(in_order)).split([len(signal) for signal in in_order])
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
