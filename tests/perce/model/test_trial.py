"""A step in the run's own manner against the model's own logits: what is wrong only there is found before training."""

import pytest
import torch
import transformers

from perce import LossConfig, MemoryConfig, PerceTrainer, UserError, disable_dropout
from perce.model.memory import CHECKPOINTING
from perce.model.prefill import PrefixCache
from tests.helpers.architectures import tiny, tiny_config
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.helpers.trainers import LOSS, arguments, model_for, trainer_for


def trained(tmp_path, model, checkpointing=False, **options):
    """A trainer of the model, made and given a step."""
    trainer = trainer_for(model, arguments(tmp_path, max_steps=1, **{CHECKPOINTING: checkpointing}, **options))
    trainer.train()
    return trainer


NONE = MemoryConfig(persona_grad="none")


def test_a_model_that_drops_the_personas_cache_under_checkpointing(tmp_path):
    """GPT-2 hands no cache on in training mode with checkpointing: the persona would vanish."""
    with pytest.raises(UserError, match=r"GPT2LMHeadModel.*with activation_checkpointing.*leave activation_checkp"):
        trained(tmp_path, tiny("gpt2"), checkpointing=True, memory=NONE)
    trained(tmp_path, tiny("gpt2"), checkpointing=True)
    trained(tmp_path, tiny("gpt2"), memory=NONE)


def test_checkpointing_that_loses_the_gradients_of_frozen_inputs(tmp_path):
    options = {f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    with pytest.raises(UserError, match=r"checkpointing_kwargs: expected use_reentrant: false"):
        trained(tmp_path, model_for("lora"), checkpointing=True, **options)
    args = arguments(tmp_path, **{CHECKPOINTING: True})
    assert getattr(args, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False}


def test_a_gradient_that_is_lost_in_training_mode_alone(tmp_path):
    model = tiny_model()
    layer = model.model.layers[0]
    own = layer.mlp.forward
    layer.mlp.forward = lambda hidden: own(hidden.detach() if layer.training else hidden)
    with pytest.raises(UserError, match=r"LlamaForCausalLM \(llama\): the gradient of the loss is off by \d+% of its"):
        trained(tmp_path, model)


def test_padding_that_changes_a_sequence_of_a_batch(tmp_path):
    model = tiny_model()
    layer = model.model.layers[1]
    own = layer.mlp.forward
    layer.mlp.forward = lambda hidden: own(hidden) + (hidden.flip(0) if layer.training and len(hidden) == 2 else 0)
    with pytest.raises(UserError, match=r"log-probabilities of a response with the persona are off by up to"):
        trained(tmp_path, model)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text", "llama4_text"])
def test_windows_are_crossed_and_come_back(tmp_path, architecture):
    """A cache whose window is another than the mask's shows behind a window alone."""
    trainer = trained(tmp_path, tiny(architecture), memory=NONE)
    config = trainer.model.config
    assert 16 in (vars(config).get("sliding_window"), vars(config).get("attention_chunk_size"))
    with torch.no_grad():
        fresh = tiny(architecture)
    assert str(vars(config).get("sliding_window")) == str(vars(fresh.config).get("sliding_window"))


def test_a_window_that_the_cached_persona_does_not_have(tmp_path, monkeypatch):
    own = PrefixCache.update

    def without_window(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = own(self, key_states, value_states, layer_idx, *args, **kwargs)
        return keys.roll(1, -2), values

    monkeypatch.setattr(PrefixCache, "update", without_window)
    with pytest.raises(UserError, match=r"with persona_grad none, log-prob.*right: leave persona_grad none out"):
        trained(tmp_path, tiny_model(), memory=NONE)


NOISY = {
    "opt": {"dropout": 0.1},  # functional, not a module
    "bart": {"decoder_layerdrop": 0.4},
    "phimoe": {"router_jitter_noise": 0.1},
    "mixtral": {"router_jitter_noise": 0.1},
    "gpt2": {"attn_pdrop": 0.1},
    "llama": {"attention_dropout": 0.1},
}


@pytest.mark.parametrize("architecture", NOISY)
def test_noise_in_training_is_refused_and_can_be_put_right_on_a_loaded_model(tmp_path, architecture):
    config = tiny_config(architecture)
    for name, value in NOISY[architecture].items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"would act in the factual pass.*Call perce\.disable_dropout\(model\)"):
        trained(tmp_path, model)
    assert disable_dropout(model) is model
    trained(tmp_path, model)


def test_noise_under_a_name_that_nobody_knows(tmp_path):
    model = tiny_model()
    layer = model.model.layers[0]
    own = layer.mlp.forward
    layer.mlp.forward = lambda hidden: own(hidden) + 0.1 * torch.randn_like(hidden) * layer.training
    with pytest.raises(UserError, match=r"two forwards in training mode differ"):
        trained(tmp_path, model)


def test_dropout_of_an_adapter_is_allowed_and_warned_of_wherever_it_tells(tmp_path):
    for loss in (LOSS, LossConfig(objective="nextquill")):
        with pytest.warns(UserWarning, match=r"Dropout of 0\.3 in the adapter"):
            trained(tmp_path, model_for("lora", dropout=0.3), loss=loss)


@pytest.mark.parametrize("objective", ["perce", "nextquill"])
def test_noisy_embeddings_are_for_weights_that_are_estimated_without(tmp_path, objective):
    with pytest.raises(UserError, match=r"neftune_noise_alpha.*--estimate epoch"):
        arguments(tmp_path, loss=LossConfig(objective=objective), neftune_noise_alpha=5.0)
    for loss in (LossConfig(objective="ce"), LossConfig(estimate="epoch"), LossConfig(objective="random")):
        arguments(tmp_path, loss=loss, neftune_noise_alpha=5.0)


def test_a_trainer_without_training_data_tries_no_step(tmp_path):
    model = tiny("gpt2")
    args = arguments(tmp_path, memory=NONE, **{CHECKPOINTING: True})
    PerceTrainer(model, args, processing_class=tiny_tokenizer())
