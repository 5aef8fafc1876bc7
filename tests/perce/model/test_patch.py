"""The model and its head, patched: the loss of its own logits, and models that are refused."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from perce import UserError
from perce.data.batch import collate
from perce.model.head import CAPS, SCALES
from perce.model.loading import add_adapter
from perce.model.patch import prepare_model
from perce.model.probe import unwrapped
from tests.helpers.architectures import CANNOT_BUILD, NAMES, tiny, tiny_config
from tests.helpers.models import PAIRS, WEIGHTING, perce_forward
from tests.helpers.tiny import ARCHITECTURES, tiny_model
from tests.helpers.trainers import arguments, trainer_for


def own_logp(model, pair, counterfactual=False):
    """Log-probabilities of one unpadded response from the model's own full logits."""
    ids = list(pair["input_ids"])
    if counterfactual:
        start, end = pair["persona_span"]
        ids = ids[:start] + ids[end:]
    logits = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    n = pair["response_length"]
    return logits[-n - 1 : -1].gather(1, torch.tensor(ids[-n:])[:, None])[:, 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_of_a_padded_batch_equals_the_models_own_logits_one_by_one(architecture):
    model = tiny_model(architecture)
    logp = torch.cat([own_logp(model, pair) for pair in PAIRS])
    logp_cf = torch.cat([own_logp(model, pair, counterfactual=True) for pair in PAIRS]).detach()
    weight = (logp - logp_cf).detach().clamp(WEIGHTING.clip_min, WEIGHTING.clip_max)
    expected = -(weight * logp).mean()
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    loss, got_logp, got_logp_cf, signal, got_weight = perce_forward(prepare_model(model), collate(PAIRS))
    loss.backward()
    torch.testing.assert_close(got_logp, logp.detach(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got_logp_cf, logp_cf, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got_weight, weight, atol=4e-5, rtol=1e-5)
    torch.testing.assert_close(signal, got_logp - got_logp_cf)
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
    assert (weight > WEIGHTING.clip_min).any(), "the persona must matter, or the weights test nothing"
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], atol=1e-5, rtol=1e-3, msg=name)


def test_the_models_own_forward_still_works():
    model = tiny_model()
    ids = torch.arange(12)[None]
    before = model(input_ids=ids, labels=ids)
    after = prepare_model(model)(input_ids=ids, labels=ids)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 12


def test_a_deep_copy_runs_its_own_weights():
    model = prepare_model(tiny_model())
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
    model = tiny_model("cohere")
    model.logit_scale = 0.5  # its config does not have this
    with pytest.raises(UserError, match=r"CohereForCausalLM.*differ.*logit_scale=0\.25"):
        prepare_model(model)


SCALED = {
    "granite": ("logits_scaling", -1), "hyperclovax": ("logits_scaling", 1), "cohere": ("logit_scale", 1),
    "falcon_h1": ("lm_head_multiplier", 1), "inkling_text": ("logits_mup_width_multiplier", -1),
}  # fmt: skip
CAPPED = {
    "gemma2": "final_logit_softcapping", "gemma3_text": "final_logit_softcapping",
    "nanochat": "final_logit_softcapping", "recurrent_gemma": "logits_soft_cap", "xlstm": "output_logit_soft_cap",
}  # fmt: skip


@pytest.mark.parametrize("architecture", sorted((SCALED | CAPPED).keys() & set(NAMES)))
def test_scales_and_caps_are_read_as_the_model_uses_them(architecture):
    """Granite divides by what HyperCLOVA X multiplies by."""
    model = tiny(architecture)
    name, direction = SCALED.get(architecture, ("", 1))
    scale, cap = getattr(model.config, name, 1.0), getattr(model.config, CAPPED.get(architecture, ""), None)
    assert (scale, cap) != (1.0, None), "neutral values would show nothing"
    expected = {"softcap": cap, "logit_scale": pytest.approx(scale**direction)}
    assert vars(prepare_model(model).perce_logit_transform) == expected


@pytest.mark.parametrize("seed", range(4))
def test_rounding_does_not_choose_how_a_config_is_read(seed):
    """In bf16 a high cap fits small logits as well as none does; after training it would not."""
    torch.manual_seed(seed)
    config = tiny_model("gemma2", final_logit_softcapping=30.0, initializer_range=0.02).config
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    assert prepare_model(model).perce_logit_transform.softcap == 30.0


@pytest.mark.parametrize("name", ["logit_scale", "logits_scaling", "final_logit_softcapping"])
def test_a_scale_that_the_model_does_not_use_is_none(name):
    model = tiny_model("llama")
    setattr(model.config, name, 2.0)
    assert vars(prepare_model(model).perce_logit_transform) == {"softcap": None, "logit_scale": 1.0}


