"""The options of each command: which sections of the schema it has, and its description in --help.

Neither torch nor transformers is imported here, so that `--help` answers at once. Any other TrainingArguments field can
be given to train by its Hugging Face name (`--weight_decay 0.1`); those are checked once transformers is loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from perce.config import questions, schema
from perce.config.options import Command, flat, number
from perce.config.step import StepConfig
from perce.config.yaml_file import read_yaml
from perce.errors import UserError
from perce.files.paths import did_you_mean
from perce.files.runs import CONFIG_NAME, holder_of, lacking, run_directory


@dataclass(frozen=True)
class TrainOptions:
    """The options of `python -m perce.train`; `extra` holds TrainingArguments fields by their Hugging Face names."""

    model: schema.ModelConfig = field(default_factory=schema.ModelConfig)
    data: schema.DataConfig = field(default_factory=schema.DataConfig)
    loss: schema.LossConfig = field(default_factory=schema.LossConfig)
    memory: schema.MemoryConfig = field(default_factory=schema.MemoryConfig)
    run: schema.RunConfig = field(default_factory=schema.RunConfig)
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The options as they are printed and saved: flat, as in a YAML file, and without secrets."""
        return flat(self) | {name: value for name, value in self.extra.items() if not is_secret(name)}

    @property
    def inputs(self) -> dict[str, str | None]:
        model = self.model.model and str(holder_of(Path(self.model.model).expanduser().resolve()))
        return {"--model": model, **self.data.inputs}

    @property
    def outputs(self) -> dict[str, str | None]:
        return {"--output_dir": self.run.output_dir}


@dataclass(frozen=True)
class InferenceOptions:
    """The model and the examples that it is run on: the options that score and evaluate share."""

    model: questions.InferenceConfig
    data: schema.DataConfig
    examples: questions.SplitConfig

    @property
    def inputs(self) -> dict[str, str | None]:
        run = run_directory(self.model.model)
        return {"--model": self.model.model, "the run of --model": str(run) if run else None, **self.data.inputs}


@dataclass(frozen=True)
class ScoreOptions(InferenceOptions):
    """The options of `python -m perce.score`."""

    score: questions.ScoreConfig

    @property
    def outputs(self) -> dict[str, str | None]:
        score = self.score
        exported = {"--export": str(score.exported) if score.exported else None}
        return {"--output": score.output, "--summary": score.summary, **exported, **_records("--jsonl", score.jsonl)}


@dataclass(frozen=True)
class EvaluateOptions(InferenceOptions):
    """The options of `python -m perce.evaluate`."""

    evaluate: questions.EvaluateConfig

    @property
    def inputs(self) -> dict[str, str | None]:
        return {**super().inputs, "--compare_with": self.evaluate.compare_with}

    @property
    def outputs(self) -> dict[str, str | None]:
        records = str(self.evaluate.records) if self.evaluate.records else None
        return {"--output": self.evaluate.output, **_records("the examples of --output", records)}


@dataclass(frozen=True)
class CompareOptions:
    """The options of `python -m perce.compare`."""

    compare: questions.CompareConfig

    @property
    def inputs(self) -> dict[str, str | None]:
        sides = self.compare.sides.items()
        return {f"file {i} of {option}": path for option, paths in sides for i, path in enumerate(paths, 1)}

    @property
    def outputs(self) -> dict[str, str | None]:
        return {"--output": self.compare.output}


@dataclass(frozen=True)
class PlanOptions:
    """The options of `python -m perce.plan`."""

    model: schema.ModelConfig
    step: StepConfig
    memory: schema.MemoryConfig = field(default_factory=schema.MemoryConfig)

    @property
    def inputs(self) -> dict[str, str | None]:
        return {"--model": self.model.model}

    @property
    def outputs(self) -> dict[str, str | None]:
        return {"--json": self.step.json}


@dataclass(frozen=True)
class PreviewOptions:
    """The options of `python -m perce.preview`."""

    preview: questions.PreviewConfig
    data: schema.DataConfig

    @property
    def inputs(self) -> dict[str, str | None]:
        return {"--model": self.preview.model, **self.data.inputs}

    @property
    def outputs(self) -> dict[str, str | None]:
        return {}


def is_secret(name: str) -> bool:
    """Whether an option's value is a secret, as hub_token's is. transformers masks fields with this ending too."""
    return name.endswith("_token")


def _records(option: str, path: str | None) -> dict[str, str | None]:
    """A file of records, and the file that measuring/records.py writes next to it."""
    return {option: path, f"the file next to {option}": path and f"{path}.run.json"}


TRAIN: Command[TrainOptions] = Command(
    "train",
    "Fine-tune a causal language model with the PerCE loss. Without arguments: a small model on the built-in examples, "
    "in minutes, on CPU or GPU.",
    TrainOptions,
    extra="TrainingArguments field",
    commands=lambda: COMMANDS,
)


