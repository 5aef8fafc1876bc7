"""What score and evaluate share: a model to ask, the examples to ask it about, and their order in batches."""

import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from perce.checks import check_backend
from perce.config import CONFIG_NAME, DataConfig, InferenceConfig, RunConfig, SplitConfig
from perce.dataset import hold_out
from perce.demo import DATA_DIR, default_model_path
from perce.errors import UserError
from perce.model import check_adapter, load_pretrained, load_tokenizer, prepare_model, resolve_precision
from perce.options import read_yaml
from perce.rows import Rows, available_splits, load_examples

TOKENS_A_FORWARD = {"cpu": 8192, "cuda": 65536}  # longest sequence × sequences: nothing is kept for a backward
SAMPLED_VALUES = 1024  # of each parameter, in the fingerprint of a model


def load(config: InferenceConfig) -> tuple[Any, Any, torch.device]:
    """(model in eval mode with PerCE installed, tokenizer, device).

    An adapter stays beside its base, as in training: merging into bf16 weights rounds, and lost half of what an adapter
    had learnt in 20 steps (docs/LOG.md). UserError for what cannot be loaded.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = check_backend(config.backend, device)
    wanted = "fp32" if config.precision == "auto" and device.type == "cpu" else config.precision
    low = resolve_precision(wanted, device.type) == "bf16"
    kwargs: dict[str, Any] = {"dtype": torch.bfloat16 if low else torch.float32}
    if config.attn_implementation:
        kwargs["attn_implementation"] = config.attn_implementation
    path = config.model or str(default_model_path())
    base = _base_of_adapter(path)
    model = prepare_model(load_pretrained(base or path, **kwargs), backend)
    if base is not None:
        model = _with_adapter(model, path)
    return model.to(device).eval(), _tokenizer(path, base), device


def _base_of_adapter(path: str) -> str | None:
    """The base model of a local adapter directory; None for a whole model."""
    local = Path(path).expanduser()
    file = local / "adapter_config.json"
    if not file.is_file() or (local / "config.json").is_file():
        return None
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise UserError(f"--model {path}: adapter_config.json does not name its base model.")
    return base


def _tokenizer(path: str, base: str | None) -> Any:
    """The model's own; of an adapter, what was saved beside it, chat template and all, else the base model's."""
    from transformers import AutoTokenizer

    local = Path(path).expanduser()
    if base is not None and (local / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(str(local))
    return load_tokenizer(base or path)


def _with_adapter(model: Any, path: str) -> Any:
    from peft import PeftModel

    try:
        wrapped = PeftModel.from_pretrained(model, str(Path(path).expanduser()))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--model {path}: the adapter does not fit its base model ({reason}).") from error
    try:
        check_adapter(wrapped)
    except UserError as error:
        remedy = "Merge it into its base in fp32 (merge_and_unload), save that, and give its directory."
        raise UserError(f"--model {path}: {error} {remedy}") from error
    return wrapped


def model_facts(config: InferenceConfig, model: Any) -> dict[str, Any]:
    """What a model's numbers depend on, for records that another run may go on with."""
    weight = model.get_output_embeddings().weight
    return {
        "model": config.model, "weights": model_fingerprint(model), "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type, "attention": model.config.get_text_config()._attn_implementation,
        "batch_size": config.batch_size,
    }  # fmt: skip


def model_fingerprint(model: Any) -> str:
    """Of a few values of each parameter: enough to tell one training run's model from another's."""
    crc = 0
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:SAMPLED_VALUES].float().cpu().numpy().tobytes()
        crc = zlib.crc32(values, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def split_seed(chosen: SplitConfig, model: str | None) -> int:
    """--split_seed, or what was held out of the run in the model's directory, or train's default.

    A sample follows no model: two that are compared are asked the same.
    """
    if chosen.split_seed is not None:
        return chosen.split_seed
    if chosen.split != "held_out":
        return RunConfig.seed
    saved = Path(model or "").expanduser() / CONFIG_NAME
    return int(read_yaml(str(saved)).get("seed", RunConfig.seed)) if model and saved.is_file() else RunConfig.seed


def load_split(data: DataConfig, chosen: SplitConfig, seed: int) -> tuple[Rows, str]:
    """(examples, which they are): read and checked now, or while iterated over with --streaming.

    `seed`: of a sample, and of what was held out.
    """
    where = data.data or str(DATA_DIR)
    present = available_splits(where)
    split: str = chosen.split or next((x for x in ("test", "validation", "train") if x in present), "train")
    held_out = split == "held_out"
    if data.streaming and (held_out or chosen.sample):
        needs = "--split held_out" if held_out else "--sample"
        raise UserError(f"{needs}: all rows must be known to choose from them. Leave out --streaming.")
    if held_out and "validation" in present:
        raise UserError(f"--split held_out: {where} has a validation split, which training leaves out. Use that.")
    rows = load_examples(
        where, "train" if held_out else split, format=data.format, columns=data.column_names(),
        skip_bad_rows=data.skip_bad_rows, streaming=data.streaming, limit=None if held_out else chosen.limit,
    )  # fmt: skip
    if held_out:
        _, examples, _ = hold_out(rows.examples, seed)
        rows.keep(examples[: chosen.limit])
    if chosen.sample is not None and chosen.sample < len(rows.examples):
        rows.keep(random.Random(seed).sample(rows.examples, chosen.sample))
    return rows, split


def training_rows_note(data: DataConfig, split: str) -> list[str]:
    """What to know of numbers that were taken on rows that the model may have been trained on."""
    if split != "train" or data.data is None:
        return []
    return [
        "these are training rows: a model that was trained on this data has seen them. --split held_out takes the "
        "tenth that training leaves out where there is no validation split"
    ]


def batches_by_length(lengths: Sequence[int], batch_size: int, tokens: int) -> list[list[int]]:
    """Indices in batches of similar length: at most batch_size each, and longest × sequences within `tokens`."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches: list[list[int]] = []
    for index in order:
        last = batches[-1] if batches else None
        if last is None or len(last) == batch_size or (len(last) + 1) * lengths[index] > tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def on_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}
