"""PerCE in any transformers.Trainer: `class MyTrainer(PerceMixin, Trainer)`, on rows as data/marked.py has them.

The trainer's own compute_loss runs as it is. What it calls as its model makes both passes and answers with our loss.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import ModelOutput

from perce.config.schema import LossConfig
from perce.data.batch import Batch
from perce.data.marked import PersonaCollator
from perce.errors import UserError
from perce.model.auxiliary import check_own_loss, load_balance, router_of
from perce.model.loading import check_adapter, check_backend
from perce.model.noise import disable_dropout
from perce.model.passes import counterfactual_hidden, factual
from perce.model.patch import prepare_model
from perce.objectives import HeadCall
from perce.training.checks import check_hooks, check_online, check_trainer, try_collated, warn_of_dropout
from perce.training.meters import Window, evaluation
from perce.training.parallel import found_by_first, keep_outputs_exact


@dataclass
class TokenOutput(ModelOutput):
    """What compute_loss, transformers' and TRL's, reads of a model's output."""

    loss: Tensor | None = None  # 0-d, the mean
    log_probs: Tensor | None = None  # (1,): −Σ weight · cross-entropy, of which TRL makes the mean itself
    label_mask: Tensor | None = None  # (N,), as entropy and is_top1
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    aux_loss: Tensor | None = None  # 0-d, load balancing of this forward


class PerceMixin(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Stands before a transformers.Trainer among the bases of a class, and makes its loss PerCE's.

    The loss is the mean over the tokens of a step, of all its forwards and processes. Logs have `ce`, `pir_mean`,
    `weight_mean` and the shares at the clip besides. Evaluations are of cross-entropy; `loss_with_persona`,
    `loss_without_persona` and `pir_mean` are means over all tokens, `loss` is as the Trainer makes it.

    Args:
        args, kwargs: the Trainer's own. Its data_collator becomes a PersonaCollator, and the model is patched in place.
        loss: a perce.LossConfig; weights are estimated online, and not normalised.
        backend: of fused_perce_loss.

    Raises:
        UserError (a ValueError): what PerceTrainer refuses of a model, hooks that want logits, label smoothing, noise
            in one of the passes, sequences that are cut over processes, a trial step unlike that of the model's logits.
    """

    data_collator: Any
    top1 = False
    """Whether each forward measures accuracy and entropy too, which costs a product more."""

    def __init__(self, *args: Any, loss: LossConfig | None = None, backend: str = "auto", **kwargs: Any):
        self.perce_loss = loss or LossConfig()
        check_online(self.perce_loss)
        check_hooks(kwargs)
        super().__init__(*args, **kwargs)
        options, model = self.args, self.model
        check_trainer(self, self.perce_loss)
        self.model_accepts_loss_kwargs = True  # the tokens of a step, by which the mean is made
        keep_outputs_exact(getattr(self.accelerator.state, "fsdp_plugin", None))
        if isinstance(kwargs.get("model", args[0] if args else None), str):
            disable_dropout(model)
        prepare_model(model, check_backend(backend, options.device))
        if hasattr(model, "peft_config"):
            check_adapter(model)
            if self.perce_loss.entry.contrasts:
                warn_of_dropout(model)
        check_own_loss(model)
        self._router = router_of(model, self.perce_loss.router_aux_loss_coef)
        if not isinstance(self.data_collator, PersonaCollator):
            self.data_collator = PersonaCollator(self.data_collator)
        self._window = Window()
        found_by_first(partial(try_collated, self, self._collators_without()))

    def _collators_without(self) -> dict[str, PersonaCollator]:
        """By options that decide how a batch is made, the collator without: one may be why a trial step fails."""
        return {}

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        self._window.start()
        return super().compute_loss(partial(self._both_passes, model), inputs, *args, **kwargs)

    def _both_passes(self, model: nn.Module, num_items_in_batch: Any = None, **inputs: Any) -> TokenOutput:
        """In place of the model's own forward."""
        if "rows_cf" not in inputs:
            raise UserError("data_collator: expected a PersonaCollator, whose batches are of both passes.")
        state, training, router = self.state, self.model.training, self._router
        loss = self.perce_loss.at(min(state.global_step / max(state.max_steps - 1, 1), 1.0))
        hidden_cf = counterfactual_hidden(model, inputs) if loss.entry.counterfactual else None
        call = HeadCall(inputs["target"], loss.weighting, hidden_cf, loss=training, num_items=1, top1=self.top1)
        done = factual(model, inputs, call, top_k=router.top_k if router else 0)
        pir, tokens = done.logp - done.logp_cf, inputs["uses"].sum()
        self._window.add(self.perce_loss, done.logp, pir, done.signal, done.token_weight, tokens=tokens)
        total, counted = done.loss if training else -done.logp.sum(), num_items_in_batch is not None
        mean = total / torch.as_tensor(num_items_in_batch if counted else len(done.logp)).clamp(min=1)
        aux = None
        if router:  # its mean over forwards and processes, where the Trainer, which counts tokens, makes a sum
            aux = load_balance(done.experts[1], done.experts[0].detach(), router.top_k)
            forwards = self.current_gradient_accumulation_steps if training else 1
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            mean = mean + router.coefficient * aux / (forwards * processes if counted else 1)
        mask = torch.ones_like(inputs["target"], dtype=torch.bool)
        return TokenOutput(mean, -total[None], mask, done.entropy, done.top1, aux)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self._summary()
            self._window = Window()
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        window, self._window = self._window, Window()
        window.pause()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found, self._window = evaluation(self._summary()), window
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def _summary(self) -> dict[str, float]:
        total = self.accelerator.reduce(self._window.total.to(self.args.device), "sum")
        return {**self._window.summary(total, self.perce_loss)}

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise UserError("predict: would return logits, which are never held. Use trainer.evaluate(dataset).")