def is_training_option(name: str) -> bool:
    """Whether `python -m perce.train` has this option: the other commands read its recipes too."""
    if name in TRAIN.fields:
        return True
    from transformers import TrainingArguments

    return name in TrainingArguments.__dataclass_fields__


OF_A_PROMPT = (
    "max_length", "retriever", "retriever_model", "retrieve_k", "chat_template_kwargs", "special_tokens_in_text",
)  # fmt: skip
"""What prompts are made with, whatever the rows are. Their wording is saved with the tokenizer."""


def of_the_run(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The options of the run in --model that hold where none is given, and a sentence that says so: what its tokens
    were weighted by; and of its data, all if no data is given, else what its prompts were made with."""
    if (run := run_directory(raw.get("model"))) is None:
        return {}, ""
    file = run / CONFIG_NAME
    saved = read_yaml(str(file), "--model")
    own = {option.name: saved[option.name] for option in fields(schema.DataConfig) if option.name in saved}
    told = f"--model {raw['model']}: run on its own data, with the data options in {file}"
    if raw.get("retriever", "dense") != "dense":
        own.pop("retriever_model", None)
    if raw.get("retriever") == "none":
        own.pop("retrieve_k", None)
    if "retrieve_k" in raw and own.get("retriever") == "none":
        own.pop("retriever")
    if "data" in raw:
        own = {name: own[name] for name in OF_A_PROMPT if name in own and name not in raw}
        usual = schema.DataConfig()
        unusual = ", ".join(f"{name} {value}" for name, value in own.items() if value != getattr(usual, name))
        told = unusual and f"--model {raw['model']}: prompts are made as in {file}: {unusual}"
    if "objective" not in raw:
        own |= {option.name: saved[option.name] for option in fields(schema.WeightingConfig) if option.name in saved}
    return own, told


SCORE: Command[ScoreOptions] = Command(
    "score",
    "Score every token of the replies: PerContrast (its log-probability with the persona minus that without it), and "
    "its weight. Without arguments: the default model on the built-in test examples, shown in the terminal.",
    ScoreOptions,
    passes_over=is_training_option,
    completes=of_the_run,
    commands=lambda: COMMANDS,
)
EVALUATE: Command[EvaluateOptions] = Command(
    "evaluate",
    "Evaluate a model on a split: losses with the persona, without it and with another user's, on personal and other "
    "tokens; ROUGE, METEOR and persona use of generated replies; bootstrap intervals; comparison of two models.",
    EvaluateOptions,
    passes_over=is_training_option,
    completes=of_the_run,
    commands=lambda: COMMANDS,
)
COMPARE: Command[CompareOptions] = Command(
    "compare",
    "Compare two methods by results of perce.evaluate, one or several of each: differences with intervals over users "
    "and p-values, and whether they exceed the spread over training seeds. No model is loaded.",
    CompareOptions,
    commands=lambda: COMMANDS,
    uses_models=False,
)
PLAN: Command[PlanOptions] = Command(
    "plan",
    "Plan a training step: its peak memory and least time, the largest context that fits, and what each option saves "
    "or costs. Only the model's config.json is read.",
    PlanOptions,
    passes_over=is_training_option,
    renames={"max_length": "context"},
    commands=lambda: COMMANDS,
)
PREVIEW: Command[PreviewOptions] = Command(
    "preview",
    "Show how training would read a dataset: its format, counts and lengths, what would be trimmed, shared and "
    "refused, and the text of both prompts. Only the model's tokenizer is read.",
    PreviewOptions,
    passes_over=is_training_option,
    commands=lambda: COMMANDS,
)
COMMANDS: tuple[Command[Any], ...] = (TRAIN, SCORE, EVALUATE, COMPARE, PLAN, PREVIEW)


def parse_args(argv: Sequence[str], recipe: str = "") -> tuple[TrainOptions, bool]:
    """(options of train, whether --print_config was given). Flags win over the YAML file, which wins over `recipe`.

    `recipe` is another YAML file, used if neither flags nor file name a model or data; see demo/recipe.yaml. With
    `--resume`, options that are not given come from the run directory; if that holds no run yet, one is begun there,
    provided that a model, data or a file is given.
    """
    parsed = TRAIN.parse(argv)
    raw = parsed.raw
    if number(raw.get("resume")) is True and raw.get("output_dir"):
        run = Path(raw["output_dir"]).expanduser()
        if (missing := lacking(run)) is None:
            saved = read_yaml(str(run / CONFIG_NAME))
            raw = saved | {name: value for name, value in raw.items() if value is not None}
        elif not (parsed.config_file or raw.get("model") or raw.get("data")):
            raise UserError(
                f"--resume: {raw['output_dir']} holds no run ({missing} is missing). Put it back if it was there. Was "
                f"--output_dir mistyped?{did_you_mean(raw['output_dir'])} To begin a run there, give --model, --data "
                "or --config."
            )
    if raw.get("model") is None and raw.get("data") is None:
        raw = (read_yaml(recipe) if recipe else {}) | raw
    return TRAIN.build(raw), parsed.print_config
