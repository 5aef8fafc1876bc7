"""Sections of options as dataclasses; commands.py says which command has which.

Neither torch nor transformers is imported here, so that `--help` answers at once.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from perce.config.options import option as _option
from perce.config.options import read_yaml
from perce.config.options import require as _require
from perce.data.fields import show
from perce.data.formats import FORMATS
from perce.data.prompt import PromptStyle
from perce.data.readers import parse_json
from perce.errors import UserError
from perce.objectives import OBJECTIVES, Objective, TokenWeighting

CONFIG_NAME = "config.yaml"  # the resolved options, in every run directory
FACTS_NAME = "run.json"  # what they do not say of the run, written before them
HELD_OUT_NAME = "held_out.json"  # who is evaluated on, in that of a run on data without a validation split
MERGED = "merged"  # directory of a run: the model that --merge_adapter saves
MODEL = "DIR|HUB_ID"
FORMAT_NAMES = ("auto", *FORMATS)
BACKEND = (
    "what computes losses and log-probabilities; reference: with all logits of the response in memory; auto: what "
    "PERCE_BACKEND in the environment says, else triton on a GPU that it supports and torch elsewhere"
)
_LINES = (f"{x.name}: {x.help} [{x.weighting()}; {' or '.join(x.takes)}]" for x in OBJECTIVES.values())
OBJECTIVE = _option("perce", "\n".join(["what tokens are weighted by, for which rows:", *_LINES]), "|".join(OBJECTIVES))


def run_directory(model: str | None) -> Path | None:
    """The run that a model is of: its directory itself, or that which has it as merged/ or checkpoint-N/; else None."""
    if model is None:
        return None
    path = Path(model).expanduser().resolve()
    named = (FACTS_NAME, CONFIG_NAME)
    return next((run for run in (path, holder_of(path)) if all((run / name).is_file() for name in named)), None)


def holder_of(path: Path) -> Path:
    """The run directory above merged/ or checkpoint-N/; any other path unchanged."""
    return path.parent if re.fullmatch(rf"{MERGED}|checkpoint-\d+", path.name) else path


def objective_of(name: str) -> Objective:
    _require(name in OBJECTIVES, "objective", f"one of {', '.join(OBJECTIVES)}", name)
    return OBJECTIVES[name]


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    model: str | None = _option(
        None, "directory or Hub id of a causal language model; default: SmolLM2-135M-Instruct", MODEL
    )
    lora_r: int = _option(16, "LoRA rank; 0 trains all weights, as the run without arguments does")
    lora_alpha: int = _option(32, "LoRA scale is lora_alpha / lora_r")
    lora_dropout: float = _option(0.0, "dropout inside the adapters, in [0, 1)")
    load_in_4bit: bool = _option(False, "quantise the frozen base to 4 bits with bitsandbytes")
    precision: Literal["auto", "fp32", "bf16"] = _option(
        "auto", "arithmetic; auto: bf16 where the device has it natively"
    )
    attn_implementation: str | None = _option(
        None,
        "sdpa, flash_attention_2, eager, …; default: flash_attention_2 where it is installed, else the model's own",
    )
    backend: Literal["auto", "triton", "torch", "reference"] = _option("auto", BACKEND)

    def __post_init__(self) -> None:
        _require(self.lora_r >= 0, "lora_r", ">= 0", self.lora_r)
        _require(self.lora_alpha >= 1, "lora_alpha", ">= 1", self.lora_alpha)
        _require(0 <= self.lora_dropout < 1, "lora_dropout", "in [0, 1)", self.lora_dropout)


@dataclass(frozen=True)
class DataConfig:
    """Which rows, and how they become token pairs."""

    data: str | None = _option(
        None, "file, directory or Hub id; default: the built-in examples; of a run that is asked: its own", "DATA"
    )
    format: str = _option("auto", "row format; auto: detected from the fields", "|".join(FORMAT_NAMES))
    columns: str | None = _option(None, "rename fields, such as persona=profile,response=output", "OURS=THEIRS,…")
    persona_markers: str | None = _option(
        None, "what stands before and behind the persona in a system message, of rows without the field persona, such "
        "as '<persona>...</persona>'; nothing behind the dots: up to its end", "START...END",
    )  # fmt: skip
    skip_bad_rows: bool = _option(False, "count and report rows that cannot be used instead of stopping")
    streaming: bool = _option(
        False, "read rows while they are used instead of before; training needs --max_steps and a validation split"
    )
    max_length: int = _option(
        5000, "longest sequence in tokens; persona entries are dropped from the end until it fits, documents are cut"
    )
    retriever: Literal["bm25", "dense", "recency", "none"] = _option(
        "bm25",
        "which passages of a user's history the prompt shows: those with the request's words, with a similar "
        "embedding, the latest; none: all, the latest first; a conversation is shown whole where it fits",
    )
    retriever_model: str | None = _option(
        None, "directory or Hub id of a mean-pooled encoder, for dense; default: facebook/contriever", MODEL
    )
    retrieve_k: int = _option(4, "number of passages to show, best first")
    chat_template_kwargs: str | None = _option(
        None, 'JSON for the chat template, such as {"enable_thinking": false}', "JSON"
    )
    prompt: str | None = _option(
        None, "YAML file (in a recipe also a mapping) of how the persona is told: any of system, place, header, item, "
        "footer; see docs/SERVING.md", "FILE",
    )  # fmt: skip
    special_tokens_in_text: Literal["text", "allow"] = _option(
        "text", "what strings of the data that spell control tokens, such as <|im_end|>, become: text, or these tokens"
    )
    share: Literal["conversations", "none"] = _option(
        "conversations", "the replies of a conversation that are in one batch are computed together, what they have in "
        "common once; in evaluate and score those of a persona: the same numbers in a fraction of the time; none: each "
        "by itself",
    )  # fmt: skip

    def __post_init__(self) -> None:
        _require(self.format in FORMAT_NAMES, "format", "one of " + ", ".join(FORMAT_NAMES), self.format)
        _require(self.max_length >= 16, "max_length", ">= 16", self.max_length)
        _require(self.retrieve_k >= 1, "retrieve_k", ">= 1", self.retrieve_k)
        dense = self.retriever == "dense" or self.retriever_model is None
        _require(dense, "retriever_model", "--retriever dense beside it", f"--retriever {self.retriever}")
        self.column_names()
        self.markers()
        self.template_kwargs()
        self.prompt_style()

    @property
    def inputs(self) -> dict[str, str | None]:
        """Paths by option."""
        file = None if (self.prompt or "").lstrip().startswith("{") else self.prompt
        return {"--data": self.data, "--retriever_model": self.retriever_model, "--prompt": file}

    def column_names(self) -> dict[str, str] | None:
        if self.columns is None:
            return None
        pairs = [item.partition("=") for item in self.columns.split(",")]
        valid = all(name and source for name, _, source in pairs)
        _require(valid, "columns", "name=column,name=column", self.columns)
        ours = [name.strip() for name, _, _ in pairs]
        twice = next((name for name in ours if ours.count(name) > 1), None)
        both = " and ".join(item for item, name in zip(self.columns.split(","), ours, strict=True) if name == twice)
        if twice:
            raise UserError(f"columns: expected each of our names once, got {both}.")
        return {name.strip(): source.strip() for name, _, source in pairs}

    def markers(self) -> tuple[str, str] | None:
        """What stands before and behind the persona in a system message."""
        if self.persona_markers is None:
            return None
        start, dots, end = self.persona_markers.partition("...")
        expected = "START...END, or START... where it goes on to the end"
        _require(bool(start and dots), "persona_markers", expected, self.persona_markers)
        return start, end

    def template_kwargs(self) -> dict[str, Any]:
        try:
            value, why = parse_json(self.chat_template_kwargs or "{}"), ""
        except ValueError as error:
            value, why = None, f" ({error})"
        _require(isinstance(value, dict), "chat_template_kwargs", f"a JSON object{why}", self.chat_template_kwargs)
        return value

    def prompt_style(self) -> dict[str, str]:
        """What --prompt says: keys of data.prompt.PromptStyle, checked."""
        if not self.prompt:
            return {}
        _require(isinstance(self.prompt, str), "prompt", "a YAML file, or a mapping as JSON", self.prompt)
        if self.prompt.lstrip().startswith("{"):
            try:
                keys = parse_json(self.prompt)
            except ValueError as error:
                raise UserError(f"prompt: expected a mapping as JSON, got {show(self.prompt)} ({error}).") from error
        else:
            keys = read_yaml(self.prompt, "--prompt", numbers=False)
        PromptStyle.of(keys)
        return keys


@dataclass(frozen=True)
class WeightingConfig:
    """How tokens are weighted: what train and score share. Left open, clip and contrast are the objective's own."""

    objective: str = OBJECTIVE
    clip_min: float | None = _option(None, "lower bound m of a token's weight; default: the objective's")
    clip_max: float | None = _option(None, "upper bound M of a token's weight; default: the objective's")
    contrast: Literal["log", "ratio"] | None = _option(None, "clip PIR, or exp(PIR); default: log; longce: ratio")

    def __post_init__(self) -> None:
        own, low, high = self.entry.weighting(), self.weighting.clip_min, self.weighting.clip_max
        expected = f"finite numbers, 0 <= min <= max ({self.objective}'s own: {own.clip_min:g}, {own.clip_max:g})"
        _require(0 <= low <= high < float("inf"), "clip_min, clip_max", expected, (low, high))
        expected = f"none with --objective {self.objective}, which contrasts nothing"
        _require(not self.contrast or own.contrast is not None, "contrast", expected, self.contrast)

    @property
    def entry(self) -> Objective:
        return objective_of(self.objective)

    @property
    def weighting(self) -> TokenWeighting:
        return self.entry.weighting(self.contrast, self.clip_min, self.clip_max)


