"""PerceTrainer: a transformers.Trainer whose step is two forward passes and one fused loss.

    counterfactual hidden states (no grad, eval mode) → factual hidden states → fused_perce_loss, inside the head →
    backward

Everything else (optimiser, schedule, accumulation, loggers, DDP) is the Trainer's. Checkpoints and resuming are in
resumable.py.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from perce.data.batch import Batch, collate
from perce.data.sharing import Sharing
from perce.errors import UserError
from perce.hub import load_pretrained, load_tokenizer
from perce.model.auxiliary import check_own_loss, router_of
from perce.model.loading import add_adapter, check_adapter
from perce.model.memory import prepare_memory
from perce.model.passes import (
    TokenStatistics,
    counterfactual_hidden,
    experts_used,
    factual,
    measured,
    token_statistics,
)  # fmt: skip
from perce.model.patch import prepare_model
from perce.model.probe import evaluating, vocabulary_of
from perce.model.reach import freeze_beside_text
from perce.objectives import HeadCall, Measured
from perce.training.arguments import PerceArguments, refuse_other_weights
from perce.training.balancing import StepBalance, check_balancing
from perce.training.best import EarlyStopping, check_metric
from perce.training.checks import (
    check_arguments,
    check_dealt,
    check_hooks,
    check_sharding,
    check_trunks,
    try_packing,
    try_step,
    warn_of_dropout,
)  # fmt: skip
from perce.training.datasets import check_factors, checked_pairs, settle_factors
from perce.training.estimates import EStep, Estimates, check_estimable, estimate, over_step
from perce.training.evaluating import in_order_of_dataset, metrics_of, sums_of
from perce.training.loader import estimation_batches, own_eval_loader, own_train_loader
from perce.training.meters import Clock, Window, peak_memory_mib, progress_of
from perce.training.normalizer import StepNormalizer
from perce.training.parallel import found_by_first, keep_outputs_exact
from perce.training.resumable import ResumableTrainer
from perce.training.serving import serve_as_trained
from perce.training.shared import has_shared, shared_by, tokens_of


class PerceTrainer(ResumableTrainer):
    """Fine-tunes a causal language model with PerCE, or another objective of perce/objectives.py, on token pairs.

    Args:
        model: a causal language model, or its directory or Hub id; prepared by model/patch.py if need be.
        args: PerceArguments.
        train_dataset, eval_dataset: `datasets` with the columns of a data.pairs.Pair or data.documents.DocumentPair,
            or raw rows in any supported format. For training also a PairStream; for evaluation also a dict of datasets,
            and a stream, which is read whole.
        processing_class: the tokenizer; default: the model's own. Saved with every checkpoint.
        peft_config: a PEFT config, to train an adapter on the frozen model.

    Raises:
        UserError (a ValueError): a model whose logits cannot be reproduced, an adapter on its output embedding, a bad
            row, a token id that the model has no embedding for, a hook of the Trainer's that needs logits, a part of
            the model's own loss that would be left out.
    """

    args: PerceArguments

    def __init__(
        self, model: nn.Module | str, args: PerceArguments, train_dataset: Any = None, eval_dataset: Any = None,
        processing_class: Any = None, peft_config: Any = None, **kwargs: Any,
    ):  # fmt: skip
        check_arguments(args, model, train_dataset, peft_config)
        check_hooks(kwargs)
        for option in ("optimizers", "optimizer_cls_and_kwargs"):
            refuse_other_weights(option, (kwargs.get(option) or (None,))[0])
        check_metric(args, eval_dataset)
        name = model if isinstance(model, str) else str(model.config.name_or_path)  # type: ignore[union-attr]
        tokenizer = processing_class or load_tokenizer(name)
        prepared = _prepared(model, args, peft_config, trains=train_dataset is not None)
        if router := router_of(prepared, args.loss.router_aux_loss_coef):
            check_balancing(args)
        # Read now: once DeepSpeed has partitioned the weights, they no longer show it.
        vocabulary = vocabulary_of(prepared)
        self._checked_pairs = partial(
            checked_pairs, tokenizer=tokenizer, args=args, config=prepared.config, vocabulary=vocabulary
        )
        datasets = {
            "train_dataset": self._checked_pairs(train_dataset, "train_dataset"),
            "eval_dataset": self._checked_pairs(eval_dataset, "eval_dataset"),
        }
        self._factors_settled = settle_factors(prepared, datasets, args.data.max_length)
        served = copy.deepcopy(tokenizer)  # the copy is completed and saved; the caller's stays as it is
        super().__init__(model=prepared, args=args, processing_class=served, **datasets, **kwargs)
        serve_as_trained(prepared, served, self.train_dataset, args.data)
        check_sharding(self, args.memory)
        prepare_memory(self.model, args.memory)
        if args.packing:
            try_packing(self.model, args)
        pad_id: Any = getattr(tokenizer, "pad_token_id", None)
        collator = self._own_collator(pad_id if pad_id in range(vocabulary) else 0)  # any id will do: no token sees it
        if kwargs.get("data_collator") is None:
            self.data_collator = collator
        found_by_first(partial(try_step, self, collator))
        # Our loss divides by num_items_in_batch; the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self.estimation_clock = Clock(self.args.device)
        self.estimates: Estimates | None = None  # None: weights are estimated online
        # Measurements of the step's forward passes to come, for objectives that look at the whole step.
        self._over_step: list[Measured] = []
        if args.loss.estimate != "online":
            check_estimable(self.train_dataset, args.loss.estimate)
            self.add_callback(EStep(self))
        elif args.loss.entry.contrasts:
            warn_of_dropout(prepared)
        if args.early_stopping:
            self.add_callback(EarlyStopping(args.early_stopping))
        self.last_evaluation: list[TokenStatistics] = []  # this process's, in the order of the evaluated dataset
        self._window = Window(self.args.device)  # since the last log
        self._logged_tokens, self._logged_seconds = 0, 0.0
        self._computed = torch.zeros(2, dtype=torch.int64, device=self.args.device)
        self._normalizer = StepNormalizer(self.args.device) if args.loss.normalize == "batch" else None
        self._balance = StepBalance(router, partial(self.accelerator.reduce, reduction="sum")) if router else None
        self._top_k = router.top_k if router else 0

    def _own_collator(self, pad_id: int) -> Callable[..., Batch]:
        """Find out what the examples of a batch can share, and what those share that the trainer is for; and the
        collator that lets them."""
        args, memory = self.args, self.args.memory
        # not_all_shared: why not everything is shared that could be; "" if everything is.
        able, self.not_all_shared = shared_by(self.model, args, self.train_dataset, self.eval_dataset)
        asked = self.eval_dataset if self.train_dataset is None else self.train_dataset
        self.sharing: Sharing = able if has_shared(asked, memory) else "none"
        if self.sharing != "none" and self.train_dataset is not None:
            check_dealt(args)
        return partial(
            collate, pad_id=pad_id, packing=args.packing, sharing=able, unit=memory.unit,
            persona_grad=memory.persona_grad, branches_per_forward=memory.branches_per_forward,
        )  # fmt: skip

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        keep_outputs_exact(getattr(self.accelerator.state, "fsdp_plugin", None))

    def get_train_dataloader(self) -> DataLoader:
        loader = own_train_loader(self.train_dataset, self.data_collator, self.args, self.sharing)
        return super().get_train_dataloader() if loader is None else loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Like transformers.Trainer's, but always of this dataset, all of its examples, in its order or conversation by
        conversation."""
        own: Any = self.eval_dataset
        dataset = own if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = own.get(dataset) if isinstance(own, dict) else None
        if dataset is None:
            raise UserError(
                f"eval_dataset: expected a dataset, or the name of one that the trainer has, got {eval_dataset!r}."
            )
        return own_eval_loader(dataset, self.data_collator, self.args)

    # ---- a step

    def _get_num_items_in_batch(self, batch_samples: Sequence[Batch], device: torch.device) -> Tensor:
        """Begin a step: find out what its forward passes have to know of each other. Returns its response tokens, over
        all ranks."""
        self._window.begin_step()
        if self._normalizer:
            self._normalizer.begin()
        if self._balance:
            several = batch_samples if len(batch_samples) > 1 else ()
            self._balance.begin([self._counting_pass(batch) for batch in several])
        if of_step := self.args.loss.entry.over_step:
            with self.estimation_clock.measure():
                found = [self._estimates_of(batch) or self._estimated(batch) for batch in batch_samples]
            seed = self.args.seed * 1_000_003 + self.state.global_step
            self._over_step = over_step(found, lambda x: of_step(x, seed), self.args.process_index)
        # torch.tensor would wait until all earlier work on the device is done.
        count = torch.full((), sum(batch["target"].numel() for batch in batch_samples), device=device)
        return self.accelerator.reduce(count, "sum")

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._normalizer:
            return loss
        if not self.accelerator.sync_gradients:
            return self._normalizer.add_loss(loss)
        tokens = inputs["target"].numel() if num_items_in_batch is None else num_items_in_batch
        return self._normalizer.finish(model, loss, self.accelerator.reduce(self._normalizer.weight, "sum"), tokens)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """One forward pass of a step. Returns its share of the step's loss, 0-d, times the number of processes; with
        return_outputs also the first four numbers of Measured."""
        check_trunks(inputs, self.args.memory)
        loss = self.args.loss.at(progress_of(self.state))
        known = self._known(inputs)
        hidden_cf = None
        if loss.entry.counterfactual and not known:  # the online E-step; the head does the rest
            with self.estimation_clock.measure():
                hidden_cf = counterfactual_hidden(model, inputs)
        call = HeadCall(
            inputs["target"], loss.weighting, hidden_cf, inputs.get("personal"), known and known.signal,
            num_items=num_items_in_batch,
            seq_id=inputs["sequence"] if loss.normalize == "sequence" else None,  # "batch": see StepNormalizer
            data_weight=inputs.get("data_weight"),
        )  # fmt: skip
        done = factual(model, inputs, call, top_k=self._top_k)
        total, balance = done.loss, None
        if self._balance:
            balance = self._balance.share(done.experts)
            total = total + self._balance.router.coefficient * balance
        if self._normalizer:
            self._normalizer.add_weights(done.token_weight)
        pir = (known or done).logp - (known or done).logp_cf
        self._window.add(self.args.loss, done, pir, inputs["lengths"].sum(), balance)
        if self.sharing != "none" and "tokens" in inputs:  # the caller's own collator may not count them
            self._computed += tokens_of(inputs, counterfactual=hidden_cf is not None)
        # num_items counts all ranks' tokens and DDP averages the gradients, so each rank's share is multiplied back.
        value = total * self.accelerator.num_processes
        return (value, done[:4]) if return_outputs else value

    def _known(self, inputs: Batch) -> Measured | None:
        """What was measured before this forward pass to compute its weights; None if the weights are computed in it."""
        if not self.args.loss.entry.over_step:
            return self._estimates_of(inputs)
        assert self._over_step, "weights that depend on a whole step are known only in train()"
        return self._over_step.pop(0)

    def _estimates_of(self, inputs: Batch) -> Measured | None:
        return self.estimates.of(inputs["example"], inputs["target"].device) if self.estimates else None

    def _counting_pass(self, inputs: Batch) -> Tensor:
        """The counting pass of one batch, (E,): one more factual pass, in eval mode, for the load-balancing loss."""
        with self.compute_loss_context_manager():
            return experts_used(self._model_now, self._prepare_inputs(inputs), self._top_k)

    # ---- weights that are estimated before the steps that use them

    @torch.no_grad()
    def estimate(self, epoch: int) -> None:
        """The E-step over all training examples, divided over the processes; draws no random numbers."""
        dataset: Any = self.train_dataset
        batches = estimation_batches(dataset, self.args, self.sharing != "none")
        self._window.start()
        with self.estimation_clock.measure():
            self.estimates = estimate(
                dataset, batches, lambda rows: self._estimated(self.data_collator([dataset[row] for row in rows])),
                epoch=epoch, of_signal=self.args.loss.weighting.signal_name,
            )  # fmt: skip

    def _estimated(self, inputs: Batch) -> Measured:
        """The E-step of one batch, in eval mode and without drawing random numbers."""
        loss = self.args.loss
        with evaluating(self._model_now), self.compute_loss_context_manager():
            inputs = self._prepare_inputs(inputs)
            return measured(self._model_now, inputs, loss.weighting, counterfactual=loss.entry.counterfactual)

    @property
    def _model_now(self) -> Any:
        """The model, wrapped for several processes while it trains."""
        return self.model_wrapped if self.is_in_train else self.model

    def restore(self, checkpoint: Path) -> None:
        if self.args.loss.estimate != "online":
            signal = self.args.loss.weighting.signal_name
            self.estimates = Estimates.load(checkpoint, self.train_dataset, signal)

    def save_beside(self, checkpoint: Path) -> None:
        self._window.pause()
        if self.estimates is not None and self.args.should_save:
            self.estimates.save(checkpoint)

    # ---- evaluations

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Like transformers.Trainer.evaluate; the dataset may hold raw rows."""
        known, max_length = isinstance(eval_dataset, str), self.args.data.max_length  # the name of one that it has
        pairs = eval_dataset if known else self._checked_pairs(eval_dataset, "eval_dataset")
        if not self._factors_settled:
            self._factors_settled = settle_factors(self.model, pairs, max_length)
        check_factors(self.model, pairs, max_length)
        return super().evaluate(pairs, *args, **kwargs)

    @torch.random.fork_rng(devices=())  # a loader draws a seed, and a resumed run evaluates at other times
    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:  # fmt: skip
        """The numbers of metrics_of, over all processes; keeps the statistics of this process's examples."""
        self._window.pause()
        model = self._model_now
        if not self.is_in_train and not self.accelerator._models:
            # As the Trainer does: moves to the device and autocasts, so that numbers from before and after training are
            # comparable.
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.callback_handler.eval_dataloader = dataloader  # for the progress bar
        self.last_evaluation, batches = [], []
        with evaluating(model):
            for inputs in dataloader:
                with self.compute_loss_context_manager():
                    weighting = self.args.loss.weighting.reported
                    batches.append(token_statistics(model, self._prepare_inputs(inputs), weighting))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.last_evaluation = in_order_of_dataset(batches, dataloader)
        sums = sums_of(batches, dataloader.dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics_of(sums).items()}
        nothing: Any = None  # no logits are kept
        return EvalLoopOutput(predictions=nothing, label_ids=nothing, metrics=metrics, num_samples=len(sums))

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise UserError("predict: would return logits, which PerceTrainer never holds. Use trainer.evaluate(dataset).")

    # ---- what a run says of itself

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._logged_tokens, self._logged_seconds = self.tokens_seen, self.training_seconds
            total = self.accelerator.reduce(self._window.total, "sum")
            logs |= self._window.summary(total, self.args.loss, balanced=self._balance is not None)
            logs["peak_memory_mib"] = peak_memory_mib(self.args.device)
            self.estimation_clock.seconds()  # collects the events of the window
            self._window = Window(self.args.device)
        super().log(logs, start_time)

    @property
    def tokens_seen(self) -> int:
        """Factual tokens that this process has trained on, without padding."""
        return self._logged_tokens + int(self._window.total[0])

    def tokens_computed(self) -> tuple[int, int]:
        """(computed, needed) input tokens of all processes' steps since they were started: those that were computed,
        and those that the examples have. To be called on every process."""
        computed, needed = self.accelerator.reduce(self._computed, "sum").tolist()
        return computed, needed

    @property
    def training_seconds(self) -> float:
        """Wall clock of this process's training steps, without evaluations and checkpoints."""
        return self._logged_seconds + self._window.seconds


def _prepared(model: Any, args: PerceArguments, peft_config: Any, trains: bool) -> Any:
    """The model, loaded if this is its name, with the forward of model/patch.py and the adapter that is asked for."""
    if isinstance(model, str):  # not in the checkpoint's own dtype: weights that are trained in bf16 hardly move
        model = load_pretrained(model, dtype=torch.bfloat16 if args.bf16 and peft_config else torch.float32)
    prepared = prepare_model(model, args.backend)
    if peft_config is not None:
        prepared = add_adapter(prepared, peft_config)
    elif hasattr(prepared, "peft_config"):  # the trial step refuses adapters that no text reaches
        check_adapter(prepared)
    elif trains:
        freeze_beside_text(prepared)
    check_own_loss(prepared)
    return prepared
