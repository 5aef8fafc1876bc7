"""Load a causal language model and teach its own forward to return what PerCE needs.

`install_perce` gives the model two extra ways to be called, always through whatever wraps it (DDP, FSDP, PEFT):

    model(input_ids, perce={"rows": rows})                                   → hidden states (N, D) at those rows
    model(input_ids, perce={"rows": rows, "target": …, "loss": {…}})         → (loss, logp, logp_cf,
                                                                                signal, token_weight)

With "prefix" in perce the tokens through the persona are run without a gradient; see perce/prefill.py.

The loss runs inside the forward of the output-embedding module. Reading the head's weight anywhere else would bypass
the hooks that gather and reduce sharded parameters, and yield wrong gradients in silence.
"""

import functools
import os
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perce.config import ModelConfig
from perce.errors import UserError
from perce.prefill import hidden_after_prefix
from perce.probe import PROBE_TOKENS, attention_of_any_device, evaluating, probe_ids, unwrapped
from perce_kernels import fused_perce_loss, reference, token_logprobs

# Largest difference of log-probabilities between the model's own logits and ours; fp32 shows 1e-5, bf16 logits 1e-2.
SELF_CHECK_TOLERANCE = 1e-3
SELF_CHECK_TOLERANCE_LOW_PRECISION = 0.25
PACKING_TOLERANCE = 0.1  # of what seeing the sequence before does to hidden states; bf16 noise is far below


@dataclass(frozen=True)
class LogitTransform:
    """logits = softcap·tanh(logit_scale·(h Wᵀ + b)/softcap), as fused_perce_loss takes it; b is the head's own bias."""

    softcap: float | None
    logit_scale: float


def logit_transform(config: Any) -> LogitTransform:
    """The head's transform from a model config: Gemma softcaps, Granite divides, Cohere multiplies."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    scale /= float(getattr(text, "logits_scaling", None) or 1.0)
    return LogitTransform(getattr(text, "final_logit_softcapping", None), scale)


def install_perce(model: Any) -> Any:
    """Patch model and head in place, before PEFT or any parallel wrapper; UserError if its logits are not ours."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise UserError(
            f"{type(model).__name__}: expected a floating-point linear output embedding, got {type(head).__name__}"
            f"{'' if head is None else f' ({head.weight.dtype})'}. Quantised or custom heads are not supported."
        )
    transform = logit_transform(model.config)
    _check_architecture(model)
    _patch_head(head, transform)
    _patch_model(model)
    model.perce_logit_transform = transform
    _self_check(model, head, transform)
    return model


def _check_architecture(model: Any) -> None:
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{config.model_type}: PerCE needs a decoder-only causal model, and this one has an encoder.")
    dropout = getattr(config.get_text_config(), "attention_dropout", 0.0)
    if dropout:
        raise UserError(
            f"attention_dropout={dropout} in the model's config makes attention materialise a T × T matrix on CPU. "
            "Set it to 0 in config.json."
        )
    active = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if active:
        raise UserError(
            f"{type(model).__name__}: dropout in {active[0]} ({len(active)} modules) would act in the factual pass and "
            "not in the counterfactual one, and bias every PIR. Load the model with its dropout settings at 0."
        )


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The module's forward as a function of the module: a deep copy of a patched model must run its own weights."""
    own = module.forward
    return getattr(own, "__func__", lambda _, *args, **kwargs: own(*args, **kwargs))


def _patch_head(head: Any, transform: LogitTransform) -> None:
    own_forward = forward_of(head)

    @functools.wraps(own_forward)
    def forward(self, hidden: Tensor, perce: dict[str, Any] | None = None):
        if perce is None:
            return own_forward(self, hidden)
        return _head_loss(self, hidden, transform, perce["target"], dict(perce["loss"]))

    head.forward = types.MethodType(forward, head)
    head.perce_backend = "auto"


