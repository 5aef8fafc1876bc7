"""The weights of a run that is resumed, and the best ones, are those of the checkpoint."""

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from perce.errors import UserError
from perce.training.weights import WeightsOfCheckpoints
from tests.helpers.architectures import tiny
from tests.helpers.tiny import tiny_model
from tests.helpers.trainers import PAIRS, arguments, trainer_for


class WeightsOf(TrainerCallback):
    """The weights at the end of one step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.weights = weights_of(model)


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def differing(one, other):
    return [name for name in one if not torch.equal(one[name], other[name])]


def architecture_of(name):
    if name != "gemma3 with images":
        return tiny_model(name)
    model = tiny("gemma3")
    model.config.text_config.final_logit_softcapping = None
    return model


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3-moe", "gemma3 with images"])
def test_weights_are_those_of_the_checkpoint_whatever_they_are_called_there(tmp_path, name):
    """transformers writes experts one by one, and a language model with images under other names than it has."""

    def trainer_of(steps):
        args = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
        return trainer_for(architecture_of(name), args, PAIRS[:8])

    straight, resumed, second = trainer_of(3), trainer_of(3), WeightsOf(2)
    straight.add_callback(second)
    straight.train()
    expected = weights_of(straight.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert differing(weights_of(resumed.model), expected) == []
    assert len(differing(second.weights, expected)) > 5
    resumed.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    resumed._load_best_model()
    assert differing(weights_of(resumed.model), second.weights) == []


def test_a_checkpoint_without_some_of_the_weights_is_not_resumed(tmp_path):
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer_for(tiny_model("llama"), args, PAIRS[:8]).train()
    checkpoint = tmp_path / "checkpoint-1"
    deeper = tiny_model("llama", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"checkpoint-1: .*lacks 9 of its weights: model\.layers\.2"):
        trainer_for(deeper, args, PAIRS[:8]).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_with_weights_that_the_model_lacks_is_not_resumed(tmp_path):
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"not of the model that is trained \(has 9 that it lacks: model\.layers\.2"):
        load_into(tiny_model("llama"), tmp_path)


class Plain(WeightsOfCheckpoints, Trainer):
    pass


class Scaled(LlamaForCausalLM):
    """Cannot be made by from_pretrained."""

    def __init__(self, config, scale):
        super().__init__(config)
        self.scale = scale


def load_into(model, checkpoint):
    Plain(model, TrainingArguments(str(checkpoint), use_cpu=True))._load_from_checkpoint(str(checkpoint))


def with_a_module():
    model = tiny_model("mixtral")
    model.extra = torch.nn.Linear(3, 3)
    return model


def with_a_buffer():
    model = tiny_model("mixtral")
    model.register_buffer("seen", torch.rand(3))
    return model


def of_a_class_of_its_own():
    return Scaled(tiny_model("llama").config, scale=2.0)


@pytest.mark.parametrize("make", [with_a_module, with_a_buffer, of_a_class_of_its_own])
def test_what_a_user_adds_to_a_model_is_loaded_too(tmp_path, make):
    saved, model = make(), make()
    with torch.no_grad():
        for tensor in saved.state_dict().values():
            tensor.mul_(2.0)
    saved.save_pretrained(tmp_path)
    load_into(model, tmp_path)
    loaded = model.state_dict()
    assert [name for name, tensor in saved.state_dict().items() if not torch.equal(tensor, loaded[name])] == []