@dataclass(frozen=True)
class LossConfig(WeightingConfig):
    """What is minimised."""

    estimate: Literal["online", "epoch", "frozen"] = _option(
        "online", "when weights are estimated: each step, at each epoch's start, or once by the initial model"
    )
    clip_schedule: Literal["constant", "rising", "falling"] = _option(
        "constant",
        "rising: both bounds of the clip begin at 1, which is cross-entropy, and reach clip_min and clip_max at the "
        "last step; falling: the other way",
    )
    normalize: Literal["none", "batch", "sequence"] = _option(
        "none", "rescale weights to mean 1 over each step's batch or each sequence"
    )
    short_context: int = _option(4096, "longce: tokens of the short context (the authors' code: 4096)")
    short_stride: int = _option(1024, "longce: tokens that share the beginning of a short context (theirs: 1024)")
    router_aux_loss_coef: float | None = _option(
        None, "mixtures of experts: times the router's load-balancing loss of each step, this is added; 0: nothing; "
        "default: the router_aux_loss_coef of the model's config where that has output_router_logits true, else 0",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        coefficient = self.router_aux_loss_coef
        _require(coefficient is None or 0 <= coefficient < float("inf"), "router_aux_loss_coef", ">= 0", coefficient)
        for name in ("short_context", "short_stride"):
            _require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        for name, default in (("estimate", "online"), ("clip_schedule", "constant")):
            value, expected = getattr(self, name), f"{default} with --objective {self.objective}, which has no weights"
            _require(value == default or self.entry.signal is not None, name, expected, value)

    def at(self, progress: float) -> "LossConfig":
        """What is minimised at this place of the run, from 0 (its first step) to 1 (its last).

        Both bounds move on straight lines between 1, where every weight is 1, and clip_min or clip_max.
        """
        if self.clip_schedule == "constant":
            return self
        share = progress if self.clip_schedule == "rising" else 1 - progress
        low, high = (share * bound + (1 - share) for bound in (self.weighting.clip_min, self.weighting.clip_max))
        return replace(self, clip_min=low, clip_max=high)


@dataclass(frozen=True)
class MemoryConfig:
    """What long contexts trade for memory; see also activation_checkpointing."""

    persona_grad: Literal["full", "none"] = _option(
        "full", "none: the prompt through the persona gives keys and values without a gradient, same loss"
    )
    share_persona: int = _option(
        0, "deal up to so many requests of a user together, in a forward pass that computes their persona once, where "
        "prompts are the same through its end; 1: none; 0: as --share has it",
    )  # fmt: skip
    branches_per_forward: int = _option(
        0, "so many requests at a time behind the persona, which is computed by itself: the same gradient, without "
        "activation_checkpointing in less memory; 0: all together",
    )  # fmt: skip
    mlp_tile: int = _option(0, "run each MLP on so many tokens at a time, recomputed in backward; 0: on all at once")
    activation_offload: bool = _option(
        False, "hold the inputs of checkpointed layers in host memory; GPU and activation_checkpointing only"
    )

    def __post_init__(self) -> None:
        for name in ("mlp_tile", "share_persona", "branches_per_forward"):
            _require(getattr(self, name) >= 0, name, ">= 0", getattr(self, name))

    @property
    def on_trunks(self) -> bool:
        """Whether personas run by themselves; see model/prefill.py."""
        return self.persona_grad == "none" or self.branches_per_forward > 0

    @property
    def unit(self) -> Literal["conversation", "persona"]:
        """Whose examples share tokens."""
        return "persona" if self.share_persona else "conversation"


@dataclass(frozen=True)
class RunConfig:
    """How it is trained. Names that TrainingArguments has too mean the same."""

    output_dir: str | None = _option(None, "run directory; default: runs/NAME, numbered when taken", "DIR")
    resume: bool = _option(
        False,
        "continue from the newest whole checkpoint in output_dir, begin where there is none yet, do nothing where the "
        "run is finished: the same command restarts a run at any moment",
    )
    num_train_epochs: float = _option(3.0, "passes over the training examples (the paper: 3)")
    max_steps: int = _option(-1, "optimiser steps instead of epochs; -1: epochs")
    learning_rate: float | None = _option(None, "peak; default: 2e-5 for all weights, 2e-4 for LoRA")
    warmup_steps: float = _option(0.1, "linear warm-up, in steps, or below 1 as a share of all steps")
    per_device_train_batch_size: int | None = _option(
        None,
        "replies per forward pass, at most, where those of a conversation share tokens; default: by length, see "
        "accumulation",
    )
    gradient_accumulation_steps: int | None = _option(
        None, "forward passes per optimiser step; default: as many as give 8 replies per device"
    )
    tokens_per_batch: int | None = _option(
        None, "tokens that a forward pass computes, padding included, what replies share once; instead of a number of "
        "replies; a step is then gradient_accumulation_steps (default: 1) such passes on each device",
    )  # fmt: skip
    packing: bool = _option(
        False, "put the sequences of a forward pass into one row without padding; needs --attn_implementation "
        "flash_attention_2, flash_attention_3 or flex_attention and a GPU",
    )  # fmt: skip
    eval_examples: int | None = _option(
        None, "validation examples per evaluation; 0: all; default: 64, on a CPU fewer (at most 20,000 tokens)"
    )
    eval_steps: float | None = _option(None, "evaluate every so many steps; default: each epoch's end")
    save_steps: float = _option(500, "checkpoint every so many steps; 0: none but the final model")
    early_stopping: int = _option(
        0, "stop after so many evaluations in a row without a better eval_loss (or --metric_for_best_model), and keep "
        "the best weights; 0: never",
    )  # fmt: skip
    logging_steps: float = _option(10, "log every so many steps")
    report_examples: int = _option(8, "validation responses shown token by token in report.html")
    activation_checkpointing: bool = _option(False, "recompute activations in backward: less memory, about 30 % slower")
    merge_adapter: bool = _option(False, "LoRA: also save the whole model, merged in fp32, in output_dir/merged")
    seed: int = _option(42, "seed of data order, dropout and LoRA initialisation")

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_batch"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, ">= 1", value)
        sequences, tokens = self.per_device_train_batch_size, self.tokens_per_batch
        one = "per_device_train_batch_size or tokens_per_batch"
        _require(sequences is None or tokens is None, one, "one of them", (sequences, tokens))
        for name in ("eval_examples", "report_examples", "save_steps", "early_stopping"):
            value = getattr(self, name)
            _require(value is None or value >= 0, name, ">= 0", value)
        for name in ("logging_steps", "learning_rate", "eval_steps"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, "> 0", value)
        _require(self.max_steps != 0 and self.max_steps >= -1, "max_steps", ">= 1, or -1", self.max_steps)
        _require(0 < self.num_train_epochs < 1e6, "num_train_epochs", "> 0", self.num_train_epochs)
        _require(0 <= self.seed < 2**32, "seed", "in [0, 2 ** 32)", self.seed)


@dataclass(frozen=True)
class InferenceConfig:
    """The model that is asked."""

    model: str | None = _option(
        None,
        "directory or Hub id of a causal language model or of a LoRA adapter; default: SmolLM2-135M-Instruct",
        MODEL,
    )
    precision: Literal["auto", "fp32", "bf16"] = _option(
        "auto", "arithmetic; auto: bf16 on a GPU that has it natively, else fp32"
    )
    attn_implementation: str | None = _option(
        None, "sdpa, flash_attention_2, eager, …; default: the model's own choice"
    )
    backend: Literal["auto", "triton", "torch", "reference"] = _option("auto", BACKEND)
    batch_size: int = _option(
        8, "sequences per forward pass, at most; fewer where they are long; examples of a persona that share what they "
        "have in common (--share) are one",
    )  # fmt: skip

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "batch_size", ">= 1", self.batch_size)


