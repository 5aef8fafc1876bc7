"""What a text reaches: which layers have adapters by default, which adapters are refused, and what is frozen."""

import types

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from perce import PerceTrainer, UserError
from perce.config.schema import ModelConfig
from perce.model.loading import add_adapter, load_model
from perce.model.patch import prepare_model
from perce.model.probe import unwrapped
from perce.model.reach import beside_text, without_gradient
from tests.helpers.architectures import tiny
from tests.helpers.tiny import demo_pairs, tiny_model, tiny_tokenizer
from tests.helpers.trainers import arguments

ALL = LoraConfig(r=2, target_modules="all-linear")
VISION = ["model.vision_tower", "model.multi_modal_projector"]


def vision_model():
    """Gemma 3 with a vision tower, without the softcap, which it ignores."""
    model = tiny("gemma3")
    model.config.text_config.final_logit_softcapping = None
    return model


def adapted(model):
    """The names of the layers that have an adapter, without the layer's number."""
    layers = unwrapped(model).named_modules()
    names = {name for name, layer in layers if isinstance(layer, BaseTunerLayer)}
    return {".".join(part for part in name.split(".") if not part.isdigit()) for name in names}


def trained_by_a_text(model):
    """A forward and backward in training mode; whether every adapter has a gradient."""
    model.train()
    model(input_ids=torch.arange(1, 60)[None], use_cache=False).logits.float().sum().backward()
    return all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("architecture", "there", "absent"),
    [
        # Fused kernels read x_proj, dt_proj and out_proj by themselves, and PEFT refuses out_proj.
        ("mamba", {"backbone.layers.mixer.in_proj"}, ("out_proj", "x_proj", "dt_proj", "conv1d", "lm_head")),
        ("mamba2", {"backbone.layers.mixer.in_proj"}, ("out_proj",)),
        ("falcon_mamba", {"backbone.layers.mixer.in_proj"}, ("out_proj", "x_proj", "dt_proj")),
        ("falcon_h1", {"model.layers.mamba.in_proj", "model.layers.self_attn.o_proj"}, ("out_proj",)),
        ("bamba", {"model.layers.mamba.in_proj", "model.layers.self_attn.o_proj"}, ("out_proj",)),
        # Halved in eval mode, in place.
        ("rwkv", {"rwkv.blocks.attention.value"}, ("attention.output", "feed_forward.value")),
        # Routers, which return logits or more, and layers that choose the keys that are attended to.
        ("phimoe", {"model.layers.self_attn.q_proj"}, ("router",)),
        ("llama4_text", {"model.layers.feed_forward.shared_expert.up_proj"}, ("router",)),
        ("afmoe", {"model.layers.self_attn.q_proj"}, ("router",)),
        ("qwen2_moe", {"model.layers.mlp.shared_expert.up_proj"}, ("shared_expert_gate",)),
        ("deepseek_v32", {"model.layers.self_attn.o_proj"}, ("indexer",)),
        # In training mode, code reads the weight of the second without calling its forward.
        ("gemma3n_text", {"model.layers.altup.prediction_coefs"}, ("correction_coefs",)),
        ("gpt2", {"transformer.h.attn.c_attn", "transformer.h.mlp.c_proj"}, ("lm_head", "wte")),
    ],
)
def test_by_default_what_can_be_trained_is_adapted(architecture, there, absent):
    model = add_adapter(tiny(architecture), ALL)
    names = adapted(model)
    assert there <= names and not [name for name in names if any(part in name for part in absent)]
    assert trained_by_a_text(model)


def test_of_a_vision_language_model_the_text_is_trained(tmp_path):
    model = vision_model()
    assert list(beside_text(model)) == VISION
    assert {name.split(".")[1] for name in adapted(add_adapter(tiny("gemma3"), ALL))} == {"language_model"}
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    full = load_model(str(tmp_path), ModelConfig(lora_r=0, precision="fp32"), "cpu")
    frozen = {name for name, p in full.named_parameters() if not p.requires_grad}
    assert frozen and frozen == {name for name, _ in full.named_parameters() if name.startswith(tuple(VISION))}
    assert not without_gradient(full)
    assert not beside_text(tiny_model()) and not beside_text(tiny_model("llama-tied"))


