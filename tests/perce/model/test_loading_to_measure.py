"""Loading models to measure: adapters are never merged into their base, and weights are those that were saved."""

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
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from perce import UserError
from perce.config.questions import InferenceConfig
from perce.files.integrity import LIST, sizes_and_digests
from perce.model.loading import load_to_measure
from tests.helpers.tiny import read_jsonl, save_tiny_model, tiny_model, tiny_tokenizer, with_drawn_adapter
from tests.helpers.training import fails


def test_an_adapter_is_scored_as_its_merged_model(gemma, scored, tmp_path):
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(gemma),
        LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1),  # off while it is scored
    )
    with_drawn_adapter(adapted).save_pretrained(tmp_path / "adapter")
    changed = tiny_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}")
    changed.save_pretrained(tmp_path / "adapter")  # its own chat template wins over the base model's
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    changed.save_pretrained(tmp_path / "merged")
    scored("--model", tmp_path / "adapter", "--jsonl", tmp_path / "a.jsonl")
    scored("--model", tmp_path / "merged", "--jsonl", tmp_path / "b.jsonl")
    scored("--jsonl", tmp_path / "c.jsonl")
    a, b, c = (read_jsonl(tmp_path / f"{name}.jsonl")[0]["logp"] for name in "abc")
    assert a == pytest.approx(b, abs=1e-4) and a != pytest.approx(c, abs=1e-2)


Q = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    "config",
    [PveraConfig(r=4, **Q), LoraConfig(monteclora_config=MontecloraConfig(), **Q), AdaLoraConfig(total_step=9, **Q)],
    ids=["pvera", "monteclora", "adalora"],
)
def test_adapters_that_are_wrong_only_in_training_are_scored(gemma, scored, tmp_path, config):
    """What is random in training, or would add to the loss, is not there in eval mode."""
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(gemma), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    scored("--model", tmp_path / "adapter", "--jsonl", tmp_path / "a.jsonl")
    scored("--model", tmp_path / "merged", "--jsonl", tmp_path / "b.jsonl")
    a, b = (read_jsonl(tmp_path / f"{name}.jsonl")[0]["logp"] for name in "ab")
    assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (PveraConfig(sample_at_inference=True, **Q), "sample_at_inference: each forward pass draws"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING learns a prompt"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PREFIX_TUNING learns a prompt"),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]), "is on the output embedding"),
    ],
)
def test_adapters_that_would_be_misread_are_refused(scored, tmp_path, config, reason):
    path = save_tiny_model(tmp_path / "model", "llama")
    get_peft_model(AutoModelForCausalLM.from_pretrained(path), config).save_pretrained(tmp_path / "adapter")
    err = scored("--model", tmp_path / "adapter", code=2).err
    assert reason in err and "merged into its base" in err and str(tmp_path / "adapter") in err


def test_an_adapter_whose_weights_are_not_all_in_its_file_is_refused(gemma, scored, tmp_path):
    """PEFT would leave them as it begins them: without an effect."""
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(gemma), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "layers.1." not in name}, file)
    err = scored("--model", tmp_path, code=2).err
    assert f"--model {tmp_path}: " in err and "missing adapter keys" in err and "model.layers.1." in err


def test_an_adapter_of_a_deeper_model_is_refused(scored, tmp_path):
    """PEFT would leave out what is for layers that the base model does not have."""
    base = save_tiny_model(tmp_path / "base")
    deeper = get_peft_model(tiny_model(num_hidden_layers=3), LoraConfig(task_type="CAUSAL_LM"))
    deeper.peft_config["default"].base_model_name_or_path = str(base)
    deeper.save_pretrained(tmp_path / "adapter")
    err = scored("--model", tmp_path / "adapter", code=2).err
    assert "does not fit its base model, which has no place for base_model.model.model.layers.2." in err


