"""PerCE in TRL: its SFTTrainer and SFTConfig, for rows in any of its formats with one more column, `persona` (a text or
several).

TRL prepares each row twice, with the persona and without it. The labels mark the persona (data/marked.py), so TRL's own
code cuts, packs and collates. It also computes the mean of the loss and its metrics; our op replaces its head.
"""

from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from transformers import ProcessorMixin

from perce.config.options import option
from perce.config.schema import LossConfig
from perce.data.marked import PersonaCollator
from perce.data.prompt import STYLE, PromptStyle
from perce.data.template import has_system_role, on_one_day
from perce.data.twice import Twice
from perce.errors import UserError, installed
from perce.integrations.trainer import PerceMixin

with installed("trl"):
    from trl import SFTConfig, SFTTrainer
    from trl.data_utils import get_dataset_column_names, is_conversational_from_value, maybe_convert_to_chatml
    from trl.trainer.utils import FusedCausalLMOutput  # noqa: F401  of 1.16, whose compute_loss reads one


@dataclass
class PerceSFTConfig(SFTConfig):
    """trl.SFTConfig with some options of perce.train. UserError for options that would cut the persona off."""

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "prompt"]  # noqa: RUF012
    objective: str = option("perce", "how tokens are weighted: perce, ce, lossce, entce, dft, nextquill")
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
        train_dataset = _as_dataset(train_dataset)
        if isinstance(train_dataset, Dataset) and not len(train_dataset):
            raise UserError("train_dataset: expected at least one row, got none.")
        if "eval_dataset" in kwargs:
            kwargs["eval_dataset"] = _as_dataset(kwargs["eval_dataset"])
        if images := {"image", "images"} & {*(get_dataset_column_names(train_dataset) if train_dataset else [])}:
            raise UserError(f"train_dataset: expected texts only, got a column {images.pop()}.")
        super().__init__(model, args, train_dataset=train_dataset, loss=args.loss, backend=args.backend, **kwargs)
        if args.prompt:  # saved with the model, in a copy: the caller's tokenizer stays as it is
            served: Any = deepcopy(self.processing_class)
            served.init_kwargs[STYLE] = args.prompt
            self.processing_class = served

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


def _as_dataset(rows: Any) -> Any:
    """A list of rows as a dataset; a field that some rows lack is None there."""
    if not isinstance(rows, list):
        return rows
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_list([{name: row.get(name) for name in names} for row in rows])
