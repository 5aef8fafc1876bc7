"""Loads models, configs and tokenizers by path or Hub id. Their many kinds of failures become a UserError."""

import contextlib
import hashlib
import json
import re
import traceback
from pathlib import Path
from typing import Any

from perce.config.options import as_called
from perce.config.yaml_file import read_yaml
from perce.errors import UserError, first_line, in_one_line
from perce.files.integrity import LIST, read_object
from perce.files.network import hub_failure
from perce.files.paths import did_you_mean, near_paths
from perce.files.runs import BASE_NAME, lacking
from perce.process import is_first_process
from perce.visible import in_short, say


def load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, path)
    check_tokenizer(tokenizer, f"--model {path}")
    return tokenizer


def tokenizer_of(path: str, base: str | None) -> Any:
    """The model's tokenizer; for an adapter the one saved in its directory, chat template included, or its base's."""
    from transformers import AutoTokenizer

    local = Path(path).expanduser()
    if base is not None and (local / "tokenizer.json").is_file():
        return loaded(AutoTokenizer, path, "--model", "an adapter's tokenizer", "adapter and tokenizer")
    return load_tokenizer(base or path)


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """UserError for a tokenizer that does not say which characters each token covers: one written in Python, that of
    mistral-common, or a processor."""
    if hasattr(tokenizer, "backend_tokenizer"):
        return
    remedy = "Give a directory with a tokenizer.json, or another model."
    if hasattr(tokenizer, "image_processor") or hasattr(tokenizer, "feature_extractor"):
        remedy = "Give its tokenizer: processor.tokenizer."
    raise UserError(
        f"{name}: expected a fast tokenizer, which reports the characters of each token, got "
        f"{type(tokenizer).__name__}. {remedy}"
    )


def from_anywhere(path: str) -> str:
    """The absolute path, if it exists on this machine; a Hub id unchanged."""
    local = Path(path).expanduser()
    return str(local.resolve()) if local.exists() else path


def is_adapter(directory: Path) -> bool:
    """Whether it holds an adapter and no model; beside an adapter, some programs save its base model's config.json."""
    weights = (*directory.glob("model*.safetensors"), *directory.glob("pytorch_model*.bin"))
    has_model = bool(weights) and (directory / "config.json").is_file()
    return (directory / "adapter_config.json").is_file() and not has_model


def base_of_adapter(path: str) -> str | None:
    """The base model of a local adapter directory; None for a whole model."""
    local = Path(path).expanduser()
    file = local / "adapter_config.json"
    if not is_adapter(local):
        return None
    try:
        config = read_object(file)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path}: {file} cannot be read ({in_one_line(error)}). Restore it.") from error
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base or not isinstance(base, str):
        raise UserError(
            f"--model {path}: {file} does not name the adapter's base model. Add base_model_name_or_path, the "
            "directory or Hub id that it was trained on."
        )
    named = Path(base).expanduser()
    if named.is_absolute() and not named.exists():
        raise UserError(
            f"--model {path}: its base model {base} does not exist. Restore it, or correct base_model_name_or_path in "
            f"{file}."
        )
    if revision not in (None, "", "main") and not named.exists():
        raise UserError(
            f"--model {path}: {file} asks for revision {revision} of its base model {base}, and perce would load the "
            f"newest. Fetch that one (hf download {base} --revision {revision} --local-dir DIR) and give its directory "
            "as base_model_name_or_path, or set revision to null."
        )
    if not named.is_absolute() and named.exists():
        say(f"{file} says {base!r}, a relative path; read as {named.resolve()}", error=True)
    return from_anywhere(base)


ENDS = 2**20  # a fingerprint reads this many bytes at the beginning and at the end of a file


def fingerprint(path: str) -> str:
    """Identifies the model that a path or Hub id now stands for: the commit on the Hub ("unknown" if it cannot be
    reached), or a digest of a directory's config and weights (the size, beginning and end of each file)."""
    local = Path(path).expanduser()
    if not local.exists():
        with contextlib.suppress(UserError):
            return str(getattr(read_config(path), "_commit_hash", None) or "unknown")
        return "unknown"
    digest = hashlib.sha256()
    for file in sorted([*local.glob("*.safetensors"), *local.glob("*.bin"), local / "config.json"]):
        if file.is_file():
            with file.open("rb") as content:
                digest.update(f"{file.name} {file.stat().st_size}".encode() + content.read(ENDS))
                content.seek(max(file.stat().st_size - ENDS, 0))
                digest.update(content.read(ENDS))
    return f"sha256 {digest.hexdigest()[:16]}"


