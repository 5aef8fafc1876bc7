"""Models to ask: adapters beside their base, never rounded into it."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from perce.config.schema import InferenceConfig
from perce.measuring.inference import load
from tests.helpers.tiny import read_jsonl, save_tiny_model, tiny_tokenizer


def test_an_adapter_is_scored_as_its_merged_model(gemma, scored, tmp_path):
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(gemma),
        LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1),  # off, when it is scored
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    changed = tiny_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}")
    changed.save_pretrained(tmp_path / "adapter")  # its own chat template wins over the base model's
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    changed.save_pretrained(tmp_path / "merged")
    scored("--model", tmp_path / "adapter", "--jsonl", tmp_path / "a.jsonl")
    scored("--model", tmp_path / "merged", "--jsonl", tmp_path / "b.jsonl")
    scored("--jsonl", tmp_path / "c.jsonl")
    a, b, c = (read_jsonl(tmp_path / f"{name}.jsonl")[0]["logp"] for name in "abc")
    assert a == pytest.approx(b, abs=1e-4) and a != pytest.approx(c, abs=1e-2)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "puts virtual tokens before the prompt"),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]), "sits on the output embedding"),
    ],
)
def test_adapters_that_would_be_misread_are_refused(scored, tmp_path, config, reason):
    path = save_tiny_model(tmp_path / "model", "llama")
    get_peft_model(AutoModelForCausalLM.from_pretrained(path), config).save_pretrained(tmp_path / "adapter")
    err = scored("--model", tmp_path / "adapter", code=2).err
    assert reason in err and "Merge it into its base" in err and str(tmp_path / "adapter") in err


def test_an_adapter_is_not_rounded_into_a_bf16_base(gemma, tmp_path, monkeypatch):
    """Less than half a unit in the last place of a weight would be lost, and most of an adapter is."""
    monkeypatch.setattr("perce.model.loading.bf16_is_sound", lambda device: True)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(gemma), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-4)
    adapted.save_pretrained(tmp_path / "adapter")
    saved = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    model, _, _ = load(InferenceConfig(model=str(tmp_path / "adapter"), precision="bf16"))
    loaded = dict(model.named_parameters())
    assert saved and all(torch.equal(loaded[name], p) for name, p in saved.items())
    base = {name: p for name, p in adapted.named_parameters() if "lora_" not in name}
    assert all(torch.equal(loaded[name], p.bfloat16()) for name, p in base.items())