def _head_loss(
    head: Any, hidden: Tensor, transform: LogitTransform, target: Tensor, call: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logp, logp_cf, signal, token_weight), all but the loss (N,) and detached.

    `call` is what fused_perce_loss takes, or says `weight_from`: weights are then clipped from the model's own "loss"
    (−log p of the token) or predictive "entropy". The signal is what the clip acted on.
    """
    output = {
        "bias": head.bias, "softcap": transform.softcap, "logit_scale": transform.logit_scale,
        "backend": head.perce_backend,
    }  # fmt: skip
    signal = None
    if weight_from := call.pop("weight_from", None):
        with torch.no_grad():
            own: Any = token_logprobs(
                hidden, head.weight, target, return_entropy=weight_from == "entropy", **output
            )  # fmt: skip
        signal = own[1] if weight_from == "entropy" else -own
        call["token_weight"] = signal.clamp(call["clip_min"], call["clip_max"])
    loss, stats = fused_perce_loss(hidden, head.weight, target, return_stats=True, **output, **call)
    if signal is None:
        signal = stats.pir.exp() if call.get("contrast") == "ratio" else stats.pir
    return loss, stats.logp, stats.logp_cf, signal, stats.token_weight


def _patch_model(model: Any) -> None:
    own_forward = forward_of(model)

    @functools.wraps(own_forward)  # generate() reads the signature
    def forward(self, *args, perce: dict[str, Any] | None = None, **kwargs):
        if perce is None:
            return own_forward(self, *args, **kwargs)
        if "prefix" in perce:
            hidden = hidden_after_prefix(self.base_model, perce["rows"], perce["prefix"], *args, **kwargs)
        else:
            # use_cache=False: a cache would keep every layer's keys and values alive through the backward.
            output = self.base_model(*args, use_cache=False, **kwargs)
            hidden = output[0].flatten(0, 1)[perce["rows"]]
        return hidden if "target" not in perce else self.get_output_embeddings()(hidden, perce=perce)

    model.forward = types.MethodType(forward, model)


@torch.no_grad()
def _self_check(model: Any, head: Any, transform: LogitTransform) -> None:
    """Our reading of the head against the model's own logits on a few tokens."""
    ids = probe_ids(model).to(head.weight.device)
    rows = torch.arange(PROBE_TOKENS, device=ids.device)
    with evaluating(model), attention_of_any_device(model):
        own = model(input_ids=ids, use_cache=False).logits[0].double()
        hidden = model(input_ids=ids, perce={"rows": rows})
    low = head.weight.dtype in (torch.bfloat16, torch.float16)
    exact = torch.float32 if low else torch.float64
    bias = None if head.bias is None else head.bias.to(exact)
    ours = reference.logits(
        hidden.to(exact), head.weight.to(exact), bias, transform.softcap, transform.logit_scale
    ).double()
    difference = (own.log_softmax(-1) - ours.log_softmax(-1)).abs().max().item()
    tolerance = SELF_CHECK_TOLERANCE
    if low:  # the model's own logits are rounded to 8 bits: of large ones 2 ** -8 of their size is lost
        tolerance = max(SELF_CHECK_TOLERANCE_LOW_PRECISION, own.abs().max().item() * 2**-6)
    if not difference <= tolerance:
        raise UserError(
            f"{type(model).__name__} ({model.config.model_type}): its log-probabilities differ from those computed "
            f"from its hidden states and head by up to {difference:.3g} (allowed {tolerance:g}), with softcap="
            f"{transform.softcap}, logit_scale={transform.logit_scale:g}. The architecture transforms its logits in a "
            "way that is not known here, so training it would be wrong."
        )


def check_head_unwrapped(model: Any) -> None:
    """UserError when PEFT put an adapter on the output embedding: the loss would ignore it."""
    for name, module in model.named_modules():
        wrapped = hasattr(module, "base_layer") or hasattr(module, "modules_to_save")
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if wrapped and inner is not None and inner is _output_embeddings(model):
            raise UserError(
                f"{name}: an adapter sits on the output embedding, and the fused loss reads the embedding alone. Leave "
                "lm_head (and, with tied embeddings, embed_tokens) out of target_modules and modules_to_save."
            )


def _output_embeddings(model: Any) -> nn.Module | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for attribute in ("base_layer", "original_module"):
        head = getattr(head, attribute, head)
    return head


def check_packing(model: Any, device: str) -> None:
    """UserError unless the model's attention keeps packed sequences apart, and does so without a T × T mask."""
    attention = model.config.get_text_config()._attn_implementation
    if device == "cpu" or not str(attention).startswith(("flash_attention", "flex_attention")):
        raise UserError(
            f"packing: expected flash_attention_2, flash_attention_3 or flex_attention on a GPU, got {attention} on "
            f"{device}. The others build a T × T mask to keep packed sequences apart. Choose one with "
            "--attn_implementation, or leave --packing out: --tokens_per_batch groups by length and pads little."
        )
    check_sequences_apart(model)


@torch.no_grad()
def check_sequences_apart(model: Any) -> None:
    """UserError if the second of two packed sequences sees the first: not every architecture hands position_ids on."""
    ids = probe_ids(model, 2 * PROBE_TOKENS)
    positions = torch.arange(PROBE_TOKENS, device=ids.device).repeat(2)[None]
    rows = positions[0, :PROBE_TOKENS]
    with evaluating(model):
        alone = model(input_ids=ids[:, PROBE_TOKENS:], perce={"rows": rows})
        packed = model(input_ids=ids, position_ids=positions, perce={"rows": rows + PROBE_TOKENS})
        mixed = model(input_ids=ids, perce={"rows": rows + PROBE_TOKENS})
    error, leak = (packed - alone).float().norm().item(), (mixed - alone).float().norm().item()
    if not error <= PACKING_TOLERANCE * leak:
        raise UserError(
            f"packing: a packed sequence of this {model.config.model_type} model is {error / leak:.0%} as far from the "
            "same sequence alone as if it saw the one before it. Its attention does not keep them apart: leave "
            "--packing out."
        )