def base_facts(path: str) -> str:
    """The content of BASE_NAME, in which a run records the base model of its adapter."""
    return json.dumps({"base": from_anywhere(path), "fingerprint": fingerprint(path)}, indent=1) + "\n"


def check_base(run: Path | None, base: str, option: str) -> None:
    """UserError if an adapter's base is not the model that its run recorded, as far as that can be known."""
    if run is None or not (file := run / BASE_NAME).is_file():
        return
    trained, now = read_yaml(str(file), option).get("fingerprint"), fingerprint(base)
    if trained != now and "unknown" not in (trained, now):
        raise UserError(
            f"{option}: its base {base} is not the model that it was trained on (it is {now}, and {file} records "
            f"{trained}). Restore that model; if only files without influence have changed, delete {BASE_NAME}."
        )


# Names in transformers' configs and modules for dropout, layer drop, stochastic depth and the jitter of a router's
# inputs.
NOISE = re.compile(r"dropout|pdrop|layerdrop|drop_path|drop_prob|jitter")


def noisy_fields(holder: Any) -> dict[str, float]:
    """The fields, with their values, that make a config's model, or a module, random in training mode."""
    fields = {name: value for name, value in vars(holder).items() if NOISE.search(name)}
    return {name: value for name, value in fields.items() if type(value) in (int, float) and 0 < value <= 1}


def read_config(path: str) -> Any:
    """A model's config, in which dropout and other training noise is off, also in configs nested in it."""
    from transformers import AutoConfig, PreTrainedConfig

    def switch_off(part: PreTrainedConfig) -> None:
        for name in noisy_fields(part):
            setattr(part, name, 0.0)
        for inner in list(vars(part).values()):
            if isinstance(inner, PreTrainedConfig):
                switch_off(inner)

    config = from_pretrained(AutoConfig, path)
    switch_off(config)
    return config


