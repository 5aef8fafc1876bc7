"""What cannot be loaded is named, and dropout is off."""

import pytest

from perce import UserError
from perce.config.schema import ModelConfig
from perce.hub import load_tokenizer
from perce.model.loading import load_model
from tests.helpers.tiny import tiny_model


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
