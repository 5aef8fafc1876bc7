"""The options of a run as dataclasses; command line, YAML and --help are generated from them.

Neither torch nor transformers is imported here, so that `--help` answers at once. Any other TrainingArguments field can
be given by its Hugging Face name (`--weight_decay 0.1`); train.py checks those once transformers is loaded.
"""

import argparse
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from perce.errors import UserError

CONFIG_NAME = "config.yaml"  # the resolved options, in every run directory


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    model: str | None = _option(None, "directory or Hub id of a causal language model; default: SmolLM2-135M-Instruct")
    lora_r: int = _option(16, "LoRA rank; 0 trains all weights, as the run without arguments does")
    lora_alpha: int = _option(32, "LoRA scale is lora_alpha / lora_r")
    lora_dropout: float = _option(0.0, "dropout inside the adapters, in [0, 1)")
    load_in_4bit: bool = _option(False, "quantise the frozen base to 4 bits with bitsandbytes")
    precision: Literal["auto", "fp32", "bf16"] = _option(
        "auto", "arithmetic; auto: bf16 where the device has it natively"
    )
    attn_implementation: str | None = _option(
        None, "sdpa, flash_attention_2, eager, …; default: the model's own choice"
    )

    def __post_init__(self) -> None:
        _require(self.lora_r >= 0, "lora_r", ">= 0", self.lora_r)
        _require(0 <= self.lora_dropout < 1, "lora_dropout", "in [0, 1)", self.lora_dropout)


@dataclass(frozen=True)
class DataConfig:
    """What it is trained on."""

    data: str | None = _option(None, "file, directory or Hub id; default: the built-in examples")
    format: Literal["auto", "perce", "longlamp", "lamp", "convai2", "spc", "prompt_completion", "text"] = _option(
        "auto", "row format; auto: detected from the fields"
    )
    columns: str | None = _option(None, "rename fields, such as persona=profile,response=output")
    skip_bad_rows: bool = _option(False, "count and report rows that cannot be used instead of stopping")
    streaming: bool = _option(False, "read rows while training instead of before; needs --max_steps")
    max_length: int = _option(
        5000, "longest sequence in tokens; persona entries are dropped from the end until it fits, documents are cut"
    )
    retrieve_k: int = _option(4, "passages of a user's history in the prompt (LongLaMP, LaMP), most recent first")
    chat_template_kwargs: str | None = _option(None, 'JSON for the chat template, such as {"enable_thinking": false}')

    def __post_init__(self) -> None:
        _require(self.max_length >= 16, "max_length", ">= 16", self.max_length)
        _require(self.retrieve_k >= 1, "retrieve_k", ">= 1", self.retrieve_k)
        self.column_names()
        self.template_kwargs()

    def column_names(self) -> dict[str, str] | None:
        if self.columns is None:
            return None
        pairs = [item.partition("=") for item in self.columns.split(",")]
        valid = all(name and source for name, _, source in pairs)
        _require(valid, "columns", "name=column,name=column", self.columns)
        return {name.strip(): source.strip() for name, _, source in pairs}

    def template_kwargs(self) -> dict[str, Any]:
        try:
            value = json.loads(self.chat_template_kwargs or "{}")
        except json.JSONDecodeError:
            value = None
        _require(isinstance(value, dict), "chat_template_kwargs", "a JSON object", self.chat_template_kwargs)
        return value


@dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    objective: Literal["perce", "ce", "longce"] = _option(
        "perce", "the PerCE loss; plain cross-entropy; or LongCE, on documents instead of personas"
    )
    clip_min: float = _option(None, "lower bound m of a token's weight; default: 0.8 (the paper), of longce 0")
    clip_max: float = _option(5.0, "upper bound M of a token's weight (the paper: 5)")
    contrast: Literal["log", "ratio"] = _option(
        None, "weight = clip(pir), or clip(exp(pir)); default: log, of longce ratio"
    )
    normalize: Literal["none", "batch", "sequence"] = _option(
        "none", "rescale weights to mean 1 over the batch or sequence"
    )
    short_context: int = _option(4096, "longce: tokens of the short context (the authors' code: 4096)")
    short_stride: int = _option(1024, "longce: tokens that share the beginning of a short context (theirs: 1024)")

    def __post_init__(self) -> None:
        longce = self.objective == "longce"
        for name, default in (("clip_min", 0.0 if longce else 0.8), ("contrast", "ratio" if longce else "log")):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name in ("short_context", "short_stride"):
            _require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        bounds = (self.clip_min, self.clip_max)
        _require(0 <= self.clip_min <= self.clip_max < float("inf"), "clip_min, clip_max", "0 <= min <= max", bounds)


