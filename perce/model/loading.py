"""A model ready to be trained or measured: precision, attention, LoRA, 4-bit bases, and PerCE installed."""

import copy
import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from perce.config.questions import InferenceConfig
from perce.config.schema import ModelConfig
from perce.demo import default_model_path
from perce.errors import UserError, first_line, in_one_line
from perce.files.integrity import LIST, difference, read_object
from perce.files.outputs import let_umask_decide
from perce.files.runs import MERGED, run_directory
from perce.hub import base_of_adapter, check_base, from_anywhere, load_pretrained, read_config, tokenizer_of
from perce.model.patch import check_head_unwrapped, prepare_model
from perce.model.probe import unwrapped
from perce.model.reach import freeze_beside_text, linear_layers, unused_layers
from perce.visible import in_short, say
from perce_kernels.backends import resolve_backend

WEIGHTS = re.compile(r"model[^/]*\.(safetensors|bin)$")  # one file or shards, of a model or an adapter


def bf16_is_sound(device: str) -> bool:
    """Whether bf16 arithmetic is native. A CPU without it emulates bf16 at a quarter of the speed of fp32."""
    if device == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_precision(precision: str, device: str) -> str:
    """ "auto" | "fp32" | "bf16" → "fp32" | "bf16"."""
    if precision == "auto":
        return "bf16" if bf16_is_sound(device) else "fp32"
    if precision == "bf16" and not bf16_is_sound(device):
        raise UserError(f"precision=bf16: this {device} has no native bf16 arithmetic. Use --precision fp32.")
    return precision


def default_attention(model_config: Any, precision: str, device: str) -> str | None:
    """flash_attention_2 if it is installed and can run; None for the model's own choice, which is usually sdpa."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import is_flash_attn_2_available

    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    can_run = device == "cuda" and precision == "bf16" and getattr(architecture, "_supports_flash_attn", False)
    return "flash_attention_2" if can_run and is_flash_attn_2_available() else None


def load_model(path: str, config: ModelConfig, device: str) -> Any:
    """The model with PerCE installed, and a LoRA adapter if lora_r > 0.

    Full fine-tuning keeps fp32 weights, because a bf16 weight of 1.0 does not move by 1e-3. In bf16 it autocasts, and
    LoRA keeps the frozen base in bf16 and the adapters in fp32.
    """
    precision = resolve_precision(config.precision, device)
    kwargs: dict[str, Any] = {"dtype": torch.bfloat16 if precision == "bf16" and config.lora_r else torch.float32}
    if attention := config.attn_implementation or default_attention(read_config(path), precision, device):
        kwargs["attn_implementation"] = attention
    if config.load_in_4bit:
        kwargs["quantization_config"] = _four_bit()
        kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
    model = load_pretrained(path, **kwargs)
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    if method is not None and "bitsandbytes" not in str(method):
        raise UserError(f"--model {path}: quantised with {method}. Only bitsandbytes bases can be trained here.")
    if method is not None and not config.lora_r:
        raise UserError("A 4-bit base cannot be trained itself: add --lora_r 16.")
    prepare_model(model)
    if not config.lora_r:
        freeze_beside_text(model)
        return model
    if method is not None:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return add_adapter(model, lora_config(config))


def load_to_measure(config: InferenceConfig) -> tuple[Any, Any, torch.device]:
    """(model in eval mode with PerCE installed, tokenizer, device).

    An adapter is not merged into its base, as in training: merging into bf16 weights rounds, and lost half of what an
    adapter had learnt in 20 steps (docs/LOG.md). UserError for a model that cannot be loaded.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = check_backend(config.backend, device)
    wanted = "fp32" if config.precision == "auto" and device.type == "cpu" else config.precision
    low = resolve_precision(wanted, device.type) == "bf16"
    kwargs: dict[str, Any] = {"dtype": torch.bfloat16 if low else torch.float32}
    if config.attn_implementation:
        kwargs["attn_implementation"] = config.attn_implementation
    path = config.model or str(default_model_path())
    _check_weights(path)
    base = base_of_adapter(path)
    if base is not None:
        check_base(run_directory(path), base, f"--model {path}")
    model = prepare_model(load_pretrained(base or path, **kwargs), backend)
    if base is not None:
        model = _with_adapter(model, path)
    return model.to(device).eval(), tokenizer_of(path, base), device


