"""Sections of options as dataclasses; commands.py says which command has which. Those of the commands that ask a model
or look at data are in questions.py.

Neither torch nor transformers is imported here, so that `--help` answers at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from perce.config.options import option, require
from perce.config.prompt import PromptStyle
from perce.config.yaml_file import read_yaml
from perce.errors import UserError
from perce.objectives import OBJECTIVES, Objective, TokenWeighting
from perce.reading.formats import FORMATS
from perce.reading.readers import parse_json

MODEL = "DIR|HUB_ID"
FORMAT_NAMES = ("auto", *FORMATS)
BACKEND = (
    "implementation that computes losses and log-probabilities; reference: holds all logits of the response in memory; "
    "auto: the one that the environment variable PERCE_BACKEND names, else triton on NVIDIA GPUs that it supports, "
    "else torch"
)
_LINES = (f"{x.name}: {x.help} [{x.weighting()}; {' or '.join(x.takes)}]" for x in OBJECTIVES.values())
OBJECTIVE = option(
    "perce",
    "\n".join(["how tokens are weighted; in brackets: the weight, and for which rows", *_LINES]),
    "|".join(OBJECTIVES),
)


def objective_of(name: str) -> Objective:
    require(name in OBJECTIVES, "objective", f"one of {', '.join(OBJECTIVES)}", name)
    return OBJECTIVES[name]


def require_at_least(section: Any, least: float, *names: str) -> None:
    """UserError for one of these options of a section that is smaller; None is not."""
    for name in names:
        value = getattr(section, name)
        require(value is None or value >= least, name, f">= {least}", value)


def refuse_idle(section: Any, names: Sequence[str], beside: str) -> None:
    """UserError for an option of the section that has no effect and another value than its default. beside: what leaves
    it without an effect, in words."""
    for name in names:
        value, default = getattr(section, name), type(section).__dataclass_fields__[name].default
        require(value == default, name, f"{'none' if default is None else default} {beside}", value)


def _from_json(name: str, text: str) -> dict[str, Any]:
    """The mapping that an option's value spells."""
    try:
        value, why = parse_json(text), ""
    except ValueError as error:
        value, why = None, f" ({error})"
    require(isinstance(value, dict), name, f"a mapping as JSON{why}", text)
    return value


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained."""

    model: str | None = option(
        None, "directory or Hub id of a causal language model; default: SmolLM2-135M-Instruct", MODEL
    )
    lora_r: int = option(16, "LoRA rank; 0 trains all weights, as perce.train does without --model and --data")
    lora_alpha: int = option(32, "the output of the adapters is scaled by lora_alpha / lora_r")
    lora_dropout: float = option(0.0, "dropout inside the adapters, in [0, 1)")
    load_in_4bit: bool = option(False, "quantise the frozen base to 4 bits with bitsandbytes")
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "arithmetic; auto: bf16 if the device supports it natively, else fp32"
    )
    attn_implementation: str | None = option(
        None, "sdpa, flash_attention_2, eager, …; default: flash_attention_2 if it is installed and can run, else the "
        "model's own",
    )  # fmt: skip
    backend: Literal["auto", "triton", "torch", "reference"] = option("auto", BACKEND)

    def __post_init__(self) -> None:
        require_at_least(self, 0, "lora_r")
        require_at_least(self, 1, "lora_alpha")
        require(0 <= self.lora_dropout < 1, "lora_dropout", "in [0, 1)", self.lora_dropout)
        if not self.lora_r:
            idle = ("lora_alpha", "lora_dropout", "load_in_4bit")
            refuse_idle(self, idle, "with --lora_r 0, which trains all weights")


@dataclass(frozen=True)
class DataConfig:
    """The rows, and how each becomes a pair of token sequences, with and without the persona."""

    data: str | None = option(
        None, "file, directory or Hub id; default: the built-in examples; in score and evaluate with the --model of a "
        "run: the data of that run", "DATA",
    )  # fmt: skip
    format: str = option("auto", "row format; auto: detected from the fields", "|".join(FORMAT_NAMES))
    columns: str | None = option(
        None, "names of the fields in your rows, such as persona=profile,response=output", "OURS=THEIRS,…"
    )
    persona_markers: str | None = option(
        None, "the texts before and after the persona in the system message, for rows without a persona field, such as "
        "'<persona>...</persona>'; 'START...': the persona reaches to the end of the message", "START...END",
    )  # fmt: skip
    skip_bad_rows: bool = option(False, "skip rows that cannot be used, and report their number, instead of stopping")
    streaming: bool = option(
        False, "read rows during the run instead of before it; training then needs --max_steps and a validation split"
    )
    max_length: int = option(
        5000,
        "maximum tokens per sequence; persona entries are dropped, the last first, until an example fits; longer "
        "documents are cut into pieces",
    )
    retriever: Literal["bm25", "dense", "recency", "none"] = option(
        "bm25",
        "how to choose the passages of a user's history that the prompt shows; bm25: by words in common with the "
        "request; dense: by similar embeddings; recency: the latest; none: all, the latest first; a history that is "
        "a conversation is shown whole if it fits",
    )
    retriever_model: str | None = option(
        None, "directory or Hub id of the mean-pooled encoder of --retriever dense; default: facebook/contriever", MODEL
    )
    retrieve_k: int = option(4, "number of passages to show, best first")
    chat_template_kwargs: str | None = option(
        None, 'arguments of the chat template as JSON, such as {"enable_thinking": false}', "JSON"
    )
    prompt: str | None = option(
        None, "YAML file (in a recipe also a mapping) that words the persona in the prompt, with any of the keys "
        "system, place, header, item, footer; see docs/SERVING.md", "FILE",
    )  # fmt: skip
    special_tokens_in_text: Literal["text", "allow"] = option(
        "text",
        "how strings in the data that spell control tokens, such as <|im_end|>, are tokenized; text: as ordinary text; "
        "allow: as these control tokens",
    )
    share: Literal["conversations", "none"] = option(
        "conversations", "compute only once the tokens that replies of a conversation in one batch have in common (in "
        "evaluate and score also those of examples with the same persona): the same numbers in a fraction of the time; "
        "none: compute each reply separately",
    )  # fmt: skip

    def __post_init__(self) -> None:
        require(self.format in FORMAT_NAMES, "format", "one of " + ", ".join(FORMAT_NAMES), self.format)
        require_at_least(self, 16, "max_length")
        require_at_least(self, 1, "retrieve_k")
        dense = self.retriever == "dense" or self.retriever_model is None
        require(dense, "retriever_model", "--retriever dense with it", f"--retriever {self.retriever}")
        if self.retriever == "none":
            refuse_idle(self, ("retrieve_k",), "with --retriever none, which shows all passages")
        self.column_names()
        self.markers()
        self.template_kwargs()
        self.prompt_style()

    @property
    def inputs(self) -> dict[str, str | None]:
        """The paths that are read, by the option that names them."""
        file = None if (self.prompt or "").lstrip().startswith("{") else self.prompt
        return {"--data": self.data, "--retriever_model": self.retriever_model, "--prompt": file}

    def column_names(self) -> dict[str, str] | None:
        if self.columns is None:
            return None
        parts = [item.partition("=") for item in self.columns.split(",")]
        pairs = [(name.strip(), source.strip()) for name, _, source in parts]
        require(all(map(all, pairs)), "columns", "name=column,name=column", self.columns)
        ours = [name for name, _ in pairs]
        twice = next((name for name in ours if ours.count(name) > 1), None)
        both = " and ".join(item for item, name in zip(self.columns.split(","), ours, strict=True) if name == twice)
        if twice:
            raise UserError(f"columns: expected each name before = once, got {both}.")
        return dict(pairs)

    def markers(self) -> tuple[str, str] | None:
        """The texts before and after the persona in a system message."""
        if self.persona_markers is None:
            return None
        start, dots, end = self.persona_markers.partition("...")
        expected = "START...END, or START... for a persona that reaches to the end of the message"
        require(bool(start and dots), "persona_markers", expected, self.persona_markers)
        return start, end

    def template_kwargs(self) -> dict[str, Any]:
        return _from_json("chat_template_kwargs", self.chat_template_kwargs or "{}")

    def prompt_style(self) -> dict[str, str]:
        """The mapping that --prompt gives, checked; its keys are the fields of prompt.PromptStyle."""
        if not self.prompt:
            return {}
        require(isinstance(self.prompt, str), "prompt", "a YAML file, or a mapping as JSON", self.prompt)
        as_json = self.prompt.lstrip().startswith("{")
        keys = _from_json("prompt", self.prompt) if as_json else read_yaml(self.prompt, "--prompt")
        PromptStyle.of(keys)
        return keys


@dataclass(frozen=True)
class WeightingConfig:
    """How tokens are weighted, in train and in score. The defaults of clip and contrast depend on the objective."""

    objective: str = OBJECTIVE
    clip_min: float | None = option(None, "lower bound m of a token's weight; default: the objective's")
    clip_max: float | None = option(None, "upper bound M of a token's weight; default: the objective's")
    contrast: Literal["log", "ratio"] | None = option(
        None, "the value that is clipped to give the weight; log: PIR; ratio: exp(PIR); default: log, for longce ratio"
    )

    def __post_init__(self) -> None:
        own, low, high = self.entry.weighting(), self.weighting.clip_min, self.weighting.clip_max
        expected = f"finite numbers, 0 <= min <= max ({self.objective}'s own: {own.clip_min:g}, {own.clip_max:g})"
        require(0 <= low <= high < float("inf"), "clip_min, clip_max", expected, (low, high))
        expected = f"no value with --objective {self.objective}, whose weight is neither PIR nor exp(PIR)"
        require(not self.contrast or own.contrast is not None, "contrast", expected, self.contrast)

    @property
    def entry(self) -> Objective:
        return objective_of(self.objective)

    @property
    def weighting(self) -> TokenWeighting:
        return self.entry.weighting(self.contrast, self.clip_min, self.clip_max)


@dataclass(frozen=True)
class LossConfig(WeightingConfig):
    """The loss that is minimised."""

    estimate: Literal["online", "epoch", "frozen"] = option(
        "online", "when weights are estimated; online: in each step; epoch: at the start of each epoch; frozen: once, "
        "by the initial model",
    )  # fmt: skip
    clip_schedule: Literal["constant", "rising", "falling"] = option(
        "constant",
        "rising: both bounds of the clip begin at 1, which is plain cross-entropy, and reach clip_min and clip_max at "
        "the last step; falling: the reverse",
    )
    normalize: Literal["none", "batch", "sequence"] = option(
        "none", "rescale weights to a mean of 1 over the batch of each step or over each sequence"
    )
    short_context: int = option(4096, "longce: length of the short context in tokens (the authors' code: 4096)")
    short_stride: int = option(
        1024, "longce: successive tokens whose short contexts begin at the same token (the authors' code: 1024)"
    )
    router_aux_loss_coef: float | None = option(
        None, "mixtures of experts: the router's load-balancing loss is added to the loss of each step, times this; 0: "
        "not added; default: the router_aux_loss_coef of the model's config if output_router_logits is true there, "
        "else 0",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        coefficient = self.router_aux_loss_coef
        require(coefficient is None or 0 <= coefficient < float("inf"), "router_aux_loss_coef", ">= 0", coefficient)
        require_at_least(self, 1, "short_context", "short_stride")
        if self.entry.signal is None:
            beside = f"with --objective {self.objective}, whose weights are 1"
            refuse_idle(self, ("estimate", "clip_schedule", "normalize"), beside)
        elif not self.weighting.of_model:
            refuse_idle(self, ("estimate",), f"with --objective {self.objective}, whose weights ask no model")

    def at(self, progress: float) -> "LossConfig":
        """The loss at this point of the run, from 0 (its first step) to 1 (its last).

        Both bounds move linearly between 1, where every weight is 1, and clip_min or clip_max.
        """
        if self.clip_schedule == "constant":
            return self
        share = progress if self.clip_schedule == "rising" else 1 - progress
        low, high = (share * bound + (1 - share) for bound in (self.weighting.clip_min, self.weighting.clip_max))
        return replace(self, clip_min=low, clip_max=high)


@dataclass(frozen=True)
class MemoryConfig:
    """Ways to save memory on long contexts; see also activation_checkpointing."""

    persona_grad: Literal["full", "none"] = option(
        "full",
        "none: the loss is the same, but no gradient flows through the keys and values of the prompt up to the end of "
        "the persona",
    )
    share_persona: int = option(
        0, "put up to this many requests of a user into one forward pass that computes their persona once, if their "
        "prompts are the same up to its end; 1: share nothing; 0: share as --share says",
    )  # fmt: skip
    branches_per_forward: int = option(
        0, "run the persona in a forward pass of its own, and behind it this many requests at a time: the same "
        "gradient, in less memory without activation_checkpointing; 0: all together",
    )  # fmt: skip
    mlp_tile: int = option(
        0, "run each MLP on this many tokens at a time, and again in the backward pass; 0: on all tokens at once"
    )
    activation_offload: bool = option(
        False, "keep the inputs of checkpointed layers in host memory; needs a GPU and activation_checkpointing"
    )

    def __post_init__(self) -> None:
        require_at_least(self, 0, "mlp_tile", "share_persona", "branches_per_forward")

    @property
    def on_trunks(self) -> bool:
        """Whether a persona is run in a forward pass of its own; see model/prefill.py."""
        return self.persona_grad == "none" or self.branches_per_forward > 0

    @property
    def by_itself(self) -> str:
        """The option because of which `on_trunks` is true."""
        return "persona_grad=none" if self.persona_grad == "none" else "branches_per_forward"

    @property
    def unit(self) -> Literal["conversation", "persona"]:
        """Which examples share tokens: those of a conversation, or those of a persona."""
        return "persona" if self.share_persona else "conversation"


@dataclass(frozen=True)
class RunConfig:
    """The training run. Options that TrainingArguments has too mean the same there."""

    output_dir: str | None = option(None, "run directory; default: runs/NAME, with a number if that is taken", "DIR")
    resume: bool = option(
        False,
        "continue from the newest complete checkpoint in output_dir; begin if there is none yet; do nothing if the run "
        "is finished: the same command can be given at any moment",
    )
    num_train_epochs: float = option(3.0, "passes over the training examples (the paper: 3)")
    max_steps: int = option(-1, "optimiser steps instead of epochs; -1: epochs")
    learning_rate: float | None = option(None, "peak learning rate; default: 2e-5 for all weights, 2e-4 for LoRA")
    warmup_steps: float = option(0.1, "steps of linear warm-up; below 1: a share of all steps")
    per_device_train_batch_size: int | None = option(
        None, "replies per forward pass, at most this many if replies share tokens; default: chosen by their lengths"
    )
    gradient_accumulation_steps: int | None = option(
        None, "forward passes per optimiser step; default: as many as give 8 replies per device"
    )
    tokens_per_batch: int | None = option(
        None, "tokens per forward pass, padding included and shared tokens counted once, instead of a number of "
        "replies; a step is then gradient_accumulation_steps (default: 1) such passes per device",
    )  # fmt: skip
    packing: bool = option(
        False, "put the sequences of a forward pass into one row without padding; needs --attn_implementation "
        "flash_attention_2, flash_attention_3 or flex_attention and a GPU",
    )  # fmt: skip
    eval_examples: int | None = option(
        None, "validation examples per evaluation; 0: all; default: 64, on a CPU fewer (at most 20,000 tokens)"
    )
    eval_steps: float | None = option(None, "steps between evaluations; default: evaluate at the end of each epoch")
    save_steps: float = option(500, "steps between checkpoints; 0: save the final model only")
    early_stopping: int = option(
        0, "stop after this many evaluations in a row without a better eval_loss (or --metric_for_best_model), and "
        "keep the best weights; 0: never",
    )  # fmt: skip
    logging_steps: float = option(10, "steps between log entries")
    report_examples: int = option(64, "validation responses shown token by token in report.html")
    activation_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, about 30 % slower"
    )
    merge_adapter: bool = option(False, "LoRA: also save the whole model, merged in fp32, in output_dir/merged")
    seed: int = option(42, "seed of data order, dropout and LoRA initialisation")
    validation_seed: int = option(42, "seed of who is held out, and of the draw of --eval_examples")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_batch")
        require_at_least(self, 0, "eval_examples", "report_examples", "save_steps", "early_stopping")
        sequences, tokens = self.per_device_train_batch_size, self.tokens_per_batch
        one = "per_device_train_batch_size or tokens_per_batch"
        require(sequences is None or tokens is None, one, "only one of them", (sequences, tokens))
        for name in ("logging_steps", "learning_rate", "eval_steps"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "> 0", value)
        require(self.max_steps != 0 and self.max_steps >= -1, "max_steps", ">= 1, or -1", self.max_steps)
        require(0 < self.num_train_epochs < 1e6, "num_train_epochs", "> 0", self.num_train_epochs)
        require(0 <= self.seed < 2**32, "seed", "in [0, 2 ** 32)", self.seed)