@dataclass(frozen=True)
class RunConfig:
    """How it is trained. Names that TrainingArguments has too mean the same."""

    output_dir: str | None = _option(None, "run directory; default: runs/NAME, numbered when taken")
    resume: bool = _option(False, "continue from the last checkpoint in output_dir")
    num_train_epochs: float = _option(3.0, "passes over the training examples (the paper: 3)")
    max_steps: int = _option(-1, "optimiser steps instead of epochs; -1: epochs")
    learning_rate: float | None = _option(None, "peak; default: 2e-5 for all weights, 2e-4 for LoRA")
    warmup_steps: float = _option(0.1, "linear warm-up, in steps, or below 1 as a share of all steps")
    per_device_train_batch_size: int | None = _option(None, "sequences a forward; default: by length, see accumulation")
    gradient_accumulation_steps: int | None = _option(
        None, "forwards an optimiser step; default: so many that a device's step is 8 sequences"
    )
    tokens_per_batch: int | None = _option(
        None, "tokens a forward, padding included, instead of a number of sequences; a step is then "
        "gradient_accumulation_steps (default: 1) such forwards on each device",
    )  # fmt: skip
    packing: bool = _option(
        False, "put the sequences of a forward into one row without padding; needs --attn_implementation "
        "flash_attention_2, flash_attention_3 or flex_attention and a GPU",
    )  # fmt: skip
    eval_examples: int | None = _option(
        None, "validation examples an evaluation; 0: all; default: 64, on a CPU no more than 20,000 tokens hold"
    )
    eval_steps: float | None = _option(None, "evaluate every so many steps; default: each epoch's end")
    save_steps: float = _option(500, "checkpoint every so many steps; 0: none but the final model")
    logging_steps: float = _option(10, "log every so many steps")
    report_examples: int = _option(8, "validation responses shown token by token in report.html")
    activation_checkpointing: bool = _option(False, "recompute activations in backward: less memory, about 30 % slower")
    seed: int = _option(42, "of everything random")

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_batch"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, ">= 1", value)
        sequences, tokens = self.per_device_train_batch_size, self.tokens_per_batch
        one = "per_device_train_batch_size or tokens_per_batch"
        _require(sequences is None or tokens is None, one, "one of them", (sequences, tokens))
        for name in ("eval_examples", "report_examples", "save_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 0, name, ">= 0", value)
        for name in ("logging_steps", "learning_rate", "eval_steps"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, "> 0", value)
        _require(self.max_steps != 0 and self.max_steps >= -1, "max_steps", ">= 1, or -1", self.max_steps)
        _require(0 < self.num_train_epochs < 1e6, "num_train_epochs", "> 0", self.num_train_epochs)
        _require(0 <= self.seed < 2**32, "seed", "in [0, 2 ** 32)", self.seed)


@dataclass(frozen=True)
class TrainConfig:
    """All options of `python -m perce.train`, and `extra` TrainingArguments fields by their Hugging Face names."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    run: RunConfig = field(default_factory=RunConfig)
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Flat, as in a YAML file."""
        flat = {name: value for section in SECTIONS for name, value in vars(getattr(self, section)).items()}
        return flat | self.extra


SECTIONS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "loss": LossConfig, "run": RunConfig}
_FIELDS = {field.name: (section, field) for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)}
_TYPES = {name: typing.get_type_hints(SECTIONS[section])[name] for name, (section, _) in _FIELDS.items()}


