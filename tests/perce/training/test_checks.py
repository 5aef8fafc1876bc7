"""What is refused before training begins."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from perce import MemoryConfig, PerceTrainer, UserError
from perce.training.checks import check_sharding
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.helpers.trainers import PAIRS, arguments, model_for, trainer_for

DETACHED = MemoryConfig(persona_grad="none")


def test_a_detached_persona_is_refused_where_processes_would_wait_for_ever():
    sharded = SimpleNamespace(is_fsdp_enabled=True)
    with pytest.raises(UserError, match="FSDP"):
        check_sharding(sharded, DETACHED)
    check_sharding(sharded, MemoryConfig())
    check_sharding(SimpleNamespace(is_fsdp_enabled=False), DETACHED)


@pytest.mark.parametrize("hook", ["compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"])
def test_a_hook_that_would_never_be_called_is_refused(tmp_path, hook):
    with pytest.raises(UserError, match=f"{hook}: .* would not be called"):
        PerceTrainer(tiny_model(), arguments(tmp_path), processing_class=tiny_tokenizer(), **{hook: print})


def test_an_optimizer_that_evaluates_other_weights_is_refused_as_an_object_too(tmp_path):
    class ScheduleFree(torch.optim.SGD):
        def eval(self):
            """Put the averaged weights into the model, as schedulefree's optimisers do."""

    model, args = model_for("full"), arguments(tmp_path)
    made = ScheduleFree(model.parameters(), lr=0.1)
    for given in ({"optimizers": (made, None)}, {"optimizer_cls_and_kwargs": (ScheduleFree, {"lr": 0.1})}):
        with pytest.raises(UserError, match=rf"{next(iter(given))}: ScheduleFree .*other weights") as told:
            trainer_for(model, args, **given)
    with pytest.raises(UserError, match="optim: schedule_free_adamw") as of_name:
        arguments(tmp_path, optim="schedule_free_adamw")
    assert str(of_name.value).partition(" is ")[2] == str(told.value).partition(" is ")[2]
    trainer_for(model, args, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="label_smoothing"):
        arguments(tmp_path, label_smoothing_factor=0.1)


def test_a_model_without_anything_to_train_is_refused(tmp_path):
    model = model_for("full").requires_grad_(False)
    with pytest.raises(UserError, match=r"model: expected .*parameter.*peft_config"):
        trainer_for(model, arguments(tmp_path))
    evaluating = PerceTrainer(model, arguments(tmp_path), processing_class=tiny_tokenizer())
    assert evaluating.evaluate(Dataset.from_list(PAIRS[:2]))["eval_loss"] > 0


def test_what_the_trainer_cannot_do_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"predict: .*evaluate"):
        trainer_for(model_for("full"), arguments(tmp_path)).predict(Dataset.from_list(PAIRS[:2]))
    with pytest.raises(UserError, match=r"model_init: .*model"):
        trainer_for(model_for("full"), arguments(tmp_path), model_init=lambda: model_for("full"))
    with pytest.raises(UserError, match="args: expected PerceArguments, got TrainingArguments"):
        trainer_for(model_for("full"), TrainingArguments(str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, -(2**63)])
def test_arguments_are_finite_numbers(tmp_path, value):
    with pytest.raises(UserError, match="weight_decay: expected a"):
        arguments(tmp_path, weight_decay=value)


@pytest.mark.parametrize("model", [torch.nn.Linear(3, 3), torch.nn.DataParallel(tiny_model())])
def test_what_is_no_model_of_transformers_is_refused(tmp_path, model):
    with pytest.raises(UserError, match=f"model: expected a causal language model.*got {type(model).__name__}"):
        PerceTrainer(model, arguments(tmp_path), train_dataset=PAIRS, processing_class=tiny_tokenizer())