def test_what_lies_beside_an_adapter(gemma, scored, tmp_path):
    """Some programs put the base model's config.json there. A model that an adapter was merged into would get it twice:
    transformers adds an adapter that it finds."""
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(gemma), LoraConfig(task_type="CAUSAL_LM"))
    with_drawn_adapter(adapted).save_pretrained(tmp_path)
    scored("--model", tmp_path, "--jsonl", tmp_path / "a.jsonl")
    adapted.config.save_pretrained(tmp_path)
    scored("--model", tmp_path, "--jsonl", tmp_path / "b.jsonl")
    assert read_jsonl(tmp_path / "a.jsonl")[0]["logp"] == read_jsonl(tmp_path / "b.jsonl")[0]["logp"]
    adapted.merge_and_unload().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    err = scored("--model", tmp_path, code=2).err
    assert f"--model {tmp_path}: has a model's weights and an adapter" in err and "adapter_config.json" in err


def test_an_adapter_is_not_rounded_into_a_bf16_base(gemma, tmp_path, monkeypatch):
    """A change below half a unit in the last place of a weight would be lost; most of an adapter is that small."""
    monkeypatch.setattr("perce.model.loading.bf16_is_sound", lambda device: True)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(gemma), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with_drawn_adapter(adapted, std=1e-4).save_pretrained(tmp_path / "adapter")
    saved = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    model, _, _ = load_to_measure(InferenceConfig(model=str(tmp_path / "adapter"), precision="bf16"))
    loaded = dict(model.named_parameters())
    assert saved and all(torch.equal(loaded[name], p) for name, p in saved.items())
    base = {name: p for name, p in adapted.named_parameters() if "lora_" not in name}
    assert all(torch.equal(loaded[name], p.bfloat16()) for name, p in base.items())


def trained_on(train, tmp_path, base):
    """A run that trained an adapter on a base of its own."""
    assert train(model=save_tiny_model(base), max_steps=1, save_steps=1)[0] == 0
    return tmp_path / "run"


def test_an_adapter_beside_another_base_than_its_own_is_refused(train, scored, tmp_path):
    run = trained_on(train, tmp_path, tmp_path / "base")
    for model in (run, run / "checkpoint-1"):
        scored("--model", model, "--split", "train")
    tiny_model(initializer_range=0.1).save_pretrained(tmp_path / "base")  # like the result of another training run
    for model in (run, run / "checkpoint-1"):
        err = scored("--model", model, code=2).err
        assert f"--model {model}: its base {tmp_path / 'base'} is not the model" in err and "base.json" in err
    again = train("--resume", model=None, data=None, precision=None, max_steps=2)
    fails(again, f"--resume: its base {tmp_path / 'base'} is not the model that it was trained on", "base.json")
    (run / "base.json").unlink()
    scored("--model", run, "--split", "train")


def test_a_run_that_did_not_finish_is_told(train, scored, tmp_path):
    run = trained_on(train, tmp_path, tmp_path / "base")
    assert "finished" not in scored("--model", run, "--split", "train").err
    (run / "complete.json").unlink()  # as when it is resumed for more steps, and stopped
    err = scored("--model", run, "--split", "train").err
    assert (
        f"--model {run}: was not finished (complete.json is missing)" in err
        and "older than the run's checkpoints" in err
    )
    err = scored("--model", run / "checkpoint-9", "--split", "train", code=2).err
    assert "no such directory" in err and "finished" not in err
    (run / "adapter_config.json").unlink()
    err = scored("--model", run, code=2).err
    assert "this run is not finished" in err and f"or give {run / 'checkpoint-1'}." in err


def test_all_weights_need_no_base(train, scored, tmp_path):
    base = save_tiny_model(tmp_path / "base")
    assert train(model=base, lora_r=0, max_steps=1, save_steps=1)[0] == 0
    tiny_model(initializer_range=0.1).save_pretrained(base)
    scored("--model", tmp_path / "run", "--split", "train")
    assert train("--resume", model=None, data=None, precision=None, lora_r=0, max_steps=2)[0] == 0


