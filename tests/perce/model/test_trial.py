"""A step in the run's own manner against the model's own logits: what is wrong only there is found before training."""

import pytest
import torch
from datasets import Dataset

from perce import DataConfig, MemoryConfig, PerceTrainer, UserError
from perce.config.schema import ModelConfig
from perce.data.batch import collate
from perce.model import branches, prefill
from perce.model.loading import add_adapter, lora_config
from perce.model.memory import CHECKPOINTING
from perce.model.patch import prepare_model
from perce.model.prefill import PrefixCache
from perce.training.checks import is_in_place, try_step
from tests.helpers.architectures import tiny
from tests.helpers.models import perce_forward
from tests.helpers.replies import conversations, requests
from tests.helpers.tiny import VOCAB, tiny_model, tiny_tokenizer
from tests.helpers.trainers import PAIRS, arguments, model_for, trained, trainer_for

NONE = MemoryConfig(persona_grad="none")


def test_a_model_that_drops_the_personas_cache_under_checkpointing(tmp_path):
    """In training mode with checkpointing GPT-2 passes no cache on, so the persona would be lost."""
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
    layer.mlp.forward = lambda hidden: own(hidden) + (hidden.flip(0) if layer.training and len(hidden) > 1 else 0)
    with pytest.raises(UserError, match=r"log-probabilities of a response with the persona are off by "):
        trained(tmp_path, model)


def test_branches_that_are_wrong_in_training_mode_alone(tmp_path, monkeypatch):
    own = branches._seen

    def one_token_less(span, window):
        first, *rest = own(span, window)
        return [(first[0], first[1] - 1), *rest] if rest and torch.is_grad_enabled() else [first, *rest]

    monkeypatch.setattr(branches, "_seen", one_token_less)
    args = arguments(tmp_path, max_steps=1)
    with pytest.raises(UserError, match=r"with share conversations, .*Without it, a.*: use --share none"):
        trainer_for(tiny_model(), args, conversations())
    trainer_for(tiny_model(), arguments(tmp_path, max_steps=1, data=DataConfig(share="none")), conversations())


@pytest.mark.parametrize(
    ("memory", "patched", "option"),
    [
        ({}, (branches, "_seen"), "share_persona"),
        ({"branches_per_forward": 1}, (prefill, "prefill_with_gradient"), "branches_per_forward"),
        ({"persona_grad": "none"}, (prefill, "prefill"), "persona_grad none"),
    ],
    ids=["together", "one by one", "detached"],
)
def test_requests_that_would_share_the_wrong_persona(tmp_path, monkeypatch, memory, patched, option):
    owner, name = patched
    own = getattr(owner, name)

    def one_token_off(first, second, **kwargs):
        if name != "_seen":
            return own(first, second.roll(1, 1), **kwargs)
        seen = own(first, second)
        return [(seen[0][0], seen[0][1] - 1), *seen[1:]] if len(seen) > 1 and torch.is_grad_enabled() else seen

    args = arguments(tmp_path, max_steps=1, memory=MemoryConfig(share_persona=2, **memory))
    assert trainer_for(tiny_model(), args, requests(4)).sharing == "branches"
    monkeypatch.setattr(owner, name, one_token_off)
    with pytest.raises(UserError, match=rf"with {option}, .*Without it, a.*: leave {option} out"):
        trainer_for(tiny_model(), args, requests(4))


@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text", "llama4_text"])
def test_windows_are_crossed_and_come_back(tmp_path, architecture):
    """If cache and mask have different windows, it shows only in sequences longer than a window."""
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


def test_a_trainer_without_training_data_is_tried_behind_a_cached_persona(tmp_path):
    """In eval mode GPT-2 is right behind a cached persona; the first GPT's losses would be those without a persona."""
    args = arguments(tmp_path, memory=NONE, **{CHECKPOINTING: True})
    PerceTrainer(tiny("gpt2"), args, processing_class=tiny_tokenizer())
    with pytest.raises(UserError, match="with persona_grad none, log-probabilities"):
        PerceTrainer(tiny("openai-gpt"), args, processing_class=tiny_tokenizer())


def in_bf16(architecture, lora=True):
    model = prepare_model(tiny(architecture).bfloat16())
    return add_adapter(model, lora_config(ModelConfig(lora_r=4))) if lora else model