def stated(config: Any, name: str) -> Any:
    """The value of a field of a model's config; None if it has no such field, or one value per layer.

    Recurrent models have no attention heads, and if layers differ, transformers refuses to give one value for all."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def load_pretrained(path: str, **kwargs: Any) -> Any:
    """AutoModelForCausalLM.from_pretrained with dropout off; its failures become a UserError."""
    from transformers import AutoModelForCausalLM

    return with_weights(AutoModelForCausalLM, path, config=read_config(path), **kwargs)


def with_weights(auto_class: Any, path: str, *, option: str = "--model", unused: str = "", **kwargs: Any) -> Any:
    """A model by from_pretrained. UserError for weights that its files lack or hold in another shape: transformers
    draws these at random.

    unused: a part of the names of weights that may be drawn at random.
    """
    model, found = from_pretrained(
        auto_class, path, option=option, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    if hasattr(model, "peft_config"):
        raise UserError(
            f"{option} {path}: has a model's weights and an adapter (adapter_config.json), which transformers adds to "
            "them although they may hold it already. Move the files of one of the two to another directory."
        )
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    weights = {name for name in names if not (unused and unused in name)}
    lost, others = sorted(weights.intersection(found["missing_keys"])), sorted(found["unexpected_keys"])
    if differing := sorted(found["mismatched_keys"]):
        name, *shapes = differing[0]
        there, expected = (" × ".join(map(str, shape)) for shape in shapes)
        more = f", and {len(differing) - 1} more differ" if differing[1:] else ""
        raise UserError(
            f"{option} {path}: {name} is {there} in its files and {expected} in the model that config.json describes"
            f"{more}. Put back the config.json that these weights were saved with."
        )
    if lost:
        held = f" Its files hold {len(others)} under other names ({in_short(others)})." if others else ""
        untied = {name for name, _ in model.named_parameters()}.intersection(lost)
        remedy = "Expected all weights of the model that config.json describes: save it again, or correct config.json."
        for wrapper in {name.partition(".")[0] for name in others}:
            if untied and untied <= {name.removeprefix(f"{wrapper}.") for name in others}:
                remedy = f"A wrapper has put {wrapper}. before their names: save the model that is inside it."
        raise UserError(
            f"{option} {path}: {len(lost)} of {len(weights)} weights of {type(model).__name__} are not in its files "
            f"({in_short(lost)}).{held} {remedy}"
        )
    buffers = sorted({name for name, _ in model.named_buffers()}.intersection(found["missing_keys"]))
    if buffers and is_first_process():
        made = "are not in its files and stay as the model makes them"
        say(f"{option} {path}: {len(buffers)} buffers {made} ({in_short(buffers)})", error=True)
    if others and is_first_process():
        say(f"{option} {path}: {len(others)} tensors in its files are not used ({in_short(others)})", error=True)
    return model


def _not_converted(error: Exception) -> list[str]:
    """The weights that could not be made of those in the files; transformers names them only in the report."""
    frames = (frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__))
    found = next((local["loading_info"] for local in frames if "loading_info" in local), None)
    return sorted(getattr(found, "conversion_errors", ()))


def _holds_model(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("config.json", "adapter_config.json"))


def from_pretrained(
    auto_class: Any, path: str, *, option: str = "--model", kind: str = "a causal language model", **kwargs: Any
) -> Any:
    """from_pretrained, whose failures become a UserError that names the option which gave the path."""
    local = Path(path).expanduser()
    if is_adapter(local):
        raise UserError(
            f"{option} {path}: the directory holds only an adapter. Give the base model, or merge the adapter into it "
            "first (AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload())."
        )
    if local.is_file():
        remedy = f" Give its directory: {local.parent.resolve()}." if _holds_model(local.parent) else ""
        raise UserError(f"{option} {path}: expected the directory of a model, got a file.{remedy}")
    if lacking(local) is None and not (local / "config.json").is_file():
        saved = [file.parent for file in local.glob(f"checkpoint-*/{LIST}") if _holds_model(file.parent)]
        newest = max(saved, key=lambda checkpoint: (len(checkpoint.name), checkpoint.name), default=None)
        raise UserError(
            f"{option} {path}: this run is not finished, or still running, so its model is not there yet. Continue it "
            f"with {as_called('train')} --resume --output_dir {path}" + (f", or give {newest}." if newest else ".")
        )
    if local.exists() and not (local / "config.json").is_file():
        inside = sorted(str(entry) for entry in local.glob("*/") if _holds_model(entry) or lacking(entry) is None)
        remedy = f" Give one in it: {in_short(inside)}." if inside else ""
        raise UserError(
            f"{option} {path}: the directory has no config.json, so it is not a saved Hugging Face model.{remedy}"
        )
    if not local.exists() and (path.startswith((".", "/", "~", "runs/")) or path.count("/") > 1):
        reason = f"no such directory, and it is not a Hub id (name or owner/name) either.{did_you_mean(path)}"
        raise UserError(f"{option} {path}: {reason}")
    return loaded(auto_class, path, option, kind, **kwargs)


def loaded(
    auto_class: Any,
    path: str,
    option: str,
    kind: str,
    expected: str = "config.json, tokenizer and weights",
    **kwargs: Any,
) -> Any:
    """The result of from_pretrained for a path that may be valid; UserError for any failure."""
    local = Path(path).expanduser()
    missing = not local.exists()
    mistyped = missing and local.parent != Path(".") and local.parent.is_dir() and bool(near_paths(path))
    failure = hub_failure() if missing and not mistyped else None
    if failure or mistyped:  # it may be in the cache of this machine
        kwargs["local_files_only"] = True
    try:
        return auto_class.from_pretrained(path if missing else str(local), **kwargs)
    except ImportError as error:
        attention = kwargs.get("attn_implementation")
        remedy = f" Choose another --attn_implementation than {attention}." if attention else " Install it."
        raise UserError(f"{option} {path}: a package is missing: {in_one_line(error)}.{remedy}") from error
    except Exception as error:  # damaged files raise many types, such as TypeError and the bare Exception of tokenizers
        if failure or mistyped:
            reason = f", which cannot reach the Hub ({failure})" if failure else ""
            raise UserError(
                f"{option} {path}: no such directory (looked in {Path.cwd()}), and as a Hub id it is not in the cache "
                f"of this machine{reason}.{did_you_mean(path)} Check the path, or fetch it on a machine with network "
                "(hf download)."
            ) from error
        here = f" There is no such directory here.{did_you_mean(path)}" if missing else ""
        reason = first_line(error)
        if "the above report" in reason:  # which is not shown; see core_model_loading.py of transformers
            reason = "weights that are converted when they are read, such as experts, are missing or have another shape"
            reason += f" ({in_short(names)})" if (names := _not_converted(error)) else ""
        raise UserError(
            f"{option} {path}: could not be loaded as {kind} ({reason}). Expected a directory with "
            f"{expected}, or a Hub id that this machine can reach.{here}"
        ) from error
