"""The model card of a run: what it says, and that its code prompts the model as in training."""

import copy
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

from perce import UserError, prompt_ids, prompt_text
from perce.config.commands import TrainOptions
from perce.config.prompt import PERSONA_FOOTERS, PromptStyle
from perce.config.schema import DataConfig, ModelConfig
from perce.hub import fingerprint
from perce.model.loading import add_adapter, lora_config
from perce.running.card import CARD, ENTRIES, QUERY, write_card
from perce.training.serving import serve_as_trained
from tests.helpers import ROOT
from tests.helpers.templates import CHAT_TEMPLATES
from tests.helpers.tiny import tiny_model
from tests.helpers.tokenizers import tokenizer_like

NUMBERS = {"loss with persona": [2.5, 2.0], "mean PIR": [0.1]}


def saved_run(directory, template, lora_r=0, **data):
    """A run directory with a model nobody has trained, its options and its card."""
    tokenizer = copy.deepcopy(tokenizer_like("qwen2"))
    tokenizer.chat_template = CHAT_TEMPLATES[template]
    model = tiny_model(vocab_size=1000, eos_token_id=tokenizer.eos_token_id, bos_token_id=0, pad_token_id=1)
    model.save_pretrained(directory / "base")
    model.name_or_path = model.config._name_or_path = str(directory / "base")
    options = TrainOptions(ModelConfig(lora_r=lora_r), DataConfig(**data))
    if lora_r:
        model = add_adapter(model, lora_config(options.model))
    serve_as_trained(
        model, tokenizer, [{"input_ids": [5, tokenizer.convert_tokens_to_ids("<|im_end|>")]}], options.data
    )
    run = directory / "run"
    model.save_pretrained(run)
    (model.get_base_model() if lora_r else model).generation_config.save_pretrained(run)
    tokenizer.save_pretrained(run)
    write_card(run, options, str(directory / "base"), tokenizer, NUMBERS, "26 steps")
    return run, tokenizer, options


@pytest.mark.parametrize(
    ("template", "lora_r", "data"),
    [
        ("chatml", 0, {}),
        ("chatml", 4, {"prompt": '{"place": "user", "header": "Known:\\n"}'}),
        ("gemma", 0, {}),
        ("qwen3-switch", 0, {"chat_template_kwargs": '{"enable_thinking": false}'}),
    ],
    ids=["plain", "adapter, own words", "no system role", "variables"],
)
def test_the_code_of_the_card_asks_as_in_training(tmp_path, monkeypatch, capsys, template, lora_r, data):
    run, tokenizer, options = saved_run(tmp_path, template, lora_r, **data)
    code = re.search(r"```python\n(.*?)```", (run / CARD).read_text(encoding="utf-8"), re.DOTALL)[1]
    assert "perce" not in code
    monkeypatch.chdir(run)
    names = {}
    torch.manual_seed(0)
    exec(code.replace("max_new_tokens=200", "max_new_tokens=4"), names)
    assert names["prompt"][0].tolist() == prompt_ids(
        tokenizer, ENTRIES, QUERY, chat_template_kwargs=options.data.template_kwargs()
    )


def test_the_code_of_the_documentation_asks_as_in_training(tmp_path):
    run, tokenizer, _ = saved_run(tmp_path, "chatml")
    page = (ROOT / "docs/SERVING.md").read_text(encoding="utf-8")
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        assert "perce" not in code or "pick_passages" in code, "it needs this package for histories alone"
        exec(code.replace("runs/demo", str(run)).replace("max_new_tokens=100", "max_new_tokens=4"), names)
    assert names["prompt"][0].tolist() == prompt_ids(tokenizer, ENTRIES, QUERY)
    assert names["system"] == prompt_text(ENTRIES)


def test_the_prompt_of_the_documentation_is_the_default():
    page = (ROOT / "docs/SERVING.md").read_text(encoding="utf-8")
    keys = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    assert PromptStyle.of(keys) == replace(PromptStyle(), footer=PERSONA_FOOTERS[0])


def test_the_card_says_what_the_run_was(tmp_path, monkeypatch):
    run, *_ = saved_run(tmp_path, "chatml", 4, data=str(tmp_path / "rows|1.jsonl"))
    text = (run / CARD).read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "peft"
    assert re.search(r"\| base model \| base \(sha256 [0-9a-f]{16}\) \|", text)
    assert "LoRA of rank 4, 26 steps" in text and "2.5000 → 2.0000" in text and "rows\\|1.jsonl" in text
    assert "| licence | not set" in text
    before = fingerprint(str(tmp_path / "base"))
    weights = tmp_path / "base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert before in text and fingerprint(str(tmp_path / "base")) != before

    def unreachable(path):
        raise UserError(f"{path}: no network")

    monkeypatch.setattr("perce.hub.read_config", unreachable)
    assert fingerprint("owner/name") == "unknown"
    monkeypatch.setattr("perce.hub.read_config", lambda path: SimpleNamespace(_commit_hash="0a1b"))
    assert fingerprint("owner/name") == "0a1b"


def test_the_card_promises_what_there_is(tmp_path):
    run, tokenizer, options = saved_run(tmp_path, "chatml", special_tokens_in_text="allow")
    text = (run / CARD).read_text(encoding="utf-8")
    assert "as a list" in text and "were plain text" not in text and "pick_passages" not in text
    tokenizer.chat_template = CHAT_TEMPLATES["chatml"]
    write_card(run, replace(options, data=DataConfig()), str(tmp_path / "base"), tokenizer, NUMBERS, "1 step")
    text = (run / CARD).read_text(encoding="utf-8")
    assert "as a list" not in text and "were plain text" in text
    write_card(run, options, str(tmp_path / "base"), None, NUMBERS, "1 step")  # documents
    assert "How to ask" not in (run / CARD).read_text(encoding="utf-8")


def test_a_card_can_be_uploaded(tmp_path, monkeypatch):
    """The Hub refuses a card whose base model is a path, and paths may contain names of people."""
    (tmp_path / "rows.jsonl").touch()
    run, _, options = saved_run(tmp_path, "chatml", data=str(tmp_path / "rows.jsonl"))
    text = (run / CARD).read_text(encoding="utf-8")
    assert "base_model" not in yaml.safe_load(text.split("---")[1]) and str(tmp_path) not in text
    assert "| data | rows.jsonl |" in text
    monkeypatch.setattr("perce.running.card.fingerprint", lambda path: "0a1b")
    write_card(run, options, "owner/name", None, NUMBERS, "1 step")
    text = (run / CARD).read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "owner/name" and "| owner/name (0a1b) |" in text


@pytest.mark.parametrize(
    ("retriever", "which"),
    [("bm25", "that fit the request best, best first"), ("recency", "that were the latest, the latest first")],
)
def test_the_card_says_which_passages_of_a_history_a_prompt_showed(tmp_path, retriever, which):
    run, tokenizer, options = saved_run(tmp_path, "chatml", retriever=retriever)
    write_card(run, options, str(tmp_path / "base"), tokenizer, NUMBERS, "1 step", of_histories=True)
    text = " ".join((run / CARD).read_text(encoding="utf-8").split())
    assert f"the 4 passages of the user's history {which}. `perce.pick_passages(" in text