def build_config(values: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> TrainConfig:
    """TrainConfig from flat, converted values; UserError names the option that is off."""
    sections = {
        section: cls(**{name: values[name] for name in values if _FIELDS[name][0] == section})
        for section, cls in SECTIONS.items()
    }
    return TrainConfig(**sections, extra=dict(extra or {}))


def parse_args(argv: Sequence[str], defaults: Mapping[str, Any]) -> tuple[TrainConfig, bool]:
    """(config, whether --print_config was given). Flags win over the YAML file, which wins over `defaults`.

    `defaults` are used where neither names a model nor data; see demo/recipe.yaml. `--resume` without `--config` starts
    from the options saved in the run directory.
    """
    parser = _parser()
    namespace, rest = parser.parse_known_args([_underscored(argument) for argument in argv])
    given = {name: value for name, value in vars(namespace).items() if value is not None}
    config_file, print_config = given.pop("config", None), given.pop("print_config", False)
    from_file = read_yaml(config_file) if config_file else {}
    flags = given | _extra_flags(rest)
    if _number(flags.get("resume")) is True and flags.get("output_dir") and not config_file:
        saved = Path(flags["output_dir"]).expanduser() / CONFIG_NAME
        from_file = read_yaml(str(saved)) if saved.is_file() else {}
    raw = from_file | flags
    if raw.get("model") is None and raw.get("data") is None:
        raw = dict(defaults) | raw
    values = {name: _convert(name, value) for name, value in raw.items() if name in _FIELDS}
    return build_config(values, {name: value for name, value in raw.items() if name not in _FIELDS}), print_config


def read_yaml(path: str) -> dict[str, Any]:
    """A flat YAML mapping; `1e-5` is a number here, as people expect and YAML 1.1 does not."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"--config {path}: expected `option: value` lines, got {type(content).__name__}.")
    return {name.replace("-", "_"): _number(value) for name, value in content.items()}


def unknown_option(name: str, known: Sequence[str]) -> UserError:
    """The error for an option that neither we nor TrainingArguments have, with the nearest names."""
    near = difflib.get_close_matches(name, dict.fromkeys([*_FIELDS, *known]), n=2)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return UserError(f"{name}: unknown option.{hint} `--help` lists ours; any TrainingArguments field works too.")


def dump_yaml(config: TrainConfig) -> str:
    import yaml

    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message[0].upper()}{message[1:]}. `--help` lists the options.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m perce.train",
        description="Fine-tune a causal language model with the PerCE loss. Without arguments: a small model on the "
        "built-in examples, in minutes, on CPU or GPU.",
        epilog="Any other TrainingArguments field can be given by its Hugging Face name, such as --weight_decay 0.1.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags win")
    parser.add_argument("--print_config", action="store_true", default=None, help="print the resolved options and stop")
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(f"{section}: {(cls.__doc__ or '').splitlines()[0]}")
        for option in dataclasses.fields(cls):
            default = "" if option.default in (None, False) else f" [{option.default}]"
            help = (option.metadata["help"] + default).replace("%", "%%")
            kind = {"nargs": "?", "const": "true"} if _TYPES[option.name] is bool else {}
            group.add_argument(f"--{option.name}", help=help, metavar=_metavar(option.name), **kind)  # type: ignore[arg-type]
    return parser


def _metavar(name: str) -> str:
    choices = typing.get_args(_TYPES[name]) if typing.get_origin(_TYPES[name]) is Literal else ()
    if choices:
        return "|".join(choices)
    return {bool: "true|false", int: "N", float: "X"}.get(_plain_type(name), "VALUE")


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}"


def _extra_flags(rest: Sequence[str]) -> dict[str, Any]:
    """`--name value`, `--name=value` and bare `--name` that the parser does not know."""
    extra: dict[str, Any] = {}
    arguments = list(rest)
    while arguments:
        flag = arguments.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"{flag}: expected an option that starts with --. `--help` lists the options.")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            value = arguments.pop(0) if arguments and not arguments[0].startswith("--") else "true"
        extra[name] = _number(value)
    return extra


def _number(value: Any) -> Any:
    """Strings that are numbers or booleans, as YAML and TrainingArguments want them."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for cast in (int, float):
        try:
            return cast(value)
        except ValueError:
            continue
    return value


def _plain_type(name: str) -> type:
    hint = _TYPES[name]
    if isinstance(hint, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    return hint


def _convert(name: str, value: Any) -> Any:
    """A flag's string or a YAML scalar → the field's type."""
    hint = _plain_type(name)
    optional = isinstance(_TYPES[name], types.UnionType)
    if value is None or (optional and isinstance(value, str) and value.lower() in ("none", "null")):
        _require(optional, name, f"a value of type {getattr(hint, '__name__', hint)}", value)
        return None
    if typing.get_origin(hint) is Literal:
        _require(value in typing.get_args(hint), name, "one of " + ", ".join(typing.get_args(hint)), value)
        return value
    if hint is str:
        return json.dumps(value) if isinstance(value, dict) else str(value)
    number = _number(value)
    fits = {
        bool: isinstance(number, bool),
        int: isinstance(number, int | float) and not isinstance(number, bool) and float(number).is_integer(),
        float: isinstance(number, int | float) and not isinstance(number, bool),
    }[hint]
    _require(fits, name, {bool: "true or false", int: "a whole number", float: "a number"}[hint], value)
    return hint(number)


def _require(condition: bool, name: str, expected: str, got: Any) -> None:
    if not condition:
        raise UserError(f"{name}: expected {expected}, got {got!r}.")
