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

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from perce.batch import Batch, collate
from perce.config import DataConfig, LossConfig
from perce.dataset import rows_dataset_pairs
from perce.errors import UserError
from perce.model import add_adapter, load_pretrained, load_tokenizer, prepare_model

MIB = 2**20


@dataclass
class PerceArguments(TrainingArguments):
    """TrainingArguments, the loss, and how raw rows become token pairs (its `data` path is not used here)."""

    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        if self.fsdp and self.use_cpu:
            raise UserError("fsdp with use_cpu: the Trainer would silently run plain data parallelism instead.")
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
    """Fine-tunes a causal language model with PerCE (or plain cross-entropy) on token pairs.

    Args:
        model: a causal language model, or its directory or Hub id. Prepared here if perce.model.prepare_model has not
        been
            called on it.
        args: PerceArguments.
        train_dataset, eval_dataset: `datasets` with the columns of perce.pairs.Pair, or raw rows in any supported
        format. processing_class: the tokenizer; default: the model's own. Saved with every checkpoint.
        peft_config: a PEFT config, to train an adapter on the frozen model.

    Raises:
        UserError (a ValueError): a model whose logits cannot be reproduced, an adapter on its output embedding, a bad
        row.
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
        datasets = {
            split: rows_dataset_pairs(dataset, split, tokenizer, args.data) if _is_raw(dataset) else dataset
            for split, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset))
        }
        kwargs.setdefault("data_collator", partial(collate, pad_id=getattr(tokenizer, "pad_token_id", None) or 0))
        super().__init__(model=prepared, args=args, processing_class=tokenizer, **datasets, **kwargs)
        self.model_accepts_loss_kwargs = (
            True  # our loss divides by num_items_in_batch; the Trainer must not divide again
        )
        self.clock = _Clock(self.args.device)
        self._tokens_logged = 0
        self.last_evaluation: list[TokenStatistics] = []  # of this process, in the order of eval_dataset
        self._window = _Window()

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
            with self.clock.measure("counterfactual"):
                call["hidden_cf"] = self.counterfactual_hidden(model, inputs)
            call |= {"clip_min": loss.clip_min, "clip_max": loss.clip_max, "contrast": loss.contrast}

        value, *statistics = model(
            input_ids=inputs["input_ids"],
            perce={"rows": inputs["rows"], "target": inputs["target"], "loss": call},
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
        hidden = model(input_ids=inputs["input_ids_cf"], perce={"rows": inputs["rows_cf"]})
        model.train(training)
        return hidden

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._window.start()
        with self.clock.measure("total"):
            return super().training_step(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: Sequence[Batch], device: torch.device) -> Tensor:
        """Response tokens of the whole accumulation window, over all ranks."""
        count = torch.tensor(sum(batch["target"].numel() for batch in batch_samples), device=device)
        return self.accelerator.reduce(count, "sum")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._tokens_logged = self.tokens_seen
            total = self.accelerator.reduce(self._window.total.to(self.args.device), "sum")
            logs |= self._window.summary(total)
            logs["peak_memory_mib"] = peak_memory_mib(self.args.device)
            self._window = _Window()
        super().log(logs, start_time)

    @property
    def tokens_seen(self) -> int:
        """Factual tokens this process has trained on, padding left out."""
        return self._tokens_logged + int(self._window.total[0])

    @torch.no_grad()
    def token_statistics(self, model: nn.Module, inputs: Batch) -> list[TokenStatistics]:
        """Statistics of one batch under the model, in eval mode, whatever the training objective."""
        loss = self.args.loss
        call = {
            "hidden_cf": self.counterfactual_hidden(model, inputs), "clip_min": loss.clip_min,
            "clip_max": loss.clip_max, "contrast": loss.contrast,
        }  # fmt: skip
        _, *statistics = model(
            input_ids=inputs["input_ids"], perce={"rows": inputs["rows"], "target": inputs["target"], "loss": call}
        )
        per_example = torch.bincount(inputs["sequence"]).tolist()
        columns = [x.cpu().split(per_example) for x in (inputs["target"], *statistics, inputs["personal"])]
        return [TokenStatistics(*row) for row in zip(*columns, inputs["example"].tolist(), strict=True)]

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:  # fmt: skip
        """Mean loss per response token with and without the persona and of personal tokens, and mean PIR."""
        model: Any = self.model_wrapped if self.is_in_train else self._wrap_model(self.model, training=False)  # type: ignore[arg-type]
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
    """Whether a dataset holds rows still to be tokenised."""
    if dataset is None:
        return False
    columns = getattr(dataset, "column_names", None) or (dataset[0].keys() if isinstance(dataset, list) else ())
    return "persona_span" not in columns


class _Clock:
    """Seconds spent in named stretches of work. On CUDA by events, read only when asked for: no sync in a step."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spent: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            started = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - started)

    def seconds(self, name: str) -> float:
        for event_name, start, end in self._events:
            end.synchronize()
            self._add(event_name, start.elapsed_time(end) / 1000)
        self._events.clear()
        return self._spent.get(name, 0.0)

    def _add(self, name: str, seconds: float) -> None:
        self._spent[name] = self._spent.get(name, 0.0) + seconds


class _Window:
    """Sums over the training tokens since the last log, kept on the device: no sync in a step."""

    NAMES = ("tokens", "count", "ce", "pir_mean", "weight_mean", "frac_at_floor", "frac_at_ceiling")

    def __init__(self) -> None:
        self.started = 0.0
        self.total = torch.zeros(len(self.NAMES), dtype=torch.float64)

    def start(self) -> None:
        self.started = self.started or time.perf_counter()

    def add(self, loss: LossConfig, logp: Tensor, logp_cf: Tensor, token_weight: Tensor, *, tokens: Tensor) -> None:
        if loss.objective == "ce":
            pir = clipped = torch.full_like(logp, float("nan"))
        else:
            pir = logp - logp_cf
            clipped = pir.exp() if loss.contrast == "ratio" else pir
        sums = torch.stack(
            [
                tokens.to(logp), logp.new_tensor(logp.numel()), -logp.sum(), pir.sum(), token_weight.sum(),
                (clipped <= loss.clip_min).sum().to(logp),
                (clipped >= loss.clip_max).sum().to(logp),
            ]
        )  # fmt: skip
        self.total = self.total.to(sums.device) + sums.double()

    def summary(self, total: Tensor) -> Mapping[str, float]:
        """Means over all ranks' tokens; what the objective does not compute is left out."""
        tokens, count, *sums = total.tolist()
        if not count:
            return {}
        means = {name: value / count for name, value in zip(self.NAMES[2:], sums, strict=True)}
        if means["pir_mean"] != means["pir_mean"]:
            means = {"ce": means["ce"]}
        self.start()
        return means | {"tokens_per_second": tokens / (time.perf_counter() - self.started)}


def peak_memory_mib(device: torch.device) -> float:
    """Peak CUDA allocation, or the process's peak resident set, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024