def test_a_base_by_a_relative_path_is_told_and_a_missing_one_too(scored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "base")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained("./base"), LoraConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    err = scored("--model", "adapter").err
    assert f"read as {tmp_path / 'base'}" in err and "adapter/adapter_config.json says './base', a relative path" in err
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace("./base", str(tmp_path / "gone")))
    err = scored("--model", "adapter", code=2).err
    assert f"--model adapter: its base model {tmp_path / 'gone'} does not exist" in err and "adapter_config.json" in err


def test_a_base_in_a_revision_of_its_own_is_refused_unless_it_lies_here(scored, tmp_path):
    base = save_tiny_model(tmp_path / "base")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(revision="v2"))
    adapted.save_pretrained(tmp_path / "adapter")
    scored("--model", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), "owner/model"))
    err = scored("--model", tmp_path / "adapter", code=2).err
    assert f"{config} asks for revision v2 of its base model owner/model" in err and "hf download" in err


def flip(path, places):
    content = bytearray(path.read_bytes())
    for place in places:
        content[place] ^= 0b100
    path.write_bytes(content)


def test_every_shard_is_looked_at(tmp_path):
    save_tiny_model(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path, max_shard_size="30KB")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / LIST).write_text(json.dumps(sizes_and_digests(tmp_path, tmp_path.glob("*.safetensors"))))
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    load_to_measure(InferenceConfig(model=str(tmp_path)))
    flip(shards[1], [-2])
    with pytest.raises(UserError, match=rf"{shards[1].name} is not what was written"):
        load_to_measure(InferenceConfig(model=str(tmp_path)))
    assert len(shards) > 1


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("inside", [".", "checkpoint-1"])
def test_weights_that_have_changed_since_they_were_saved_are_refused(train, scored, tmp_path, lora_r, inside):
    assert train(max_steps=1, save_steps=1, lora_r=lora_r)[0] == 0
    model = tmp_path / "run" / inside
    (weights,) = model.glob("*model.safetensors")
    scored("--model", model)
    flip(weights, [-2])
    err = scored("--model", model, code=2).err
    assert f"--model {model}: {weights.name} is not what was written" in err and "complete.json" in err
    flip(weights, [-2])
    scored("--model", model)
    (model / "optimizer.pt").unlink(missing_ok=True)  # saves space; the test does not need it
    scored("--model", model)
    (model / "complete.json").write_text("[]")
    assert f"{model}/complete.json cannot be read" in scored("--model", model, code=2).err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", b""),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b"\xff"),
        ("adapter_config.json", b'{"base_model_name_or_path": 3}'),
        ("adapter_config.json", b'{"peft_type": 3, "base_model_name_or_path": "BASE"}'),
        ("adapter_config.json", b'{"peft_type": "LORAX", "base_model_name_or_path": "BASE"}'),
        ("adapter_config.json", b'{"peft_type": "LORA", "r": "x", "base_model_name_or_path": "BASE"}'),
        ("adapter_model.safetensors", b""),
        ("adapter_model.safetensors", b"HALF"),
        ("adapter_model.safetensors", b"\xff" * 99),
        ("tokenizer.json", b""),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"HALF"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"{"),
    ],
)
def test_a_damaged_adapter_is_one_paragraph(gemma, scored, tmp_path, name, content):
    adapter = tmp_path / "adapter"
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(gemma), config).save_pretrained(adapter)
    tiny_tokenizer().save_pretrained(adapter)
    file = adapter / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content == b"HALF" else content.replace(b"BASE", str(gemma).encode()))
    twice, err, last = scored("--model", adapter, code=2).err.split("\n")
    assert twice.startswith("--model: given twice") and err.startswith(f"error: --model {adapter}: ") and not last


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"version": 1'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"])
def test_a_damaged_model_is_one_paragraph(scored, tmp_path, name, content):
    path = save_tiny_model(tmp_path / "model")
    (path / name).write_bytes(content)
    if (name, content) == ("tokenizer_config.json", b"{}"):
        return  # says nothing, which is allowed
    err = scored("--model", path, code=2).err
    assert f"error: --model {path}: " in err and "Traceback" not in err
