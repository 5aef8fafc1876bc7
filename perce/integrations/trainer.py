"""PerCE in any transformers.Trainer: `class MyTrainer(PerceMixin, Trainer)`, on rows in the form of data/marked.py.

The trainer's own compute_loss runs unchanged. The function that it calls as its model runs both passes and returns our
loss.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import has_length
from transformers.utils import ModelOutput

from perce.config.options import require
from perce.config.schema import LossConfig
from perce.data.batch import Batch
from perce.data.marked import PersonaCollator, check_marked
from perce.errors import UserError
from perce.model.auxiliary import check_own_loss, load_balance, router_of
from perce.model.loading import check_adapter, check_backend
from perce.model.noise import disable_dropout
from perce.model.passes import counterfactual_hidden, factual
from perce.model.patch import CALLED_PAST_US, prepare_model
from perce.objectives import HeadCall, Measured
from perce.training.checks import check_hooks, check_online, check_trainer, try_collated, warn_of_dropout
from perce.training.meters import Window, evaluation, progress_of
from perce.training.parallel import found_by_first, keep_outputs_exact
from perce.training.weights import WeightsOfCheckpoints
from perce.visible import listed


@dataclass
class TokenOutput(ModelOutput):
    """The fields of a model's output that the compute_loss of transformers and that of TRL read."""

    loss: Tensor | None = None  # 0-d, the mean
    log_probs: Tensor | None = None  # (1,): −Σ weight · cross-entropy, from which TRL makes the mean itself
    label_mask: Tensor | None = None  # (N,), like entropy and is_top1
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    aux_loss: Tensor | None = None  # 0-d, the load-balancing loss of this forward pass

    @property
    def logits(self) -> Any:
        raise NoLogits(
            "logits: are never held, so a compute_loss cannot read them. The output's loss is that of PerCE."
        )

    def get(self, key: Any, default: Any = None) -> Any:
        return self.logits if key == "logits" else super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        return self.logits if key in ("logits", 1) else super().__getitem__(key)  # 1: where other outputs have them


class NoLogits(UserError, AttributeError):
    """An AttributeError too, so that hasattr and getattr with a default find none."""