@pytest.mark.parametrize(
    "architecture", ["llama", "mamba", pytest.param("falcon_mamba", marks=pytest.mark.slow), "qwen3_moe", "gemma3"]
)
def test_a_bf16_base_is_tried_as_it_trains(tmp_path, architecture):
    """Mamba's hidden states are fp32 whatever its weights are, and its own forward casts them for its head."""
    trained(tmp_path, in_bf16(architecture), bf16=True)
    model = in_bf16(architecture, lora=False).eval()
    perce_forward(model, collate(PAIRS[:2]))


def test_weights_of_two_precisions_are_judged_by_the_lower_one(tmp_path):
    """As with 4-bit weights: products round to bf16, and embeddings and norms are fp32."""
    model = prepare_model(tiny_model())
    for layer in model.model.layers:
        layer.mlp.bfloat16()
        own = layer.mlp.forward
        layer.mlp.forward = lambda hidden, own=own: own(hidden.bfloat16()).float()
    trained(tmp_path, model)


@pytest.mark.parametrize("scale", [1e-3, 1e-2])
def test_faint_noise_is_found_too(tmp_path, scale):
    model = tiny_model()
    layer = model.model.layers[0]
    own = layer.mlp.forward
    layer.mlp.forward = lambda hidden: own(hidden) + scale * torch.randn_like(hidden) * layer.training
    with pytest.raises(UserError, match=r"two forward passes in training mode differ"):
        trained(tmp_path, model)


def test_embeddings_that_are_changed_in_place(tmp_path):
    """CTRL changes its embeddings in place; frozen, they would be leaves that need a gradient."""
    model = add_adapter(prepare_model(tiny("ctrl")), lora_config(ModelConfig(lora_r=4)))
    trained(tmp_path, model)


def test_a_collator_of_ones_own_may_want_more_than_a_made_up_pair_has(tmp_path):
    def by_example(pairs):
        return collate(sorted(pairs, key=lambda pair: -pair["example"]))

    trainer_for(tiny_model(), arguments(tmp_path, max_steps=1), data_collator=by_example).train()


@pytest.mark.parametrize("pad", [-1, VOCAB])
def test_a_padding_token_that_is_none(tmp_path, pad):
    """Some configs have −1 as the id, and a tokenizer may have one token more than the model."""
    model = tiny_model(pad_token_id=None)
    model.config.pad_token_id = pad
    tokenizer = tiny_tokenizer()
    if pad == VOCAB:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        assert tokenizer.pad_token_id >= VOCAB
    args = arguments(tmp_path, max_steps=1)
    PerceTrainer(model, args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer).train()


def with_one_more_embedding():
    """Like Moshi's, for a token that is read and never predicted: the head has one row fewer."""
    model = tiny_model(tie_word_embeddings=False)
    model.set_input_embeddings(torch.nn.Embedding(VOCAB + 1, model.config.hidden_size))
    return model


def test_made_up_tokens_have_logits(tmp_path):
    trained(tmp_path, with_one_more_embedding())


def test_a_token_that_is_never_predicted_is_refused_before_training(tmp_path):
    *rest, last = PAIRS
    last = last | {"input_ids": [*last["input_ids"][:-1], VOCAB]}
    with pytest.raises(UserError, match=rf"train_dataset: token id {VOCAB} .*vocabulary of {VOCAB}\."):
        trainer_for(with_one_more_embedding(), arguments(tmp_path), pairs=[*rest, last])


def test_weights_that_are_moved_later_are_not_tried(tmp_path, monkeypatch):
    monkeypatch.setattr("perce.training.checks.check_step", lambda *_: pytest.fail("tried"))
    model = tiny_model()
    assert not is_in_place(model, torch.device("cuda"))
    assert not is_in_place(model.to("meta"), torch.device("cpu"))


def test_nothing_of_a_trial_stays(tmp_path):
    memory = MemoryConfig(persona_grad="none", mlp_tile=64)
    model = model_for("lora", dropout=0.3)
    trainer = trainer_for(model, arguments(tmp_path, memory=memory, **{CHECKPOINTING: True}))
    model.eval()
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    before, state = {name: p.clone() for name, p in model.named_parameters()}, torch.get_rng_state()
    try_step(trainer, trainer.data_collator)
    assert torch.equal(torch.get_rng_state(), state) and not any(module.training for module in model.modules())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert hooks == sum(len(module._forward_hooks) for module in model.modules())
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}
    assert prefill.PREFILL_CHUNK == 1024 and {getattr(m, "perce_tile", 64) for m in model.modules()} == {64}
