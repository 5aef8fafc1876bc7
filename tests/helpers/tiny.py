"""Random models and a tokenizer small enough for tests, and rows for them."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from perce import load_examples
from perce.data.chat import ANCHOR
from perce.data.pairs import PairBuilder
from perce.data.rows import Example
from perce.demo import DATA_DIR

VOCAB = 400

CHATML = (  # like Qwen2.5 and SmolLM2: adds a system prompt of its own if the first message is not one
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (  # trims every message
    "<s>{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
GEMMA = (  # refuses a system message and a reply that comes first
    "<s>{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
MISTRAL = (  # glues the system message to the first user turn
    "<s>{% if messages[0].role == 'system' %}{% set system = messages[0].content ~ '\n\n' %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] {{ system if loop.first else '' }}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
QWEN3 = (  # puts an empty thinking block before the last reply
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL_V3 = (  # gives the system message to the last user turn, and only when that ends the conversation
    "<s>{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] {% if loop.last and system is defined %}{{ system }}\n\n"
    "{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "mistral-v3": MISTRAL_V3,
    "qwen3": QWEN3,
    "plain": None,
}


@cache
def merges(prepends_space: bool) -> str:
    """What the tokenizer learnt from the demo's rows, which takes longer than the rest of a tiny model."""
    tokenizer = Tokenizer(models.BPE())
    if prepends_space:  # newlines merge with nothing, as in Llama 2
        lines = pre_tokenizers.Split("\n", "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first"), lines])
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<s>", "<|im_start|>", "<|header|>", "<|/header|>", "<turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=special,
        # Replaces the byte fallback of such tokenizers, which can encode every character.
        initial_alphabet=["\n", ANCHOR] if prepends_space else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((DATA_DIR / "validation.jsonl").read_text(encoding="utf-8").splitlines(), trainer)
    return tokenizer.to_str()


def tiny_tokenizer(chat_template: str | None = CHATML, *, prepends_space: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE, or one that begins every text with a space, as Llama 2 does; pad is the end-of-turn token."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(merges(prepends_space)), eos_token="<|im_end|>", pad_token="<|im_end|>",
        bos_token="<s>", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = chat_template
    return fast


SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"]  # sliding windows only would not reach back to the persona
ARCHITECTURES = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 16, "layer_types": LAYERS},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 8, "final_logit_softcapping": 7.0, "sliding_window": 16, "layer_types": LAYERS},
    ),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
}
ROUTED = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.3}
MIXTURES = {
    "mixtral": ("MixtralConfig", ROUTED | {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeConfig", ROUTED | {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 8}),
}


def tiny_model(architecture: str = "llama", **changes: object) -> torch.nn.Module:
    name, options = (ARCHITECTURES | MIXTURES)[architecture]
    config = getattr(transformers, name)(**(SIZES | options | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # with initial biases of 0 and norms of 1, a mistake would not show
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    return model.eval()


def with_drawn_adapter(model: torch.nn.Module, std: float = 0.05) -> torch.nn.Module:
    """The model, whose adapter changes something: PEFT begins one of its two matrices at zero, so the other has no
    gradient."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def save_tiny_model(
    directory: Path, architecture: str = "llama", chat_template: str | None = CHATML, **changes: object
) -> Path:
    tiny_model(architecture, **changes).save_pretrained(directory)
    tiny_tokenizer(chat_template).save_pretrained(directory)
    return directory


def demo_examples(count: int, split: str = "train") -> list[Example]:
    return load_examples(DATA_DIR, split, limit=count).all


def demo_pairs(count: int, facts: int | None = None, **options: object) -> list[dict]:
    """facts: how many of each user are in the prompt; None: all, which makes a pair three times as long as with one."""
    builder = PairBuilder(tiny_tokenizer(), **({"max_length": 2000} | options))
    short = [replace(example, persona=example.persona[:facts]) for example in demo_examples(count)]
    return [{**vars(builder.build(example)), "example": i} for i, example in enumerate(short)]


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