def test_every_name_for_a_scale_or_cap_of_logits_is_known():
    """Over all configs of causal language models, so that a new name is noticed here, not in a user's run."""
    speaks_of_logits = re.compile(r"logit.*(scal|cap|mult)|lm_head_mult|output_mult")
    found = {
        field
        for name in NAMES if name not in CANNOT_BUILD
        for field in vars(tiny_config(name).get_text_config()) if speaks_of_logits.search(field)
    }  # fmt: skip
    of_others = {"attn_logit_softcapping", "attention_logit_cap", "moe_router_logit_softcapping"}
    assert found - of_others <= {*SCALES, *CAPS}


@pytest.mark.parametrize("architecture", ["llama4_text", "llama4", "gemma3", "opt", "bart"])
def test_the_decoder_is_found_whatever_it_is_called(architecture):
    """Llama 4's base_model_prefix names nothing; Gemma 3's base_model is a vision-language model."""
    model = tiny(architecture)
    before = own_logp(model, PAIRS[0])
    loss, logp, *_ = perce_forward(prepare_model(model), collate(PAIRS[:1]))
    torch.testing.assert_close(logp, before.detach(), atol=2e-5, rtol=1e-5)
    loss.backward()


@pytest.mark.parametrize(
    ("architecture", "change"),
    [("gemma3_text", {"use_bidirectional_attention": True}), ("xlnet", {"attn_type": "bi"}), ("cpmant", {})],
)
def test_a_model_whose_tokens_see_later_ones_is_refused(tmp_path, architecture, change):
    config = tiny_config(architecture)
    for name, value in change.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="needs a causal model, whose tokens see only earlier ones"):
        trainer_for(model, arguments(tmp_path))


def test_a_model_that_fails_on_plain_tokens_says_so():
    model = tiny_model("llama")
    model.model.layers[0].forward = lambda *args, **kwargs: None
    with pytest.raises(UserError, match=r"LlamaForCausalLM \(llama\): its forward fails on a few tokens: "):
        prepare_model(model)


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
        prepare_model(tiny_model(attention_dropout=0.1))
    with pytest.raises(UserError, match=r"p=0\.1 in .*resid_dropout"):
        prepare_model(tiny_model("phi", resid_pdrop=0.1))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    with pytest.raises(UserError, match="encoder"):
        prepare_model(t5)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_the_self_check_knows_how_coarse_large_bf16_logits_are(scale):
    model = tiny_model().bfloat16()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    prepare_model(model)


def test_generate_may_still_keep_the_last_logits_only():
    model = tiny_model()
    before = model._supports_logits_to_keep()
    assert prepare_model(model)._supports_logits_to_keep() == before


def test_a_model_with_flash_attention_is_checked_by_attention_that_runs_anywhere(monkeypatch):
    model, set_to = tiny_model(), []

    def set_attention(name):
        set_to.append(name)
        model.config._attn_implementation = name

    model.config._attn_implementation = "flash_attention_2"  # loaded on a CPU, in fp32: its kernels could not run
    monkeypatch.setattr(model, "set_attn_implementation", set_attention)
    prepare_model(model)
    assert set_to == ["sdpa", "flash_attention_2"]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_an_output_embedding_that_is_replaced_is_patched_too(architecture, adapted):
    """Resizing makes a new module, whose forward does not compute the loss."""
    model = prepare_model(tiny_model(architecture), "reference")
    model = add_adapter(model, LoraConfig(r=2, target_modules="all-linear")) if adapted else model
    before = perce_forward(model, collate(PAIRS))[1]
    model.resize_token_embeddings(410)
    after = perce_forward(model, collate(PAIRS))[1]
    assert (after - before).abs().max() < 0.1, "ten logits more"
    base = unwrapped(model)
    assert base.get_output_embeddings().perce_backend == "reference"
    base.set_output_embeddings(torch.nn.Linear(32, 410, bias=False))
    assert not torch.equal(perce_forward(model, collate(PAIRS))[1], after)
    base.set_output_embeddings(torch.nn.Sequential(base.get_output_embeddings()))
    with pytest.raises(UserError, match="expected a floating-point linear output embedding, got Sequential"):
        perce_forward(model, collate(PAIRS))


def test_a_model_that_was_pickled_is_prepared_again(tmp_path):
    """It comes back with its own forward, which takes our arguments and ignores them."""
    model = prepare_model(tiny_model())
    torch.save(model, tmp_path / "model.pt")
    other = prepare_model(torch.load(tmp_path / "model.pt", weights_only=False))
    assert torch.equal(perce_forward(other, collate(PAIRS))[1], perce_forward(model, collate(PAIRS))[1])


def test_a_merged_model_is_trained_again():
    model = add_adapter(prepare_model(tiny_model()), LoraConfig(r=2, target_modules="all-linear"))
    merged = prepare_model(model.merge_and_unload().requires_grad_(True))
    perce_forward(merged, collate(PAIRS))[0].backward()
    assert all(p.grad is not None for p in merged.parameters())
