"""Loading a model: precision, LoRA, 4 bits, attention."""

import copy
import importlib.util
import json

import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    MontecloraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PveraConfig,
    XLoraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from perce import PerceArguments, PerceTrainer, UserError
from perce.config.schema import ModelConfig
from perce.data.batch import collate
from perce.model import loading
from perce.model.loading import add_adapter, default_attention, load_model, resolve_precision
from perce.model.patch import prepare_model
from tests.helpers.architectures import tiny
from tests.helpers.models import PAIRS, perce_forward
from tests.helpers.tiny import save_tiny_model, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("learned", [PromptTuningConfig, PrefixTuningConfig])
def test_learned_prompts_are_refused(learned):
    with pytest.raises(UserError, match=f"{learned.__name__[:6].upper()}_TUNING learns a prompt"):
        add_adapter(prepare_model(tiny_model()), learned(num_virtual_tokens=5, task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    "config",
    [
        PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        AdaLoraConfig(total_step=9, target_modules="all-linear"),
    ],
)
def test_adapters_that_a_model_has_already_are_checked_too(tmp_path, config):
    with pytest.raises(UserError, match=r"peft_config: (PREFIX_TUNING|AdaLoRA)"):
        PerceTrainer(
            get_peft_model(tiny_model(), config),
            PerceArguments(tmp_path, use_cpu=True),
            processing_class=tiny_tokenizer(),
        )


def test_loading_full_and_lora(tmp_path):
    path = str(save_tiny_model(tmp_path / "m"))
    full = load_model(path, ModelConfig(lora_r=0, precision="fp32"), "cpu")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in full.parameters())
    lora = load_model(path, ModelConfig(lora_r=4, lora_alpha=8, lora_dropout=0.1, precision="fp32"), "cpu")
    trained = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained) and not any("lm_head" in name for name in trained)


def test_an_adapter_names_its_base_from_the_root(tmp_path, monkeypatch):
    """PEFT keeps a relative path, which names another model, or none, in another directory."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "base")
    config = LoraConfig(r=4, target_modules="all-linear")
    by_path = PerceTrainer("./base", PerceArguments("out", use_cpu=True), peft_config=config).model
    loaded = AutoModelForCausalLM.from_pretrained("./base")
    for adapted in (load_model("base", ModelConfig(precision="fp32"), "cpu"), by_path, add_adapter(loaded, config)):
        adapted.save_pretrained(tmp_path / "adapter")
        saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == str(tmp_path / "base")
    nameless = add_adapter(tiny_model(), LoraConfig(r=4, target_modules="all-linear"))
    assert not nameless.peft_config["default"].base_model_name_or_path


def test_a_bf16_lora_base_keeps_its_adapters_in_fp32(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "bf16_is_sound", lambda device: True)
    model = load_model(str(save_tiny_model(tmp_path / "m")), ModelConfig(lora_r=4), "cpu")
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    loss, *_ = perce_forward(model, collate(PAIRS))
    loss.backward()
    assert loss.dtype == torch.float32
    full = load_model(str(tmp_path / "m"), ModelConfig(lora_r=0), "cpu")
    assert next(full.parameters()).dtype == torch.float32, "pure bf16 weights would lose small updates"


class Casts(TorchDispatchMode):
    """Counts copies to fp32."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.float32
        return func(*args, **kwargs or {})


def test_under_autocast_an_adapters_input_is_not_copied_to_fp32_and_back(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "bf16_is_sound", lambda device: True)
    model = load_model(str(save_tiny_model(tmp_path / "m")), ModelConfig(lora_r=4), "cpu").train()
    adapted = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]

    def gradients() -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(0)
        model.zero_grad()
        with Casts() as casts, torch.autocast("cpu", torch.bfloat16):
            perce_forward(model, collate(PAIRS))[0].backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad], casts.count

    ours, few = gradients()
    for layer in adapted:
        del layer._cast_input_dtype
    peft, many = gradients()
    assert all(torch.equal(a, b) for a, b in zip(ours, peft, strict=True)) and any(grad.any() for grad in ours)
    assert many - few >= 2 * len(adapted), "one in each of the two passes, and one or more in backward"


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_adapters_that_would_compute_something_else_keep_pefts_casts(options):
    model = add_adapter(prepare_model(tiny_model()), LoraConfig(r=4, target_modules="all-linear", **options))
    assert not any("_cast_input_dtype" in vars(layer) for layer in model.modules())


def test_an_adapted_model_is_saved_whole_and_copied(tmp_path):
    model = add_adapter(tiny_model(), LoraConfig(r=4, target_modules="all-linear"))
    torch.save(model, tmp_path / "m.pt")
    for other in (torch.load(tmp_path / "m.pt", weights_only=False), copy.deepcopy(model)):
        (layer, *_) = [layer for layer in other.modules() if "_cast_input_dtype" in vars(layer)]
        assert layer._cast_input_dtype.args == (layer,), "its own layer, not the original model's"


def test_precision_is_refused_where_it_is_emulated(monkeypatch):
    monkeypatch.setattr(loading, "bf16_is_sound", lambda device: False)
    assert resolve_precision("auto", "cpu") == "fp32"
    with pytest.raises(UserError, match="no native bf16"):
        resolve_precision("bf16", "cpu")


def test_four_bit_is_refused_by_name_without_its_library(tmp_path):
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed here")
    with pytest.raises(UserError, match="bitsandbytes"):
        load_model(str(save_tiny_model(tmp_path / "m")), ModelConfig(load_in_4bit=True), "cpu")