@pytest.mark.parametrize(
    ("architecture", "modules", "named"),
    [
        ("gemma3", ["fc1", "up_proj"], "model.vision_tower.encoder.layers.0.mlp.fc1"),
        ("phimoe", ["router", "q_proj"], "model.layers.0.mlp.router"),
        ("deepseek_v32", ["wq_b", "o_proj"], "model.layers.0.self_attn.indexer.wq_b"),
    ],
)
def test_adapters_that_no_text_trains_are_refused_by_name(architecture, modules, named):
    with pytest.raises(UserError, match="would not be trained") as caught:
        add_adapter(tiny(architecture), LoraConfig(r=2, target_modules=modules))
    said = str(caught.value)
    assert named in said and "lora_" not in said and "language_model" not in said and "layers.0.self_attn.o" not in said


def around(layer):
    """The MLP with its last weight read directly, as fused kernels do."""

    def forward(self, x):
        return F.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)

    layer.mlp.forward = types.MethodType(forward, layer.mlp)


def test_a_weight_that_is_read_around_its_layer_is_not_adapted():
    model = tiny_model()
    around(model.model.layers[1])
    lora = add_adapter(model, ALL)
    down = {name for name, layer in unwrapped(lora).named_modules() if isinstance(layer, BaseTunerLayer)}
    assert "model.layers.0.mlp.down_proj" in down and "model.layers.1.mlp.down_proj" not in down
    model = tiny_model()
    around(model.model.layers[1])
    with pytest.raises(UserError, match=r"adapters on model\.layers\.1\.mlp\.down_proj would"):
        add_adapter(model, LoraConfig(r=2, target_modules=["down_proj"]))


class Experts(nn.Module):
    """A mixture whose tokens all go to the first expert, or to none."""

    def __init__(self, mlp):
        super().__init__()
        self.experts = nn.ModuleList([mlp, type(mlp)(tiny_model().config)])
        self.gate = nn.Linear(32, 2, bias=False)

    def forward(self, x):
        return self.gate(x).softmax(-1)[..., :1] * self.experts[0](x)


def test_experts_that_no_token_went_to_are_adapted_like_the_others():
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp = Experts(layer.mlp)
    lora = add_adapter(prepare_model(model), ALL)
    names = {name for name, layer in unwrapped(lora).named_modules() if isinstance(layer, BaseTunerLayer)}
    assert {f"model.layers.0.mlp.experts.{i}.up_proj" for i in (0, 1)} <= names
    assert not any(name.endswith("gate") for name in names)
    assert not without_gradient(lora)


def test_a_trainer_finds_adapters_that_have_no_gradient_where_it_trains(tmp_path):
    """GPU kernels may read weights of modules that a CPU calls."""
    model = add_adapter(prepare_model(tiny_model()), ALL)
    around(unwrapped(model).model.layers[0])
    pairs = Dataset.from_list(demo_pairs(2))
    with pytest.raises(UserError, match=r"adapters on model\.layers\.0\.mlp\.down_proj would not be trained"):
        PerceTrainer(model, arguments(tmp_path), train_dataset=pairs, processing_class=tiny_tokenizer())


def test_an_adapter_of_ones_own_on_a_vision_tower_is_refused(tmp_path):
    model = get_peft_model(vision_model(), LoraConfig(r=2, target_modules=["fc1", "o_proj"]))
    pairs = Dataset.from_list(demo_pairs(2))
    with pytest.raises(UserError, match=r"adapters on model\.vision_tower\.encoder\.layers\.0\.mlp\.fc1"):
        PerceTrainer(model, arguments(tmp_path), train_dataset=pairs, processing_class=tiny_tokenizer())


def test_trying_a_model_leaves_it_as_it_was():
    model = prepare_model(tiny_model()).train()
    before, state = {name: p.clone() for name, p in model.named_parameters()}, torch.get_rng_state()
    assert not without_gradient(model)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())
