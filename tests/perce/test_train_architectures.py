"""Runs of models that are unlike Llama: recurrent ones, mixtures of experts, and those that see images."""

import pytest

from tests.helpers.architectures import tiny
from tests.helpers.tiny import tiny_tokenizer
from tests.helpers.training import fails


@pytest.fixture
def saved(tmp_path):
    """The directory of a tiny model of this architecture."""

    def save(architecture):
        model = tiny(architecture)
        model.config.get_text_config().final_logit_softcapping = None  # Gemma 3 beside a vision tower ignores it
        model.save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.mark.parametrize("lora_r", [0, 16])
@pytest.mark.parametrize("architecture", ["mamba", "rwkv"])
def test_recurrent_models_train_and_are_not_planned(train, saved, architecture, lora_r):
    code, out, err = train(model=saved(architecture), lora_r=lora_r, max_steps=1)
    assert code == 0 and "loss with persona" in out, err
    (line,) = [line for line in out.splitlines() if line.startswith("memory ")]
    assert line.startswith("memory not planned: --model ") and f"{architecture} has no attention heads" in line


def test_a_router_that_returns_more_than_logits_is_no_obstacle(train, saved):
    code, out, err = train(model=saved("phimoe"), max_steps=1)
    assert code == 0 and "loss with persona" in out, err


@pytest.mark.parametrize("lora_r", [0, 16])
def test_a_model_that_sees_images_is_trained_on_text(train, saved, lora_r):
    code, out, err = train(model=saved("gemma3"), lora_r=lora_r, max_steps=1)
    assert code == 0 and "loss with persona" in out, err
    assert "no text reaches model.vision_tower, model.multi_modal_projector (0.0 M parameters): not trained" in out


def test_a_default_that_peft_refuses_is_one_paragraph(train, saved, monkeypatch):
    def refuse(*_):
        raise ValueError("Module is incompatible")

    monkeypatch.setattr("peft.get_peft_model", refuse)
    fails(train(model=saved("mamba")), "Module is incompatible", "--lora_r 0")