def test_flash_attention_is_chosen_where_it_is_installed_and_can_run(monkeypatch):
    config = tiny_model("llama").config
    assert default_attention(config, "bf16", "cuda") is None, "not installed here"
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    assert default_attention(config, "bf16", "cuda") == "flash_attention_2"
    assert default_attention(config, "fp32", "cuda") is default_attention(config, "bf16", "cpu") is None
    monkeypatch.setattr(f"{type(tiny_model('llama')).__module__}.LlamaForCausalLM._supports_flash_attn", False)
    assert default_attention(config, "bf16", "cuda") is None


@pytest.mark.parametrize(
    ("architecture", "config", "said"),
    [
        ("mamba", {"target_modules": ["in_proj", "out_proj"]}, "'out_proj' is incompatible"),
        ("llama", {"target_modules": ["no_such_layer"]}, "no_such_layer"),
        ("llama", {"target_modules": ["input_layernorm"]}, "not supported"),
        ("llama", {"target_modules": []}, "target"),
    ],
)
def test_what_peft_refuses_is_one_paragraph(architecture, config, said):
    with pytest.raises(UserError, match="peft_config: PEFT cannot put this adapter on") as caught:
        add_adapter(tiny(architecture), LoraConfig(r=2, **config))
    assert said in str(caught.value) and "\n" not in str(caught.value) and "--lora_r 0" in str(caught.value)


def test_a_second_adapter_is_refused():
    config = LoraConfig(r=2, target_modules="all-linear")
    with pytest.raises(UserError, match="has an adapter already"):
        add_adapter(add_adapter(tiny_model(), config), config)


def test_a_peft_config_may_be_used_again():
    """The layers that are found for one model are not used for the next."""
    config = LoraConfig(r=2, target_modules="all-linear")
    for model in (tiny_model(), tiny("gpt2")):
        assert add_adapter(model, config).peft_config["default"].target_modules
    assert config.target_modules == "all-linear"


def test_an_adapter_with_a_loss_of_its_own_is_refused():
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="AdaLoRA adds a term"):
        add_adapter(prepare_model(tiny_model()), config)


def test_an_adapter_that_acts_behind_certain_tokens_is_refused():
    """PEFT looks for them in the row of tokens that it is given; in one of segments it finds only the last."""
    config = LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[2], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match=r"activated LoRA \(alora_invocation_tokens\) acts"):
        add_adapter(prepare_model(tiny_model()), config)


def test_an_adapter_that_takes_a_random_part_of_its_base_is_refused():
    """PEFT takes another part when the adapter is loaded; "pissa" without a number takes the same."""
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa_niter_4", task_type="CAUSAL_LM")
    with pytest.raises(UserError, match=r'init_lora_weights=pissa_niter_4 .*"pissa"'):
        add_adapter(prepare_model(tiny_model()), config)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (PveraConfig(r=4, target_modules=["q_proj"]), "PVeRA"),
        (LoraConfig(r=4, target_modules=["q_proj"], monteclora_config=MontecloraConfig()), "MonteCLoRA"),
    ],
    ids=["pvera", "monteclora"],
)
def test_adapters_that_draw_random_numbers_are_refused(config, name):
    """Their last matrix begins as 0, so that a first forward pass does not show it."""
    with pytest.raises(UserError, match=f"peft_config: {name} draws"):
        add_adapter(prepare_model(tiny_model()), config)


def test_an_adapter_that_runs_the_model_for_its_shares_is_refused(tmp_path):
    model = tiny_model()
    model.config.use_cache = False
    get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = XLoraConfig(hidden_size=model.config.hidden_size, adapters={"0": str(tmp_path)}, task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="peft_config: X-LoRA runs"):
        add_adapter(prepare_model(model), config)


def test_layers_that_an_adapter_repeats_are_adapted_too():
    """PEFT makes them after perce has found out which layers the model has."""
    repeated = {"layer_replication": [[0, 2], [0, 2]], "task_type": "CAUSAL_LM"}
    with pytest.raises(UserError, match=r"layer_replication.*by the last part of their names"):
        add_adapter(prepare_model(tiny_model()), LoraConfig(target_modules="all-linear", **repeated))
    model = add_adapter(prepare_model(tiny_model()), LoraConfig(target_modules=["q_proj"], **repeated))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 4
    perce_forward(model, collate(PAIRS))[0].backward()


def test_a_decoder_that_fails_where_it_is_tried_is_one_paragraph():
    model = prepare_model(tiny_model())
    model.model.layers[0].mlp.bfloat16()
    with pytest.raises(UserError, match="its decoder fails in training mode on a few tokens: "):
        add_adapter(model, LoraConfig(target_modules="all-linear"))


@pytest.mark.parametrize(
    ("raised", "told"), [(KeyError("stage"), UserError), (torch.OutOfMemoryError("CUDA"), torch.OutOfMemoryError)]
)
def test_a_decoder_may_raise_anything(raised, told, monkeypatch):
    """Memory that ran out is no fault of the decoder."""

    def fail(*_args, **_kwargs):
        raise raised

    model = prepare_model(tiny_model())
    monkeypatch.setattr(model.model.layers[0].mlp, "forward", fail)
    with pytest.raises(told):
        add_adapter(model, LoraConfig(target_modules="all-linear"))
