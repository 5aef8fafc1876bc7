"""Sections of the options of score, evaluate, compare and preview, as in schema.py."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from perce.config.options import option, require
from perce.config.schema import BACKEND, MODEL, WeightingConfig, refuse_idle, require_at_least
from perce.files.paths import check_different, check_path

SPLIT_SEED = 42
COLDEST = 1e-6  # the lowest temperature but 0: logits are divided by it, and must stay finite


def _beside(path: str, ending: str) -> Path:
    """The path with this ending instead of .json or .jsonl. What follows another dot belongs to the name: qwen-0.6."""
    return Path(re.sub(r"\.jsonl?$", "", path, flags=re.IGNORECASE) + ending).expanduser()


@dataclass(frozen=True)
class InferenceConfig:
    """The model that is scored or evaluated."""

    model: str | None = option(
        None,
        "directory or Hub id of a causal language model or of a LoRA adapter; default: SmolLM2-135M-Instruct",
        MODEL,
    )
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "arithmetic; auto: bf16 on a GPU that supports it natively, else fp32"
    )
    attn_implementation: str | None = option(None, "sdpa, flash_attention_2, eager, …; default: the model's own choice")
    backend: Literal["auto", "triton", "torch", "reference"] = option("auto", BACKEND)
    batch_size: int = option(
        8, "maximum sequences per forward pass, fewer if they are long; examples that share the tokens of a persona "
        "(--share) count as one",
    )  # fmt: skip

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size")


@dataclass(frozen=True)
class SplitConfig:
    """The examples that are scored or evaluated."""

    split: Literal["train", "validation", "test", "held_out"] | None = option(
        None,
        "held_out: the tenth of the users that training leaves out if the data has no validation split; default: the "
        "first of test, validation and train that the data has; for a run's own data, test, else what the run did not "
        "train on",
    )
    limit: int | None = option(None, "use the first N examples only; default: all")
    sample: int | None = option(None, "use N examples, drawn at random from the whole split")
    split_seed: int | None = option(
        None,
        "seed of --sample and of held_out, for which it must equal the training's --validation_seed (default: 42); the "
        "held-out users that a run has recorded are used unless this option is given",
    )

    def __post_init__(self) -> None:
        require_at_least(self, 1, "limit", "sample")
        both = (self.limit, self.sample)
        require(None in both, "limit, sample", "only one of them", both)
        if self.split not in (None, "held_out") and self.sample is None:
            refuse_idle(self, ("split_seed",), f"with --split {self.split} and without --sample")

    @property
    def seed(self) -> int:
        """The same for every model, so that two models that are compared are given the same examples."""
        return SPLIT_SEED if self.split_seed is None else self.split_seed


@dataclass(frozen=True)
class PreviewConfig:
    """Which part of the data is shown."""

    model: str | None = option(
        None, "directory or Hub id of the model whose tokenizer is used; default: SmolLM2-135M-Instruct", MODEL
    )
    split: Literal["train", "validation", "test"] = option("train", "the split that examples are taken from")
    rows: int = option(3, "number of rows to show, by one example each: the text of both prompts, long parts shortened")
    sample: int = option(
        500, "number of examples, from rows drawn at random, whose lengths are counted; with --streaming the first"
    )
    seed: int = option(42, "seed of the random draw of rows")

    def __post_init__(self) -> None:
        require_at_least(self, 0, "rows")
        require_at_least(self, 1, "sample")


@dataclass(frozen=True)
class ScoreConfig(WeightingConfig):
    """What is computed, and the files that it is written to."""

    labels: bool = option(
        False, "measure how well PIR finds the marked personal tokens, compared with word matching, loss and entropy"
    )
    output: str | None = option(None, "HTML page on which every token is tinted by its weight", "FILE")
    jsonl: str | None = option(
        None, "one JSON object per example: ids, log-probabilities, PIR, weights; resumable", "FILE"
    )
    summary: str | None = option(
        None, "JSON of the totals: means, shares at the bounds of the clip, token identification", "FILE"
    )
    export: Literal["swift"] | None = option(
        None, "write w.swift.jsonl next to --jsonl w.jsonl: rows of token ids and loss_scale for ms-swift"
    )
    shown: int = option(1000, "examples in the HTML page")
    terminal: int = option(3, "examples shown in the terminal")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "shown", "terminal")
        if self.output is None:
            refuse_idle(self, ("shown",), "without --output")
        if self.export:
            require(self.jsonl is not None, "export", "a --jsonl FILE too, next to which it is written", self.jsonl)
            own = self.entry.signal is not None and not self.entry.over_step
            require(own, "export", "an --objective that computes a weight from each token alone", self.objective)

    @property
    def exported(self) -> Path | None:
        """The file of rows for another trainer, if one is asked for."""
        return _beside(self.jsonl, f".{self.export}.jsonl") if self.export and self.jsonl else None


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, and the files that it is written to."""

    generate: bool = option(True, "also generate replies and score them; false: losses only")
    temperature: float = option(0.4, "sampling temperature (the paper: 0.4); 0: greedy")
    max_new_tokens: int = option(512, "maximum tokens per generated reply (the paper: 512)")
    output: str | None = option(
        None,
        "JSON of the result, such as e.json; e.jsonl next to it has the examples, and an interrupted run continues "
        "from it",
        "FILE",
    )
    compare_with: str | None = option(
        None, "JSON of another model's result on the same examples: adds differences and p-values", "FILE"
    )
    seed: int = option(42, "seed of sampling, and of the choice of another user's persona")

    def __post_init__(self) -> None:
        fits = self.temperature == 0 or COLDEST <= self.temperature < float("inf")
        require(fits, "temperature", f"0 (greedy), or at least {COLDEST}", self.temperature)
        lines = (self.output or "").lower().endswith(".jsonl")
        require(not lines, "output", "a name for JSON, such as e.json", self.output)
        require_at_least(self, 1, "max_new_tokens")
        require(0 <= self.seed < 2**32, "seed", "in [0, 2 ** 32)", self.seed)
        if not self.generate:
            refuse_idle(self, ("temperature", "max_new_tokens"), "with --generate false")

    @property
    def records(self) -> Path | None:
        """The file of the examples, next to the result."""
        return _beside(self.output, ".jsonl") if self.output else None


@dataclass(frozen=True)
class CompareConfig:
    """Two sides, A and B, and the file that their comparison is written to."""

    results: str | None = option(
        None,
        "A: files that evaluate --output wrote, comma-separated: one result of each model, such as those of one method "
        "with several seeds",
        "FILE,FILE",
    )
    compare_with: str | None = option(None, "B: likewise of another method, on the same examples", "FILE,FILE")
    output: str | None = option(None, "JSON of the comparison", "FILE")

    def __post_init__(self) -> None:
        for name in ("results", "compare_with"):
            require(getattr(self, name) is not None, name, "files that perce evaluate --output wrote", None)
        files = [(name, path) for name, paths in self.sides.items() for path in paths]
        for name, path in files:
            check_path(name, path, is_file=True)
        check_different(files)

    @property
    def sides(self) -> dict[str, list[str]]:
        """The files of A and of B, by option."""
        both = {"--results": self.results, "--compare_with": self.compare_with}
        return {name: [path.strip() for path in (paths or "").split(",")] for name, paths in both.items()}