@dataclass(frozen=True)
class SplitConfig:
    """Which examples."""

    split: Literal["train", "validation", "test", "held_out"] | None = _option(
        None,
        "held_out: the tenth of the users that training without a validation split leaves out; default: the first of "
        "test, validation and train that the data has, of a run's own data test or what the run did not train on",
    )
    limit: int | None = _option(None, "the first so many examples; default: all")
    sample: int | None = _option(None, "so many examples, drawn at random from the whole split")
    split_seed: int | None = _option(
        None,
        "seed of sample, and of held_out the --seed of the training (default: 42); a run has recorded whom it held "
        "out, and others are drawn only where this is given",
    )

    def __post_init__(self) -> None:
        for name in ("limit", "sample"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, ">= 1", value)
        both = (self.limit, self.sample)
        _require(None in both, "limit, sample", "one of them", both)

    @property
    def seed(self) -> int:
        """Follows no model: two that are compared are asked the same."""
        return RunConfig.seed if self.split_seed is None else self.split_seed


@dataclass(frozen=True)
class PreviewConfig:
    """What is shown of the data."""

    model: str | None = _option(
        None, "directory or Hub id of the model whose tokenizer reads it; default: SmolLM2-135M-Instruct", MODEL
    )
    split: Literal["train", "validation", "test"] = _option("train", "the split that examples are taken from")
    rows: int = _option(3, "rows of which an example is shown as the text of both prompts, long parts shortened")
    sample: int = _option(500, "examples, of rows drawn at random, whose lengths are taken; with --streaming the first")
    seed: int = _option(42, "seed of the draw")

    def __post_init__(self) -> None:
        _require(self.rows >= 0, "rows", ">= 0", self.rows)
        _require(self.sample >= 1, "sample", ">= 1", self.sample)