class PerceMixin(WeightsOfCheckpoints):
    """A base class to put before a transformers.Trainer, which makes the loss of the trainer PerCE's.

    The loss is the mean over the tokens of a step, from all its forward passes and processes. Logs also have `ce`,
    `pir_mean`, `weight_mean` and the shares at the bounds of the clip. Evaluations compute cross-entropy; their
    `loss_with_persona`, `loss_without_persona` and `pir_mean` are means over all tokens, `loss` is the Trainer's own.

    Args:
        args, kwargs: those of the Trainer. The data_collator becomes a PersonaCollator; the model is patched in place.
        loss: a perce.LossConfig; weights are estimated online and are not normalised.
        backend: argument of fused_perce_loss.

    Raises:
        UserError (a ValueError): a model that PerceTrainer refuses, hooks that need logits, label smoothing, noise in
            only one of the passes, sequences that are divided over processes, or a trial step whose result differs
            from that of the model's logits.
    """

    data_collator: Any
    top1 = False
    """Whether each forward pass also measures accuracy and entropy, which costs one more matrix product."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__  # the Trainer's methods would be called, and none of PerceMixin's or of its base
        if Trainer in order and order.index(Trainer) < order.index(WeightsOfCheckpoints):
            bases = sorted(cls.__bases__, key=lambda base: not issubclass(base, PerceMixin))
            right = ", ".join(base.__name__ for base in bases)
            raise UserError(f"{cls.__name__}: expected PerceMixin before the Trainer: class {cls.__name__}({right}).")

    def __init__(self, *args: Any, loss: LossConfig | None = None, backend: str = "auto", **kwargs: Any):
        require(loss is None or isinstance(loss, LossConfig), "loss", "a perce.LossConfig", loss)
        self.perce_loss = loss or LossConfig()
        check_online(self.perce_loss)
        check_hooks(kwargs)
        given = kwargs.get("model", args[0] if args else None)
        try:
            super().__init__(*args, **kwargs)
        except AttributeError as error:
            if not isinstance(given, str) or "'str' object" not in str(error):
                raise
            raise UserError(
                f"model: expected a model, got the name {given!r}, and this trainer does not load models. Load "
                "it with transformers' AutoModelForCausalLM.from_pretrained."
            ) from error
        options, model = self.args, self.model
        check_trainer(self, self.perce_loss)
        self.model_accepts_loss_kwargs = True  # such as the number of tokens of a step, which the mean divides by
        keep_outputs_exact(getattr(self.accelerator.state, "fsdp_plugin", None))
        if isinstance(given, str):
            disable_dropout(model)
        prepare_model(model, check_backend(backend, options.device))
        if hasattr(model, "peft_config"):
            check_adapter(model)
            if self.perce_loss.entry.contrasts:
                warn_of_dropout(model)
        check_own_loss(model)
        self._router = router_of(model, self.perce_loss.router_aux_loss_coef)
        if self.perce_loss.entry.counterfactual:
            check_marked(self.train_dataset)
        if not isinstance(self.data_collator, PersonaCollator):
            self.data_collator = PersonaCollator(self.data_collator)
        self._window = Window(self.args.device)
        self._count: Any = None  # the tokens of the step that is being made
        self._evaluated: Any = None  # the loader of the evaluation that is being made
        found_by_first(partial(try_collated, self, self._collators_without()))

    def _collators_without(self) -> dict[str, PersonaCollator]:
        """For each option that changes how batches are made, the collator without it: a trial step may fail because of
        the option."""
        return {}

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        self._window.start()
        if self._count is not None and len(args) < 2 and kwargs.get("num_items_in_batch") is None:
            kwargs["num_items_in_batch"] = self._count  # a subclass did not hand it on
        return super().compute_loss(partial(self._both_passes, model), inputs, *args, **kwargs)

    def _both_passes(self, model: nn.Module, *args: Any, num_items_in_batch: Any = None, **inputs: Any) -> TokenOutput:
        """Called in place of the model's own forward."""
        if args or "rows_cf" not in inputs:
            names = listed(["one without a name"] * len(args) + sorted(inputs))
            raise UserError(
                f"compute_loss: expected model(**inputs) with all fields of a PersonaCollator's batch, got {names}. A "
                "compute_loss has left out others, or the data_collator is another one."
            )
        training, router, self._computed = self.model.training, self._router, True
        loss = self.perce_loss.at(progress_of(self.state))
        hidden_cf = counterfactual_hidden(model, inputs) if loss.entry.counterfactual else None
        call = HeadCall(inputs["target"], loss.weighting, hidden_cf, loss=training, num_items=1, top1=self.top1)
        done = factual(model, inputs, call, top_k=router.top_k if router else 0)
        once = self._without_repeats(done, inputs["of_row"])
        self._window.add(self.perce_loss, once, once.logp - once.logp_cf, inputs["uses"].sum())
        total, handed_on = done.loss if training else -done.logp.sum(), num_items_in_batch is not None
        count = num_items_in_batch if handed_on else self._count
        mean = total / torch.as_tensor(len(done.logp) if count is None else count).clamp(min=1)
        forwards = self.current_gradient_accumulation_steps if training else 1
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        aux = None
        if router:  # the Trainer sums the losses of forwards and processes if it counts tokens; this makes a mean
            aux = load_balance(done.experts[1], done.experts[0].detach(), router.top_k)
            mean = mean + router.coefficient * aux / (1 if count is None else forwards * processes)
        if count is not None and not handed_on:
            mean = mean * processes  # DDP takes their mean; a compute_loss that hands the count on does this itself
        if self._count is not None and self._takes_mean_of_forwards():
            mean, total = mean * forwards, total * forwards
            aux = None if aux is None else aux * forwards
        mask = torch.ones_like(inputs["target"], dtype=torch.bool)
        return TokenOutput(mean, -total[None], mask, done.entropy, done.top1, aux)

    def _takes_mean_of_forwards(self) -> bool:
        """Whether the Trainer divides the loss by the number of forward passes. A class may declare it; older versions
        of transformers do not read the declaration."""
        return hasattr(Trainer, "loss_is_scaled_for_ga") and self.loss_is_scaled_for_ga is False

    def _without_repeats(self, done: Measured, of_row: Tensor) -> Measured:
        """What was measured of rows that an evaluation has not had: accelerate repeats some to fill the last batches of
        all processes."""
        loader = self._evaluated
        if not getattr(loader, "end_of_dataloader", False) or loader.remainder <= 0:
            return done
        first = self.accelerator.process_index * (loader.total_batch_size // self.accelerator.num_processes)
        kept = of_row + first < loader.remainder
        of_tokens = ("logp", "logp_cf", "signal", "token_weight")
        return done._replace(**{name: getattr(done, name)[kept] for name in of_tokens})

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if num_items_in_batch is None:
            raise UserError("training_step: expected num_items_in_batch, by which the loss is divided. Hand it on.")
        with self._our_loss(num_items_in_batch):
            return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._our_loss():
            return super().prediction_step(*args, **kwargs)

    @contextmanager
    def _our_loss(self, count: Any = None) -> Iterator[None]:
        """UserError if none of the forward passes in this context computed the loss of this class. count: the tokens of
        the step, for a compute_loss that does not hand them on."""
        self._computed, self._count = False, count
        try:
            yield
        finally:
            self._count = None
        if not self._computed:
            raise UserError(CALLED_PAST_US)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self._summary()
            self._window = Window(self.args.device)
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        dataset = getattr(dataloader, "dataset", None)
        if has_length(dataset) and not len(dataset):
            raise UserError("eval_dataset: expected at least one row, got none.")
        shared = isinstance(dataset, IterableDatasetShard)
        if shared:
            warnings.warn(
                "eval_dataset: a stream that several processes share has no known end, so rows that accelerate repeats "
                "to fill the last batches count twice. Give a Dataset for exact numbers.",
                stacklevel=2,
            )
        window, self._window = self._window, Window(self.args.device)
        window.pause()
        self._evaluated = None if shared else dataloader
        try:
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
            found = evaluation(self._summary())
        finally:
            self._window, self._evaluated = window, None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def _summary(self) -> dict[str, float]:
        total = self.accelerator.reduce(self._window.total, "sum")
        return {**self._window.summary(total, self.perce_loss)}

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise UserError("predict: would return logits, which are never held whole. Use trainer.evaluate(dataset).")