def _check_weights(path: str) -> None:
    """UserError if the weights of a run or checkpoint are not those that were saved: the numbers would be wrong."""
    local = Path(path).expanduser()
    if not (file := local / LIST).is_file():
        of_a_run = run_directory(path) is not None and local.resolve().name != MERGED
        if of_a_run and any(WEIGHTS.search(str(weights)) for weights in local.glob("*model*")):
            told = "its weights may be incomplete, or older than the run's checkpoints"
            say(f"--model {path}: was not finished ({LIST} is missing): {told}", error=True)
        return
    try:
        saved = read_object(file).items()
        weights = {name: fact for name, fact in saved if WEIGHTS.search(name)}
        reason = difference(local, weights) if weights else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{file} cannot be read ({in_one_line(error)})"
    if reason:
        raise UserError(
            f"--model {path}: {reason}. Restore it, or give an intact checkpoint. If you changed the weights "
            f"yourself, delete {file}, which describes the files as they were saved."
        )


def _with_adapter(model: Any, path: str) -> Any:
    from peft import PeftModel

    directory = str(Path(path).expanduser())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*missing adapter keys")  # PEFT leaves these without an effect
            wrapped = PeftModel.from_pretrained(model, directory)
    except Exception as error:  # a damaged file may raise anything
        raise UserError(
            f"--model {path}: the adapter is damaged or does not fit its base model ({first_line(error)}). Restore it, "
            "or give another adapter."
        ) from error
    try:
        check_adapter(wrapped, to_train=False)
    except UserError as error:
        remedy = (
            "An adapter that can be merged into its base (merge_and_unload, in fp32) can be given as a whole model."
        )
        raise UserError(f"--model {path}: {error} {remedy}") from error
    if others := wrapped.load_adapter(directory, "default").unexpected_keys:  # PEFT leaves these out
        raise UserError(
            f"--model {path}: the adapter does not fit its base model, which has no place for {in_short(others)}. "
            "Expected the model that it was trained on."
        )
    return wrapped


def lora_config(config: ModelConfig) -> Any:
    """The adapter that --lora_r asks for, on every linear layer of the text decoder except output embedding and
    routers."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip


def add_adapter(model: Any, peft_config: Any) -> Any:
    """The model with a PEFT adapter, for which "all-linear" means the layers of `linear_layers`. UserError if PEFT
    refuses the adapter, or if it would wrap the output embedding, lengthen the sequence, or sit on an unused layer."""
    from peft import get_peft_model
    from peft.tuners import lora

    if hasattr(model, "peft_config"):
        raise UserError(
            "peft_config: the model has an adapter already. Leave peft_config out to continue training that adapter, "
            "or remove it first (model = model.merge_and_unload(), or unload())."
        )
    peft_config = copy.deepcopy(peft_config)
    try:
        unused = unused_layers(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's own code may raise anything
        raise UserError(
            f"{type(model).__name__}: its decoder fails in training mode on a few tokens: {in_one_line(error)}"
        ) from error
    if str(getattr(peft_config, "target_modules", None)).lower() == "all-linear":
        if getattr(peft_config, "layer_replication", None):
            raise UserError(
                'peft_config: layer_replication with "all-linear" would leave the repeated layers without adapters, '
                'because PEFT makes them later. Name target_modules by the last part of their names, such as "q_proj".'
            )
        peft_config.target_modules = linear_layers(model, unused)
    try:
        wrapped = get_peft_model(model, peft_config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"peft_config: PEFT cannot put this adapter on {type(model).__name__} ({in_one_line(error)}). Give a "
            'peft_config with other target_modules ("all-linear" means those that can be adapted), or train all '
            "weights (--lora_r 0)."
        ) from error
    check_adapter(wrapped)
    _check_used(wrapped, unused)
    for config in wrapped.peft_config.values():  # is saved: from another directory a relative path finds another base
        if config.base_model_name_or_path:
            config.base_model_name_or_path = from_anywhere(config.base_model_name_or_path)
    for layer in wrapped.modules():
        # Not for dropout, which rounds differently in bf16, nor for a variant that uses its input otherwise (DoRA).
        plain = isinstance(layer, lora.Linear) and not getattr(layer, "lora_variant", None)
        if plain and all(isinstance(dropout, torch.nn.Identity) for dropout in layer.lora_dropout.values()):
            layer._cast_input_dtype = partial(_cast_unless_autocast, layer)
    return wrapped


def _check_used(wrapped: Any, unused: set[str]) -> None:
    """UserError for an adapter on a linear layer whose own forward no text uses."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name for name, layer in unwrapped(wrapped).named_modules() if isinstance(layer, BaseTunerLayer)}
    if found := sorted(adapted & unused):
        raise UserError(adapters_unused(found))


