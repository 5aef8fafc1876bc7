"""What cannot be loaded is named, dropout is off, and what a config does not say is no error."""

from types import SimpleNamespace

import pytest
from transformers import ByT5Tokenizer

from perce import UserError, prompt_ids
from perce.config.schema import ModelConfig
from perce.data.pairs import PairBuilder
from perce.hub import check_tokenizer, load_tokenizer, stated
from perce.model.loading import load_model
from tests.helpers.architectures import CONFIGS, tiny_config
from tests.helpers.tiny import demo_examples, tiny_model, tiny_tokenizer


def test_dropout_of_a_saved_model_is_switched_off(tmp_path):
    tiny_model("phi", resid_pdrop=0.1, attention_dropout=0.1).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), ModelConfig(lora_r=0, precision="fp32"), "cpu")
    assert model.config.resid_pdrop == model.config.attention_dropout == 0.0


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


def test_what_a_config_does_not_say_is_none():
    """Recurrent models have no heads, GPT-2 names them in its own way, and a model may have others in each layer."""
    assert stated(tiny_config("mamba"), "num_attention_heads") is None
    assert stated(tiny_config("gpt2"), "num_attention_heads") == 4
    assert stated(CONFIGS["gemma4_text"](), "head_dim") is None


def test_tokenizers_without_places_in_the_text_are_refused(tmp_path):
    """One written in Python, a processor, and whatever mistral-common loads."""
    slow = ByT5Tokenizer()
    slow.save_pretrained(tmp_path)
    tiny_config("gpt2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"--model {tmp_path}: expected a fast tokenizer.*got ByT5Tokenizer"):
        load_tokenizer(str(tmp_path))
    processor = SimpleNamespace(image_processor=None)
    for tokenizer, said in ((slow, "got ByT5Tokenizer"), (processor, "processor.tokenizer")):
        with pytest.raises(UserError, match=said):
            PairBuilder(tokenizer, max_length=500)
        with pytest.raises(UserError, match=said):
            prompt_ids(tokenizer, ["I am."], "Are you?")
    check_tokenizer(tiny_tokenizer(), "tokenizer")


def test_neither_pad_token_nor_chat_template_is_needed():
    tokenizer = tiny_tokenizer(None)
    tokenizer.pad_token = None
    assert PairBuilder(tokenizer, max_length=500).build(demo_examples(1)[0]).input_ids