def bf16_is_sound(device: str) -> bool:
    """Whether bf16 arithmetic is native: elsewhere a CPU emulates it at a quarter of the speed of fp32."""
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
    """flash_attention_2 where it is installed and can run; None: the model's own choice, sdpa as a rule."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import is_flash_attn_2_available

    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    can_run = device == "cuda" and precision == "bf16" and getattr(architecture, "_supports_flash_attn", False)
    return "flash_attention_2" if can_run and is_flash_attn_2_available() else None


def load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, path)
    if not tokenizer.is_fast:
        raise UserError(f"--model {path}: a fast tokenizer is needed (tokenizer.json), and this one has none.")
    return tokenizer


def load_model(path: str, config: ModelConfig, device: str) -> Any:
    """The model with PerCE installed, and a LoRA adapter if lora_r > 0.

    Full fine-tuning keeps fp32 weights (a pure-bf16 weight of 1.0 does not move by 1e-3) and autocasts where bf16 is
    sound; LoRA keeps the frozen base in bf16 there and the adapters in fp32.
    """
    precision = resolve_precision(config.precision, device)
    kwargs: dict[str, Any] = {"dtype": torch.bfloat16 if precision == "bf16" and config.lora_r else torch.float32}
    if attention := config.attn_implementation or default_attention(read_config(path), precision, device):
        kwargs["attn_implementation"] = attention
    if config.load_in_4bit:
        kwargs["quantization_config"] = _four_bit(config)
        kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
    model = load_pretrained(path, **kwargs)
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    if method is not None and "bitsandbytes" not in str(method):
        raise UserError(f"--model {path}: quantised with {method}. Only bitsandbytes bases can be trained here.")
    if method is not None and not config.lora_r:
        raise UserError("A 4-bit base cannot be trained itself: add --lora_r 16.")
    prepare_model(model)
    if not config.lora_r:
        return model
    if method is not None:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return add_adapter(model, lora_config(config))


def lora_config(config: ModelConfig) -> Any:
    """The adapter that --lora_r asks for, on every linear layer but the output embedding."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip


def load_pretrained(path: str, **kwargs: Any) -> Any:
    """AutoModelForCausalLM.from_pretrained with dropout off, and with its failures told as one paragraph."""
    from transformers import AutoModelForCausalLM

    return from_pretrained(AutoModelForCausalLM, path, config=read_config(path), **kwargs)


def read_config(path: str) -> Any:
    """A model's config with dropout off."""
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig, path)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float) and value > 0:
                setattr(part, name, 0.0)
    return config


def prepare_model(model: Any, backend: str = "auto") -> Any:
    """install_perce, once, on a model or on the base inside a PEFT model; `backend`: of its losses from now on."""
    base = unwrapped(model)
    if not hasattr(base, "perce_logit_transform"):
        check_head_unwrapped(model)
        install_perce(base)
    base.get_output_embeddings().perce_backend = backend
    return model


def add_adapter(model: Any, peft_config: Any) -> Any:
    """The model under a PEFT adapter; UserError if that would wrap the output embedding or lengthen the sequence."""
    from peft import get_peft_model

    wrapped = get_peft_model(model, peft_config)
    check_adapter(wrapped)
    return wrapped


def check_adapter(model: Any) -> None:
    """UserError for adapters under which the loss would be of other rows, or of another head."""
    for config in model.peft_config.values():
        if getattr(config, "is_prompt_learning", False) and str(config.peft_type.value) != "PREFIX_TUNING":
            raise UserError(
                f"peft_config: {config.peft_type.value} puts virtual tokens before the prompt, and the response would "
                "be read at the wrong places. Use LoRA, another adapter, or prefix tuning."
            )
    check_head_unwrapped(model)


def _four_bit(config: ModelConfig) -> Any:
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit needs bitsandbytes: pip install 'perce[quant]' (a CUDA device is required).")
    if not config.lora_r:
        raise UserError("--load_in_4bit: a 4-bit base cannot be trained itself: add --lora_r 16.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def from_pretrained(
    auto_class: Any, path: str, *, option: str = "--model", kind: str = "a causal language model", **kwargs: Any
) -> Any:
    """from_pretrained with its many failures told as one paragraph, which names the option that gave the path."""
    from safetensors import SafetensorError

    local = Path(path).expanduser()
    if (local / "adapter_config.json").is_file() and not (local / "config.json").is_file():
        raise UserError(
            f"{option} {path}: the directory holds an adapter alone. Give the base model, or merge the adapter into it "
            "first (AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload())."
        )
    if local.exists() and not (local / "config.json").is_file():
        raise UserError(f"{option} {path}: the directory holds no config.json, so it is no saved Hugging Face model.")
    if not local.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UserError(f"{option} {path}: no such directory, and not a Hub id (name or owner/name) either.")
    try:
        return auto_class.from_pretrained(str(local) if local.exists() else path, **kwargs)
    except ImportError as error:
        attention = kwargs.get("attn_implementation")
        remedy = f" Choose another --attn_implementation than {attention}." if attention else " Install it."
        raise UserError(f"{option} {path}: a package is missing: {' '.join(str(error).split())}.{remedy}") from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{option} {path}: could not be loaded as {kind} ({reason}). Expected a directory with "
            "config.json, tokenizer and weights, or a Hub id that this machine can reach."
        ) from error
