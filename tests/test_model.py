"""The patched forward against the model's own logits, for every head transform; and what must be refused."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from perce.config.schema import ModelConfig
from perce.data.batch import collate
from perce.errors import UserError
from perce.hub import load_tokenizer
from perce.model import loading
from perce.model.loading import add_adapter, default_attention, load_model, resolve_precision
from perce.model.patch import install_perce, prepare_model
from tests.tiny import ARCHITECTURES, demo_pairs, save_tiny_model, tiny_model

PAIRS = demo_pairs(3)
CLIP = {"clip_min": 0.005, "clip_max": 5.0}  # a random model hardly listens to the persona


def own_logp(model, pair, counterfactual=False):
    """Log-probabilities of one unpadded response from the model's own full logits."""
    ids = list(pair["input_ids"])
    if counterfactual:
        start, end = pair["persona_span"]
        ids = ids[:start] + ids[end:]
    logits = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    n = pair["response_length"]
    return logits[-n - 1 : -1].gather(1, torch.tensor(ids[-n:])[:, None])[:, 0]


def perce_forward(model, batch, **loss):
    with torch.no_grad():
        hidden_cf = model(input_ids=batch["input_ids_cf"], perce={"rows": batch["rows_cf"]})
    call = {"hidden_cf": hidden_cf, **CLIP, **loss}
    return model(input_ids=batch["input_ids"], perce={"rows": batch["rows"], "target": batch["target"], "loss": call})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_of_a_padded_batch_equals_the_models_own_logits_one_by_one(architecture):
    model = tiny_model(architecture)
    logp = torch.cat([own_logp(model, pair) for pair in PAIRS])
    logp_cf = torch.cat([own_logp(model, pair, counterfactual=True) for pair in PAIRS]).detach()
    weight = (logp - logp_cf).detach().clamp(CLIP["clip_min"], CLIP["clip_max"])
    expected = -(weight * logp).mean()
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    loss, got_logp, got_logp_cf, signal, got_weight = perce_forward(install_perce(model), collate(PAIRS))
    loss.backward()
    torch.testing.assert_close(got_logp, logp.detach(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got_logp_cf, logp_cf, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got_weight, weight, atol=4e-5, rtol=1e-5)
    torch.testing.assert_close(signal, got_logp - got_logp_cf)
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
    assert (weight > CLIP["clip_min"]).any(), "the persona must matter, or the weights test nothing"
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], atol=1e-5, rtol=1e-3, msg=name)


def test_the_models_own_forward_still_works():
    model = tiny_model()
    ids = torch.arange(12)[None]
    before = model(input_ids=ids, labels=ids)
    after = install_perce(model)(input_ids=ids, labels=ids)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 12


def test_a_deep_copy_runs_its_own_weights():
    model = install_perce(tiny_model())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    ids = torch.arange(12)[None]
    assert not torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
    perce_forward(other, collate(PAIRS))[0].backward()
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is not None for p in other.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(dropout):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = prepare_model(tiny_model())
        model = add_adapter(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(2)
        perce_forward(model, collate(PAIRS))[0].backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == len(grads[1]) > 0
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_an_unknown_logit_transform_is_found_by_the_self_check():
    model = tiny_model("llama")
    model.config.logit_scale = 2.0  # Llama does not use it: our reading of the config is wrong
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*differ.*logit_scale=2"):
        install_perce(model)


HEAD_ADAPTERS = [
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("option", HEAD_ADAPTERS)
@pytest.mark.parametrize("order", ["ours", "theirs"])
def test_an_adapter_on_the_head_is_refused(option, order):
    with pytest.raises(UserError, match="output embedding"):
        if order == "ours":
            add_adapter(prepare_model(tiny_model()), LoraConfig(r=2, **option))
        else:
            prepare_model(get_peft_model(tiny_model(), LoraConfig(r=2, **option)))


def test_an_adapted_model_may_be_prepared_late():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear"))
    loss, *_ = perce_forward(prepare_model(model), collate(PAIRS))
    assert loss.isfinite()


def test_attention_dropout_and_encoders_are_refused():
    with pytest.raises(UserError, match=r"attention_dropout=0\.1"):
        install_perce(tiny_model(attention_dropout=0.1))
    with pytest.raises(UserError, match=r"dropout in .*resid_dropout"):
        install_perce(tiny_model("phi", resid_pdrop=0.1))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    with pytest.raises(UserError, match="encoder"):
        install_perce(t5)


def test_dropout_of_a_saved_model_is_switched_off(tmp_path):
    tiny_model("phi", resid_pdrop=0.1, attention_dropout=0.1).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), ModelConfig(lora_r=0, precision="fp32"), "cpu")
    assert model.config.resid_pdrop == model.config.attention_dropout == 0.0


def test_virtual_tokens_are_refused():
    with pytest.raises(UserError, match="PROMPT_TUNING"):
        add_adapter(prepare_model(tiny_model()), PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_the_self_check_knows_how_coarse_large_bf16_logits_are(scale):
    model = tiny_model().bfloat16()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    install_perce(model)


def test_generate_may_still_keep_the_last_logits_only():
    model = tiny_model()
    before = model._supports_logits_to_keep()
    assert install_perce(model)._supports_logits_to_keep() == before


def test_loading_full_and_lora(tmp_path):
    path = str(save_tiny_model(tmp_path / "m"))
    full = load_model(path, ModelConfig(lora_r=0, precision="fp32"), "cpu")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in full.parameters())
    lora = load_model(path, ModelConfig(lora_r=4, lora_alpha=8, lora_dropout=0.1, precision="fp32"), "cpu")
    trained = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained) and not any("lm_head" in name for name in trained)


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


def test_precision_is_refused_where_it_is_emulated(monkeypatch):
    monkeypatch.setattr(loading, "bf16_is_sound", lambda device: False)
    assert resolve_precision("auto", "cpu") == "fp32"
    with pytest.raises(UserError, match="no native bf16"):
        resolve_precision("bf16", "cpu")


def test_unreadable_models_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for path, message in (
        (tmp_path / "empty", "no config.json"), (tmp_path / "broken", "could not be loaded"),
        (tmp_path / "missing", "no such directory"),
    ):  # fmt: skip
        for load in (lambda p: load_model(p, ModelConfig(precision="fp32"), "cpu"), load_tokenizer):
            with pytest.raises(UserError, match=message) as caught:
                load(str(path))
            assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_four_bit_is_refused_by_name_without_its_library(tmp_path):
    pytest.importorskip("transformers")
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


def test_a_model_with_flash_attention_is_checked_by_attention_that_runs_anywhere(monkeypatch):
    model, set_to = tiny_model(), []

    def set_attention(name):
        set_to.append(name)
        model.config._attn_implementation = name

    model.config._attn_implementation = "flash_attention_2"  # loaded on a CPU, in fp32: its kernels could not run
    monkeypatch.setattr(model, "set_attn_implementation", set_attention)
    install_perce(model)
    assert set_to == ["sdpa", "flash_attention_2"]
