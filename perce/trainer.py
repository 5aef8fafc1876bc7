"""PerceTrainer: a transformers.Trainer whose step is two forwards and one fused loss.

    counterfactual hidden states (no grad, eval mode) → factual hidden states → fused_perce_loss, inside the head →
    backward

Everything else (optimiser, schedule, accumulation, checkpoints, resume, loggers, DDP) is the Trainer's.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow.compute
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from perce.batch import Batch, collate, token_inputs
from perce.config import DataConfig, LossConfig
from perce.dataset import rows_dataset_pairs
from perce.errors import UserError
from perce.loader import own_train_loader
from perce.model import add_adapter, check_packing, load_pretrained, load_tokenizer, prepare_model

MIB = 2**20


@dataclass
class PerceArguments(TrainingArguments):
    """TrainingArguments, the loss, and how raw rows become token pairs (its `data` path is not used here)."""

    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    tokens_per_batch: int | None = None
    """Padded tokens of a forward, instead of per_device_train_batch_size sequences; see perce.sampler."""
    packing: bool = False
    """Sequences one after the other in a single row, for flash or flex attention on a GPU."""

    def __post_init__(self) -> None:
        if self.tokens_per_batch is not None and self.tokens_per_batch < 1:
            raise UserError(f"tokens_per_batch: expected >= 1, or None, got {self.tokens_per_batch}.")
        if self.fsdp and self.use_cpu:
            raise UserError("fsdp with use_cpu: the Trainer would silently run plain data parallelism instead.")
        if self.label_smoothing_factor:
            raise UserError("label_smoothing_factor: the PerCE loss has no label smoothing. Leave it at 0.")
        # Liger's own loss would replace the forward that holds ours; its other kernels are welcome.
        self.liger_kernel_config = {
            **(self.liger_kernel_config or {}), "fused_linear_cross_entropy": False, "cross_entropy": False,
        }  # fmt: skip
        self.remove_unused_columns = False
        self.label_names = []
        self.ddp_find_unused_parameters = False
        super().__post_init__()
        if self.n_gpu > 1:
            raise UserError(
                f"{self.n_gpu} GPUs are visible to one process. Start one process a GPU (torchrun --nproc_per_node "
                f"{self.n_gpu} -m perce.train …), or show it one (CUDA_VISIBLE_DEVICES=0)."
            )

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"loss": dataclasses.asdict(self.loss), "data": dataclasses.asdict(self.data)}


@dataclass(frozen=True)
class TokenStatistics:
    """Per response token of one example, on the CPU, each (n,); and the index of the example."""

    target: Tensor
    logp: Tensor
    logp_cf: Tensor
    token_weight: Tensor
    personal: Tensor
    example: int


class PerceTrainer(Trainer):
    """Fine-tunes a causal language model with PerCE (or cross-entropy, or LongCE on documents) on token pairs.

    Args:
        model: a causal language model, or its directory or Hub id; prepared by perce.model if need be.
        args: PerceArguments.
        train_dataset, eval_dataset: `datasets` with the columns of perce.pairs.Pair or perce.documents.DocumentPair,
            or raw rows in any supported format; for training also a PairStream, for evaluation a dict of them.
        processing_class: the tokenizer; default: the model's own. Saved with every checkpoint.
        peft_config: a PEFT config, to train an adapter on the frozen model.

    Raises:
        UserError (a ValueError): a model whose logits cannot be reproduced, an adapter on its output embedding, a bad
            row, a token id that the model has no embedding for.
    """

    args: PerceArguments

    def __init__(
        self,
        model: nn.Module | str,
        args: PerceArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ):
        name = model if isinstance(model, str) else str(model.config.name_or_path)  # type: ignore[union-attr]
        tokenizer = processing_class or load_tokenizer(name)
        prepared = prepare_model(load_pretrained(model) if isinstance(model, str) else model)
        if peft_config is not None:
            prepared = add_adapter(prepared, peft_config)
        self._tokenizer = tokenizer
        self._options = args.data, args.loss
        datasets = {
            "train_dataset": self._as_pairs(train_dataset, "train_dataset"),
            "eval_dataset": self._as_pairs(eval_dataset, "eval_dataset"),
        }
        for name, dataset in datasets.items():
            _check_vocabulary(dataset, name, prepared.get_input_embeddings().weight.shape[0])
        pad_id = getattr(tokenizer, "pad_token_id", None) or 0
        kwargs.setdefault("data_collator", partial(collate, pad_id=pad_id, packing=args.packing))
        super().__init__(model=prepared, args=args, processing_class=tokenizer, **datasets, **kwargs)
        if args.packing:
            with self.compute_loss_context_manager():
                check_packing(self.model, self.args.device.type)
        # Our loss divides by num_items_in_batch; the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self.counterfactual_clock = _Clock(self.args.device)
        self.last_evaluation: list[TokenStatistics] = []  # of this process, in the order of the evaluated dataset
        self._window = _Window()
        self._logged_tokens, self._logged_seconds = 0, 0.0

    def _as_pairs(self, dataset: Any, name: str) -> Any:
        """Raw rows as token pairs; what is pairs already, or nothing, as it is."""
        if isinstance(dataset, Mapping):
            return {key: self._as_pairs(part, f"{name}[{key!r}]") for key, part in dataset.items()}
        return rows_dataset_pairs(dataset, name, self._tokenizer, *self._options) if _is_raw(dataset) else dataset

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers.Trainer.evaluate; the dataset may hold raw rows."""
        return super().evaluate(self._as_pairs(eval_dataset, "eval_dataset"), *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        loader = own_train_loader(self.train_dataset, self.data_collator, self.args)
        return super().get_train_dataloader() if loader is None else loader

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss = self.args.loss
        call: dict[str, Any] = {"num_items": num_items_in_batch, "normalize": loss.normalize}
        if loss.normalize == "sequence":
            call["seq_id"] = inputs["sequence"]
        if loss.objective == "ce":
            call["token_weight"] = torch.ones_like(inputs["target"], dtype=torch.float32)
        else:
            with self.counterfactual_clock.measure():
                call["hidden_cf"] = self.counterfactual_hidden(model, inputs)
            call |= {"clip_min": loss.clip_min, "clip_max": loss.clip_max, "contrast": loss.contrast}

        value, *statistics = model(
            **token_inputs(inputs), perce={"rows": inputs["rows"], "target": inputs["target"], "loss": call}
        )
        self._window.add(loss, *statistics, tokens=inputs["tokens"])
        # num_items counts all ranks' tokens and DDP averages the gradients, so each rank's share is multiplied back.
        value = value * self.accelerator.num_processes
        return (value, statistics) if return_outputs else value

    @torch.no_grad()
    def counterfactual_hidden(self, model: nn.Module, inputs: Batch) -> Tensor:
        """(N, D) hidden states of the response tokens without the persona. Dropout is off: with it on, the PIR of
        identical prompts would not be 0."""
        training = model.training
        model.eval()
        hidden = model(**token_inputs(inputs, "_cf"), perce={"rows": inputs["rows_cf"]})
        model.train(training)
        return hidden

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._window.start()
        return super().training_step(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._window.pause()
        super()._save_checkpoint(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: Sequence[Batch], device: torch.device) -> Tensor:
        """Response tokens of the whole accumulation window, over all ranks."""
        count = torch.tensor(sum(batch["target"].numel() for batch in batch_samples), device=device)
        return self.accelerator.reduce(count, "sum")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._logged_tokens, self._logged_seconds = self.tokens_seen, self.training_seconds
            total = self.accelerator.reduce(self._window.total.to(self.args.device), "sum")
            logs |= self._window.summary(total, self.args.loss)
            logs["peak_memory_mib"] = peak_memory_mib(self.args.device)
            self.counterfactual_clock.seconds()  # collects the events of the window
            self._window = _Window()
        super().log(logs, start_time)

    @property
    def tokens_seen(self) -> int:
        """Factual tokens this process has trained on, padding left out."""
        return self._logged_tokens + int(self._window.total[0])

    @property
    def training_seconds(self) -> float:
        """Wall clock of this process's training steps, without evaluations and checkpoints."""
        return self._logged_seconds + self._window.seconds

    @torch.no_grad()
    def token_statistics(self, model: nn.Module, inputs: Batch) -> list[TokenStatistics]:
        """Statistics of one batch under the model, in eval mode, whatever the training objective."""
        loss = self.args.loss
        call = {
            "hidden_cf": self.counterfactual_hidden(model, inputs), "clip_min": loss.clip_min,
            "clip_max": loss.clip_max, "contrast": loss.contrast,
        }  # fmt: skip
        _, *statistics = model(
            **token_inputs(inputs), perce={"rows": inputs["rows"], "target": inputs["target"], "loss": call}
        )
        per_example = torch.bincount(inputs["sequence"]).tolist()
        columns = [x.cpu().split(per_example) for x in (inputs["target"], *statistics, inputs["personal"])]
        return [TokenStatistics(*row) for row in zip(*columns, inputs["example"].tolist(), strict=True)]

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:  # fmt: skip
        """Mean loss per response token with and without the persona and of personal tokens, and mean PIR."""
        self._window.pause()
        model: Any = self.model_wrapped if self.is_in_train else self.model
        if not self.is_in_train and not self.accelerator._models:
            # As the Trainer does: moves to the device and autocasts, so that numbers before and after training compare.
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.callback_handler.eval_dataloader = dataloader  # for the progress bar
        training = model.training
        model.eval()
        rows = []
        self.last_evaluation = []
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                examples = self.token_statistics(model, inputs)
            self.last_evaluation += examples
            sums = [
                [len(x.logp), -x.logp.sum(), -x.logp_cf.sum(), x.personal.sum(), -x.logp[x.personal].sum()]
                for x in examples
            ]
            # gather_for_metrics leaves out the examples that pad the last batch to a full one on every rank
            rows.append(self.accelerator.gather_for_metrics(torch.tensor(sums, device=self.args.device)).cpu())
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(training)
        examples_seen = torch.cat(rows)
        n, ce, ce_cf, n_personal, ce_personal = examples_seen.double().sum(0).tolist()
        metrics = {
            "loss": ce / n,  # the name that load_best_model_at_end and schedulers look for
            "loss_with_persona": ce / n,
            "loss_without_persona": ce_cf / n,
            "loss_personal_tokens": ce_personal / n_personal if n_personal else float("nan"),
            "pir_mean": (ce_cf - ce) / n,
        }
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None, num_samples=len(examples_seen),
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
        )  # fmt: skip


def _is_raw(dataset: Any) -> bool:
    """Whether a dataset holds rows still to be tokenised; a string names one that the Trainer has."""
    if dataset is None or isinstance(dataset, str):
        return False
    columns = getattr(dataset, "column_names", None) or (dataset[0].keys() if isinstance(dataset, list) else ())
    return "response_length" not in columns


def _check_vocabulary(dataset: Any, name: str, vocabulary: int) -> None:
    """UserError for a token id without an embedding: on a GPU it would end the process with a device-side assert."""
    for part in dataset.values() if isinstance(dataset, Mapping) else [dataset]:
        if isinstance(part, Dataset) and len(part):
            largest = int(pyarrow.compute.max(pyarrow.compute.list_flatten(part.data["input_ids"])).as_py())
            if largest >= vocabulary:
                raise UserError(
                    f"{name}: token id {largest} is outside the model's vocabulary of {vocabulary}. Expected the "
                    "model's own tokenizer; after adding tokens, call model.resize_token_embeddings(len(tokenizer))."
                )


class _Clock:
    """Seconds spent in stretches of work. On CUDA by events, read only when asked for: no sync in a step."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spent = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self._spent += time.perf_counter() - started

    def seconds(self) -> float:
        for start, end in self._events:
            end.synchronize()
            self._spent += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._spent


class _Window:
    """Sums over the training tokens since the last log, kept on the device (no sync in a step), and a stopwatch."""

    NAMES = ("tokens", "count", "ce", "pir_mean", "weight_mean", "frac_at_floor", "frac_at_ceiling")

    def __init__(self) -> None:
        self.total = torch.zeros(len(self.NAMES), dtype=torch.float64)
        self._spent = 0.0
        self._running_since: float | None = None

    def start(self) -> None:
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def pause(self) -> None:
        self._spent, self._running_since = self.seconds, None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return self._spent + running

    def add(self, loss: LossConfig, logp: Tensor, logp_cf: Tensor, token_weight: Tensor, *, tokens: Tensor) -> None:
        pir = logp - logp_cf
        contrasted = pir.exp() if loss.contrast == "ratio" else pir
        sums = torch.stack(
            [
                tokens.to(logp), logp.new_tensor(logp.numel()), -logp.sum(), pir.sum(), token_weight.sum(),
                (contrasted <= loss.clip_min).sum().to(logp), (contrasted >= loss.clip_max).sum().to(logp),
            ]
        )  # fmt: skip
        wide = torch.float32 if sums.device.type == "mps" else torch.float64  # mps has no float64
        self.total = self.total.to(sums.device, wide) + sums.to(wide)

    def summary(self, total: Tensor, loss: LossConfig) -> Mapping[str, float]:
        """Means over all ranks' tokens; of cross-entropy alone what does not need the counterfactual pass."""
        tokens, count, *sums = total.tolist()
        if not count:
            return {}
        means = {name: value / count for name, value in zip(self.NAMES[2:], sums, strict=True)}
        if loss.objective == "ce":
            means = {"ce": means["ce"]}
        return means | {"tokens_per_second": tokens / max(self.seconds, 1e-9)}


def peak_memory_mib(device: torch.device) -> float:
    """Peak CUDA allocation, or the process's peak resident set, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024
