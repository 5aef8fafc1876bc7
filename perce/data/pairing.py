"""Chooses the builder of pairs for a format, and builds pairs while counting what is left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perce.config.schema import DataConfig, LossConfig, refuse_idle
from perce.data.documents import DocumentBuilder
from perce.data.pairs import Pair, PairBuilder
from perce.data.retrieval import make_retriever
from perce.data.rows import OR_SKIP, Examples, Record
from perce.data.template import DAY
from perce.errors import UserError
from perce.objectives import DOCUMENTS, OBJECTIVES, PERSONAS
from perce.reading.formats import FORMATS

PERCE = LossConfig()
# Options that have no effect on rows of the other kind.
OF_PERSONAS = (
    "persona_markers", "retriever", "retriever_model", "retrieve_k", "chat_template_kwargs", "prompt", "share",
)  # fmt: skip
OF_DOCUMENTS = ("short_context", "short_stride")
Builder = PairBuilder | DocumentBuilder


def make_builder(tokenizer: Any, config: DataConfig, format: str, loss: LossConfig = PERCE) -> Builder:
    """The builder of pairs for rows of this format; UserError if the objective or an option needs another kind."""
    kind = DOCUMENTS if FORMATS[format].documents else PERSONAS
    if kind not in loss.entry.takes:
        *most, last = (name for name, entry in OBJECTIVES.items() if kind in entry.takes)
        other = "rows with persona, query and response" if kind == DOCUMENTS else "documents, rows like {'text': …}"
        raise UserError(
            f"objective {loss.objective}: expected {loss.entry.takes[0]}, got {kind} (format "
            f"{format}). Choose {', '.join(most)} or {last} as --objective, or give {other} (--columns OURS=THEIRS "
            "renames fields)."
        )
    if kind == DOCUMENTS:
        refuse_idle(config, OF_PERSONAS, f"for {kind}")
        return DocumentBuilder(
            tokenizer, max_length=config.max_length, short_context=loss.short_context, short_stride=loss.short_stride
        )
    refuse_idle(loss, OF_DOCUMENTS, f"for {kind}")
    history = FORMATS[format].history
    return PairBuilder(
        tokenizer,
        max_length=config.max_length,
        retriever=make_retriever(config) if history != "none" else None,
        whole_if_it_fits=history == "conversation",
        chat_template_kwargs=config.template_kwargs(),
        prompt=config.prompt_style(),
        special_tokens_in_text=config.special_tokens_in_text,
    )


def make_persona_builder(tokenizer: Any, config: DataConfig, format: str) -> PairBuilder:
    """make_builder for commands that measure the effect of personas; UserError for documents, which have none."""
    if FORMATS[format].documents:
        raise UserError("Expected rows with a persona, got documents (format text), which have no persona to omit.")
    builder = make_builder(tokenizer, config, format)
    assert isinstance(builder, PairBuilder)
    return builder


def picked_by(builder: Builder) -> list[str]:
    """A note on how passages are retrieved; [] if none are."""
    retriever = builder.retriever if isinstance(builder, PairBuilder) else None
    return [f"persona: {retriever.description}"] if retriever else []


def dated(builder: Builder) -> list[str]:
    """A note on a chat template that writes the date; [] for others."""
    now = isinstance(builder, PairBuilder) and builder.chat_format.writes_the_date()
    return [f"a date that the chat template writes is {DAY:%d %B %Y} here, on every day"] if now else []


def skipped_rows(rows: Examples) -> list[str]:
    notes = [f"{rows.skipped:,} rows skipped; the first: {rows.reasons[0]}"] if rows.skipped else []
    return notes + [f"{rows.weightless:,} replies of weight 0 left out"] * bool(rows.weightless)


def copied_replies(copied: int, replies: int) -> list[str]:
    """A note if so many of these replies stand in what their prompts show of the persona."""
    few = f"{copied:,} of {replies:,} replies stand word for word in their persona: they are copied, not predicted"
    return [f"{few}. If it is the row's own text that stands there, take it out"] * bool(copied)


def without_persona(count: int, examples: int) -> list[str]:
    """A note if so many of these examples have no persona."""
    few = f"{count:,} of {examples:,} examples have no persona: both passes are the same, and PIR is 0"
    return [few] * bool(count)


@dataclass
class PairSource:
    """Examples to pair, with their builder and counts of what was left out."""

    examples: Sequence[Record] | Examples
    builder: Builder
    skip_bad_rows: bool
    prefix: str = "training: "
    """What notes on examples begin with."""
    paired: int = 0
    unfit: int = 0
    dropped_passages: int = 0
    without_persona: int = 0
    cut_documents: int = 0
    reason: str = ""
    """Why the first unfit example was left out."""
    _first_pass: tuple[list[str], list[str]] | None = None

    def build(self, index: int, example: Record) -> list[dict[str, Any]]:
        """The columns of the example's pairs."""
        return [vars(pair) | {"example": index} for pair in self.built(example)]

    def built(self, example: Record) -> list[Any]:
        """The example's pairs; [] if it cannot be built and may be skipped."""
        pairs: list[Any]
        try:
            pairs = self.builder.pairs(example)  # type: ignore[arg-type,assignment]  # of the builder's kind
        except UserError as error:
            if not self.skip_bad_rows:
                raise
            self.unfit += 1
            self.reason = self.reason or str(error).removesuffix(OR_SKIP)
            return []
        self.dropped_passages += sum(getattr(pair, "dropped_passages", 0) for pair in pairs)
        self.without_persona += sum(isinstance(pair, Pair) and not pair.passages for pair in pairs)
        self.paired += 1
        self.cut_documents += len(pairs) > 1
        return pairs

    def end_of_pass(self) -> None:
        if self._first_pass is None:
            self._first_pass = self._counted()

    def notes(self, of_share: str = "") -> list[str]:
        """What was left out so far, in words; from the end of a stream's first pass on, only what that pass left out.

        `of_share` is appended to the counts of built examples, which are those of one process; every process counts
        all rows.
        """
        rows, examples = self._first_pass or self._counted()
        return [*rows, *(note + of_share for note in examples)]

    def _counted(self) -> tuple[list[str], list[str]]:
        """(notes on rows, notes on the examples that were built)."""
        rows = skipped_rows(self.examples) if isinstance(self.examples, Examples) else []
        limit, notes = f"--max_length {self.builder.max_length}", []
        if self.dropped_passages:
            notes.append(f"{self.prefix}{self.dropped_passages:,} persona entries dropped to fit {limit}")
        notes += [self.prefix + note for note in without_persona(self.without_persona, self.paired)]
        if self.cut_documents:
            notes.append(f"{self.prefix}{self.cut_documents:,} documents longer than {limit} cut into pieces")
        if self.unfit:
            notes.append(f"{self.prefix}{self.unfit:,} examples skipped, the first: {self.reason}")
        return rows, notes

    def nothing_left(self) -> str:
        return f"No example is left: none can be used. The first: {self.reason}"
