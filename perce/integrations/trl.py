"""PerCE in TRL: its SFTTrainer and SFTConfig, for rows in any of its formats with one more column, `persona` (a text or
several).

TRL prepares each row twice, with the persona and without it. The labels mark the persona (data/marked.py), so TRL's own
code cuts, packs and collates. It also computes the mean of the loss and its metrics; our op replaces its head.
"""

from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin

from perce.config.options import option
from perce.config.prompt import STYLE, PromptStyle
from perce.config.schema import LossConfig
from perce.data.marked import PersonaCollator
from perce.data.template import has_system_role, on_one_day
from perce.data.twice import Twice
from perce.errors import UserError, installed
from perce.integrations.trainer import PerceMixin
from perce.objectives import in_one_pass
from perce.training.checks import check_in_one_pass

with installed("trl"):
    from trl import SFTConfig, SFTTrainer
    from trl.data_utils import get_dataset_column_names, is_conversational_from_value, maybe_convert_to_chatml
    from trl.trainer.utils import FusedCausalLMOutput  # noqa: F401  of 1.16, whose compute_loss reads one


@dataclass
class PerceSFTConfig(SFTConfig):
    """trl.SFTConfig with some options of perce.train. UserError for options that would cut the persona off."""

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "prompt"]  # noqa: RUF012
    objective: str = option("perce", f"how tokens are weighted: {', '.join(in_one_pass())}")
    clip_min: float | None = option(None, "smallest weight of a token; default: the objective's own")
    clip_max: float | None = option(None, "largest weight of a token; default: the objective's own")
    contrast: str | None = option(None, "clip PIR (log) or exp(PIR) (ratio); default: the objective's own")
    prompt: dict | str | None = option(None, "wording of the persona: keys of perce.train's --prompt")  # noqa: RUF009
    backend: str = option("auto", "backend of fused_perce_loss: auto, triton, torch or reference")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, only, why in (
            ("loss_type", "nll", "use objective=dft for DFT"),
            ("packing_strategy", "bfd", "others cut sequences into pieces, of which only the first has the persona"),
            ("truncation_mode", "keep_start", "the other mode cuts the persona off"),
        ):
            if getattr(self, name) != only:
                raise UserError(f"{name}: expected {only}, got {getattr(self, name)}: {why}.")
        if self.eval_packing and not (self.packing or self.padding_free):
            raise UserError("eval_packing: needs packing or padding_free, which keep the sequences of a row apart.")
        _ = self.loss, self.style  # raise for wrong options

    @property
    def loss(self) -> LossConfig:
        """The loss of these options, as they are now."""
        check_in_one_pass(self.objective)
        names = ("objective", "clip_min", "clip_max", "contrast")
        return LossConfig(**{name: getattr(self, name) for name in names})

    @property
    def style(self) -> PromptStyle | None:
        """The wording of these options, as they are now; None: the tokenizer's."""
        return PromptStyle.of(self.prompt) if self.prompt else None  # type: ignore[arg-type]


