"""What cannot be loaded is named, dropout is off, and what a config does not say is no error."""

import json
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer

from perce import UserError, hub, prompt_ids
from perce.config.schema import ModelConfig
from perce.data.pairs import PairBuilder
from perce.hub import check_tokenizer, load_pretrained, load_tokenizer, read_config, stated
from perce.model.loading import load_model
from tests.helpers.architectures import CONFIGS, tiny, tiny_config
from tests.helpers.tiny import demo_examples, save_tiny_model, tiny_model, tiny_tokenizer


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
        ("runs/x1/model.safetensors", ["a file", "Give its directory: /", "/runs/x1."]),
    ],
)  # fmt: skip
def test_a_mistyped_model_is_a_directory_that_is_not_there(path, fragments, tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/x1/checkpoint-8").mkdir(parents=True)
    (tmp_path / "models/me-1").mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "runs/x1" / name).touch()
    for load in (load_tokenizer, read_config):
        with pytest.raises(UserError) as caught:
            load(path)
        assert all(fragment in str(caught.value) for fragment in fragments) and "\n" not in str(caught.value)
        assert "could not be loaded" not in str(caught.value)


def test_a_file_that_is_no_part_of_a_model_has_no_directory_to_give(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(UserError) as caught:
        load_tokenizer("rows.jsonl")
    assert str(caught.value) == "--model rows.jsonl: expected the directory of a model, got a file."


def test_a_directory_of_runs_names_them(tmp_path):
    for name in ("mine/config.yaml", "mine/run.json", "base/config.json", "notes/config.yaml", "empty/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for load in (load_tokenizer, read_config):
        with pytest.raises(
            UserError, match=rf"has no config\.json.* Give one in it: {tmp_path}/base, {tmp_path}/mine\.$"
        ):
            load(str(tmp_path))


@pytest.mark.parametrize("newest", [None, 4, 12])
def test_a_run_that_is_not_finished_is_told_with_what_to_do(tmp_path, newest):
    for name in ("config.yaml", "run.json"):
        (tmp_path / name).touch()
    for step in filter(None, (4, newest, 137)):
        (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
        if newest and step != 137:  # the last one was being written
            (tmp_path / f"checkpoint-{step}/complete.json").touch()
            (tmp_path / f"checkpoint-{step}" / ("config.json" if step == 4 else "adapter_config.json")).touch()
    (tmp_path / "checkpoint-99").mkdir()
    (tmp_path / "checkpoint-99/complete.json").touch()  # has shards only
    for load in (load_tokenizer, read_config):
        with pytest.raises(
            UserError, match=f"--model {tmp_path}: this run is not finished, or still running"
        ) as caught:
            load(str(tmp_path))
        said = str(caught.value)
        assert f"--resume --output_dir {tmp_path}" in said
        assert ("or give " in said, f"checkpoint-{newest}." in said) == (newest is not None,) * 2


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


# ---- the weights in a model's files


def resaved(directory, change, **config):
    """The model in this directory after a change of its tensors (a function of their dict) and of its config.json."""
    file, told = directory / "model.safetensors", directory / "config.json"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    told.write_text(json.dumps(json.loads(told.read_text()) | config))
    return str(directory)


def without(*parts):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not any(p in name for p in parts)}


def wrapped(tensors):
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def partly_wrapped(tensors):
    return {name.replace("lm_head", "module.lm_head"): tensor for name, tensor in without("layers.1.")(tensors).items()}


@pytest.mark.parametrize(
    ("architecture", "change", "config", "fragments"),
    [
        ("llama", without("lm_head"), {}, ["1 of 21 weights", "(lm_head.weight)", "LlamaForCausalLM"]),
        ("llama", dict, {"num_hidden_layers": 3}, ["9 of 30 weights", "(model.layers.2.", " and 5 more)"]),
        ("llama-tied", without("embed_tokens"), {}, ["not in its files", "model.embed_tokens.weight"]),
        ("llama", wrapped, {}, ["21 of 21 weights", "21 under other names (module.lm", "module. before"]),
        ("llama-tied", wrapped, {}, ["21 of 21 weights", "20 under other names (module.", "module. before"]),
        ("llama", partly_wrapped, {}, ["10 of 21 weights", "1 under other names (module.lm", "Expected all weights"]),
        ("llama", dict, {"vocab_size": 401}, ["lm_head.weight is 400 × 32 in its files and 401 × 32", "1 more"]),
        (
            "mixtral", without("experts.1.w1"), {},
            ["missing or have another shape (model.layers.0.", "experts.gate_up_proj, model.layers.1."],
        ),
    ],
)  # fmt: skip
def test_weights_that_are_not_in_a_model_s_files_are_not_drawn_at_random(
    tmp_path, architecture, change, config, fragments
):
    path = resaved(save_tiny_model(tmp_path, architecture), change, **config)
    for load in (load_pretrained, lambda path: load_model(path, ModelConfig(precision="fp32"), "cpu")):
        with pytest.raises(UserError) as caught:
            load(path)
        said = str(caught.value)
        assert said.startswith(f"--model {path}: ") and "\n" not in said and "above" not in said
        assert all(fragment in said for fragment in fragments), said


def test_what_a_model_ties_need_not_be_in_its_files(tmp_path, capsys):
    load_pretrained(resaved(save_tiny_model(tmp_path, "llama-tied"), without("lm_head")))
    assert "in its files" not in capsys.readouterr().err


def test_buffers_that_are_not_in_a_model_s_files_are_told(tmp_path, capsys):
    """Models compute most of theirs; this one learns its own, by which experts are chosen."""
    tiny("deepseek_v3").save_pretrained(tmp_path)
    load_pretrained(str(tmp_path))
    assert "in its files" not in capsys.readouterr().err
    load_pretrained(resaved(tmp_path, without("e_score_correction_bias")))
    told = "1 buffers are not in its files and stay as the model makes them (model.layers.1.mlp.gate.e_score"
    assert told in capsys.readouterr().err


def test_tensors_that_a_model_does_not_have_are_told(tmp_path, capsys):
    """As of a vision tower next to the text model that is loaded, or a layer that config.json does not count."""
    path = resaved(save_tiny_model(tmp_path), dict, num_hidden_layers=1)
    assert len(load_pretrained(path).model.layers) == 1
    err = capsys.readouterr().err
    assert (
        f"--model {path}: 9 tensors in its files are not used" in err and "model.layers.1." in err and "5 more" in err
    )