@dataclass(frozen=True)
class ScoreConfig(WeightingConfig):
    """What is computed and where it is written."""

    labels: bool = _option(False, "how well PIR finds personal tokens, beside word matching, loss and entropy")
    output: str | None = _option(None, "HTML page: every token tinted by its weight", "FILE")
    jsonl: str | None = _option(
        None, "one JSON object per example: ids, log-probabilities, PIR, weights; resumable", "FILE"
    )
    summary: str | None = _option(None, "JSON of the whole: means, shares at the clip, token identification", "FILE")
    export: Literal["swift"] | None = _option(
        None, "write w.swift.jsonl beside --jsonl w.jsonl: rows of token ids and loss_scale for ms-swift"
    )
    shown: int = _option(50, "examples in the HTML page")
    terminal: int = _option(3, "examples shown in the terminal")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shown", "terminal"):
            _require(getattr(self, name) >= 0, name, ">= 0", getattr(self, name))
        if self.export:
            _require(self.jsonl is not None, "export", "a --jsonl FILE too, beside which it is written", self.jsonl)
            own = self.entry.signal is not None and not self.entry.over_step
            _require(own, "export", "an --objective that weighs each token by itself", self.objective)

    @property
    def exported(self) -> Path | None:
        """The rows for another trainer."""
        return (
            Path(self.jsonl).expanduser().with_suffix(f".{self.export}.jsonl") if self.export and self.jsonl else None
        )


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured and where it is written."""

    generate: bool = _option(True, "write replies too, and score them; false: losses only")
    temperature: float = _option(0.4, "sampling temperature (the paper: 0.4); 0: greedy")
    max_new_tokens: int = _option(512, "longest reply in tokens (the paper: 512)")
    output: str | None = _option(
        None, "JSON of the result, such as e.json; e.jsonl beside it has the examples, and is resumed", "FILE"
    )
    compare_with: str | None = _option(
        None, "result of another model on the same examples: differences, p-values", "FILE"
    )
    seed: int = _option(42, "seed of sampling, and of whose persona is swapped in")

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < float("inf"), "temperature", ">= 0", self.temperature)
        _require(not (self.output or "").endswith(".jsonl"), "output", "a name for JSON, such as e.json", self.output)
        _require(self.max_new_tokens >= 1, "max_new_tokens", ">= 1", self.max_new_tokens)
        _require(0 <= self.seed < 2**32, "seed", "in [0, 2 ** 32)", self.seed)

    @property
    def records(self) -> Path | None:
        """The file of the examples, beside the result."""
        return Path(self.output).expanduser().with_suffix(".jsonl") if self.output else None