def adapters_unused(names: Sequence[str]) -> str:
    """The error message for adapters that could not be trained."""
    return (
        f"peft_config: adapters on {in_short(names)} would not be trained: text does not pass through these layers, or "
        "other code reads their weights without calling them. Leave them out of target_modules, or use "
        '"all-linear", which leaves them out.'
    )


def _cast_unless_autocast(layer: Any, x: Any, dtype: torch.dtype) -> Any:
    """PEFT's cast of an adapter's input to fp32, left out if autocast would cast it to bf16 again. The bits are the
    same, and every linear layer saves a copy in forward and one in backward: a tenth of a step (docs/LOG.md,
    2026-11-27)."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return x
    return type(layer)._cast_input_dtype(layer, x, dtype)


def merge_adapter(directory: Path, base: str) -> None:
    """Merge the adapter in `directory` into its base, and save model, tokenizer and generation config in
    directory/merged.

    It is saved in fp32: rounded to bf16, a merge lost up to half of what a short training had changed (docs/LOG.md)."""
    from peft import PeftModel
    from transformers import AutoTokenizer, GenerationConfig

    model = load_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(directory)).merge_and_unload()
    merged.generation_config = GenerationConfig.from_pretrained(directory)
    merged.save_pretrained(directory / MERGED)
    let_umask_decide(directory / MERGED)
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory / MERGED)


def check_adapter(model: Any, to_train: bool = True) -> None:
    """UserError for adapters with which the loss would read wrong rows, ignore an adapted head, or lack a term, for
    those that would act on wrong tokens, at random or could not be loaded again, and for those that generation leaves
    out. to_train: whether what goes wrong only in training counts."""
    for config in model.peft_config.values():
        for unfit in UNFIT:
            if (to_train or not unfit.in_training) and unfit.fits(config):
                raise UserError(f"peft_config: {unfit.why.format(config=config)}")
    check_head_unwrapped(model)


class Unfit(NamedTuple):
    """A kind of adapter that is refused."""

    fits: Callable[[Any], object]  # whether a PEFT config is of this kind
    why: str  # a format of the config
    in_training: bool = False  # whether only training would be wrong: such an adapter can be measured


AT_RANDOM = (
    "draws random numbers in training mode, which would act in the factual pass and not in the counterfactual one, and "
    "bias every PIR. Use LoRA."
)
UNFIT = (
    Unfit(
        lambda config: config.peft_type == "ADALORA",
        "AdaLoRA adds a term to the model's own loss, which perce does not compute, and has to be called after each "
        "step. Use LoRA.",
        in_training=True,
    ),
    Unfit(lambda config: config.peft_type == "PVERA", f"PVeRA {AT_RANDOM}", in_training=True),
    Unfit(
        lambda config: getattr(config, "sample_at_inference", False),
        "sample_at_inference: each forward pass draws other random numbers, so that no two can be compared.",
    ),
    Unfit(lambda config: getattr(config, "monteclora_config", None), f"MonteCLoRA {AT_RANDOM}", in_training=True),
    Unfit(
        lambda config: config.peft_type == "XLORA",
        "X-LoRA runs the whole model once more, with its logits, for each token's share of its adapters. Use LoRA.",
    ),
    Unfit(
        lambda config: getattr(config, "alora_invocation_tokens", None),
        "activated LoRA (alora_invocation_tokens) acts behind the last of these tokens in a row, and examples that "
        "share tokens are one row. Use LoRA.",
    ),
    Unfit(
        lambda config: str(getattr(config, "init_lora_weights", None)).startswith("pissa_niter_"),
        "init_lora_weights={config.init_lora_weights} moves a part of the base model's weights, found with random "
        'numbers, into the adapter. PEFT finds another part whenever the adapter is loaded. Use "pissa".',
    ),
    Unfit(
        lambda config: getattr(config, "is_prompt_learning", False),
        "{config.peft_type.value} learns a prompt: virtual tokens would shift the response, and generation would leave "
        "out a learned cache. Use LoRA, or another adapter on the weights.",
    ),
)


def _four_bit() -> Any:
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise UserError("--load_in_4bit needs bitsandbytes: pip install 'perce[quant]' (a CUDA device is required).")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def check_backend(backend: str, device: torch.device) -> str:
    """The backend to use, after PERCE_BACKEND is looked up; UserError for one that cannot run on this device."""
    try:
        return resolve_backend(backend, device)
    except ValueError as error:
        raise UserError(f"{error}. Choose another with --backend, or in PERCE_BACKEND.") from error
