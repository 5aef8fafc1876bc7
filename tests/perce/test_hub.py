"""What cannot be loaded is named, dropout is off, and what a config does not say is no error."""

from types import SimpleNamespace

import pytest
from transformers import ByT5Tokenizer

from perce import UserError, hub, prompt_ids
from perce.config.schema import ModelConfig
from perce.data.pairs import PairBuilder
from perce.hub import check_tokenizer, load_tokenizer, read_config, stated
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


@pytest.fixture
def no_hub(monkeypatch):
    """No network: who asks all the same waits for most of a minute, between one try and the next."""

    def unknown(*_, **__):
        raise OSError("Name or service not known")

    hub.hub_failure.cache_clear()
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits for the Hub"))
    yield
    hub.hub_failure.cache_clear()


@pytest.mark.parametrize(
    ("path", "fragments"),
    [
        ("runs/x", ["--model runs/x: no such directory", "Did you mean runs/x1?"]),
        ("runz/x1", ["Did you mean runs/x1?"]), ("x1", ["no such directory", "Did you mean runs/x1?"]),
        ("runs/x1/checkpoint-9", ["no such directory", "Did you mean runs/x1/checkpoint-8?"]),
        ("models/you", ["no such directory", "Hub", "Name or service not known"]),
        ("models/me-2", ["no such directory", "looked in", "Did you mean models/me-1?", "hf download"]),
        ("./x", ["no such directory"]), ("owner/name", ["no such directory", "Hub", "Name or service not known"]),
        ("runs/x1/model.safetensors", ["a file", "Give its directory: runs/x1"]),
    ],
)  # fmt: skip
def test_a_mistyped_model_is_a_directory_that_is_not_there(path, fragments, tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/x1/checkpoint-8").mkdir(parents=True)
    (tmp_path / "models/me-1").mkdir(parents=True)
    (tmp_path / "runs/x1/model.safetensors").touch()
    for load in (load_tokenizer, read_config):
        with pytest.raises(UserError) as caught:
            load(path)
        assert all(fragment in str(caught.value) for fragment in fragments) and "\n" not in str(caught.value)
        assert "could not be loaded" not in str(caught.value)


def test_runs_that_are_not_there_are_no_hub_ids(tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--model runs/x: no such directory") as caught:
        load_tokenizer("runs/x")
    assert "service" not in str(caught.value)


@pytest.mark.parametrize(
    ("failure", "there", "cached_alone"), [(None, "Qwen/other", False), ("no route", "Qwen/other", True),
                                           (None, "Qwen/Qwen3-8B", True), (None, "Qwen3-4B-mine", False)],
)  # fmt: skip
def test_a_hub_id_is_one_where_a_directory_has_its_owners_name(failure, there, cached_alone, tmp_path, monkeypatch):
    """The Hub is not asked for what may well be mistyped; what was fetched before is read all the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / there).mkdir(parents=True)
    monkeypatch.setattr(hub, "hub_failure", lambda: failure)
    fetched = SimpleNamespace(from_pretrained=lambda path, **options: (path, options))
    expected = {"local_files_only": True} if cached_alone else {}
    assert hub.from_pretrained(fetched, "Qwen/Qwen3-4B") == ("Qwen/Qwen3-4B", expected)


@pytest.mark.parametrize(("path", "near"), [("Qwen/x", ""), ("x", "Did you mean runs/x1?"), ("runz/x", "runs/x1?")])
def test_what_the_hub_does_not_have_may_be_a_directory_that_is_not_there(path, near, tmp_path, monkeypatch):
    def unknown(path, **options):
        raise OSError(f"{path} is not a valid model identifier")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "runs/x1").mkdir(parents=True)
    monkeypatch.setattr(hub, "hub_failure", lambda: None)
    with pytest.raises(UserError, match=f"--model {path}: .*not a valid model identifier") as caught:
        hub.from_pretrained(SimpleNamespace(from_pretrained=unknown), path)
    assert "no such directory" in str(caught.value) and near in str(caught.value)


def test_whether_the_hub_can_be_reached_is_asked_once_and_in_seconds(monkeypatch):
    asked = []

    def head(self, url, timeout=None, **_):
        asked.append((url, timeout))
        raise OSError("no route to host\nadvice")

    from huggingface_hub.utils import get_session

    monkeypatch.setattr(type(get_session()), "head", head)
    hub.hub_failure.cache_clear()
    assert hub.hub_failure() == hub.hub_failure() == "no route to host" and len(asked) == 1 and asked[0][1] <= 10
    hub.hub_failure.cache_clear()
    monkeypatch.setattr(type(get_session()), "head", lambda *_, **__: None)
    assert hub.hub_failure() is None
    hub.hub_failure.cache_clear()


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
