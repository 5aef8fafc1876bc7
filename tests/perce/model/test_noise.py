"""Randomness of training mode is refused, or allowed with a warning."""

import pytest
import torch
import transformers
from peft import BOFTConfig, LoHaConfig, LoKrConfig, LoraConfig

from perce import LossConfig, MemoryConfig, UserError, disable_dropout
from perce.model.loading import add_adapter
from perce.model.patch import prepare_model
from tests.helpers.architectures import tiny, tiny_config
from tests.helpers.tiny import tiny_model
from tests.helpers.trainers import LOSS, arguments, model_for, trained

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
    with pytest.raises(UserError, match=r"two forward passes in training mode differ"):
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


@pytest.mark.parametrize("memory", [{"persona_grad": "none"}, {"branches_per_forward": 1}])
def test_noisy_embeddings_are_not_for_personas_that_run_by_themselves(tmp_path, memory):
    """The noise depends on the number of tokens of a row, and the parts of a sequence are rows of their own there."""
    with pytest.raises(UserError, match=r"neftune_noise_alpha.*(persona_grad=none|branches_per_forward)"):
        arguments(tmp_path, loss=LossConfig(objective="ce"), neftune_noise_alpha=5.0, memory=MemoryConfig(**memory))


@pytest.mark.parametrize(
    "config",
    [
        LoKrConfig(r=4, target_modules=["q_proj"], rank_dropout=0.4),
        LoHaConfig(r=4, target_modules=["q_proj"], module_dropout=0.4),
        BOFTConfig(boft_block_size=4, target_modules=["q_proj"], boft_dropout=0.4),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_dropout_of_other_adapters_is_allowed_too(tmp_path, config):
    with pytest.warns(UserWarning, match=r"Dropout of 0\.4 in the adapter"):
        trained(tmp_path, add_adapter(prepare_model(tiny_model()), config))


def test_what_no_text_reaches_or_is_no_share_is_not_noise(tmp_path):
    model = tiny("gemma3")
    model.model.vision_tower.dropout = 0.1
    tiny_llama = tiny_model()
    tiny_llama.dropout_seed = 42
    for each in (model, tiny_llama):
        trained(tmp_path, each)


def test_routers_that_draw_among_tied_experts_are_for_fp32(tmp_path):
    model = prepare_model(tiny("phimoe").bfloat16())
    with pytest.raises(UserError, match=r"draw among experts whose scores tie.*--precision fp32"):
        trained(tmp_path, add_adapter(model, LoraConfig(target_modules="all-linear")), bf16=True)