class PerceSFTTrainer(PerceMixin, SFTTrainer):
    """trl.SFTTrainer on rows with a persona; see PerceMixin for what it logs and refuses."""

    _name, _tag_names = "PerCE", ["trl", "sft", "perce"]
    _paper = {"title": "Rethinking Personalization in Large Language Models at the Token Level", "id": "2603.06595"}  # noqa: RUF012
    top1 = True

    def __init__(self, model: Any, args: PerceSFTConfig | None = None, *, train_dataset: Any = None, **kwargs: Any):
        args = PerceSFTConfig() if args is None else args
        if not isinstance(args, PerceSFTConfig):
            raise UserError(f"args: expected a PerceSFTConfig, got {type(args).__name__}.")
        if kwargs.get("formatting_func"):
            raise UserError("formatting_func: would leave out the persona. Give rows in one of TRL's formats.")
        if isinstance(train_dataset, Mapping):
            kind, one = type(train_dataset).__name__, next(iter(train_dataset), "train")
            raise UserError(f"train_dataset: expected one dataset, got {kind}. Give train_dataset[{one!r}], say.")
        train_dataset = _as_dataset(train_dataset, "train_dataset")
        if "eval_dataset" in kwargs:
            kwargs["eval_dataset"] = _as_dataset(kwargs["eval_dataset"], "eval_dataset")
        if images := {"image", "images"} & {*(get_dataset_column_names(train_dataset) if train_dataset else [])}:
            raise UserError(f"train_dataset: expected texts only, got a column {images.pop()}.")
        super().__init__(model, args, train_dataset=train_dataset, loss=args.loss, backend=args.backend, **kwargs)
        if args.prompt:  # saved with the model, in a copy: the caller's tokenizer stays as it is
            served: Any = deepcopy(self.processing_class)
            served.init_kwargs[STYLE] = args.prompt
            self.processing_class = served

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Like trl.SFTTrainer.evaluate; rows may be lists."""
        named = isinstance(eval_dataset, str)
        rows = eval_dataset if named else _as_dataset(eval_dataset, "eval_dataset")
        return super().evaluate(rows, *args, **kwargs)

    def _collators_without(self) -> dict[str, PersonaCollator]:
        collator = self.data_collator.collator
        return {"padding_free": PersonaCollator(replace(collator, padding_free=False))} if self.padding_free else {}

    @on_one_day()
    def _prepare_dataset(
        self, dataset: Any, tokenizer: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """TRL's own preparation, of each row with and without the persona; rows that are already tokenised must have
        the labels of data/marked.py."""
        if isinstance(tokenizer, ProcessorMixin):
            raise UserError("processing_class: expected a tokenizer, got a processor, which is for images too.")
        columns = get_dataset_column_names(dataset)
        if "input_ids" not in columns:
            if "persona" not in columns:
                raise UserError(f"{dataset_name} dataset: expected a column persona, got {', '.join(columns)}.")
            if is_conversational_from_value(next(iter(dataset))):
                dataset = dataset.map(maybe_convert_to_chatml, remove_columns=[*{"conversations"} & {*columns}])
                columns = get_dataset_column_names(dataset)
            role, whole = has_system_role(tokenizer, self.chat_template), copy(args)
            whole.max_length, whole.shuffle_dataset = None, False
            style = args.style or PromptStyle.saved_with(tokenizer)
            twice = Twice(dataset_name, tokenizer, style, role, args.dataset_text_field, args.max_length)
            prepare = super()._prepare_dataset
            dataset = twice.prepared(
                dataset, columns, lambda rows: prepare(rows, tokenizer, whole, False, None, dataset_name)
            )
        return super()._prepare_dataset(dataset, tokenizer, args, packing, None, dataset_name)


def _as_dataset(rows: Any, name: str) -> Any:
    """A list of rows as a dataset, also where several have names; a field that some rows lack is None there. What else
    TRL takes stays as it is. UserError for what it does not take, and for no rows. name: the argument."""
    if isinstance(rows, Mapping):
        return {key: _as_dataset(value, f"{name}[{key!r}]") for key, value in rows.items()}
    if isinstance(rows, list | tuple):
        if wrong := [row for row in rows if not isinstance(row, Mapping)]:
            raise UserError(f"{name}: expected rows with fields, got {type(wrong[0]).__name__}.")
        told = [{**row} | ({"persona": [text]} if isinstance(text := row.get("persona"), str) else {}) for row in rows]
        names = dict.fromkeys(field for row in told for field in row)
        rows = Dataset.from_list([{field: row.get(field) for field in names} for row in told])
    if not isinstance(rows, Dataset | IterableDataset | None):
        raise UserError(f"{name}: expected a Dataset or a list of rows, got {type(rows).__name__}.")
    if isinstance(rows, Dataset) and not len(rows):
        raise UserError(f"{name}: expected at least one row, got none.")
    return rows
