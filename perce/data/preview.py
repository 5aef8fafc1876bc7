"""What `python -m perce.preview` prints: counts of all rows, and lengths and prompts of a sample of examples."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.text import Text

from perce.config.commands import PreviewOptions
from perce.config.schema import LossConfig
from perce.data.pairing import PairSource, copied_replies, dated, make_builder, picked_by, without_persona
from perce.data.rows import Example, Examples, Reading, Record, available_splits, load_examples, not_read, what_is_there
from perce.data.sharing import segmented
from perce.data.tokens import personal_words, token_texts
from perce.demo import DATA_DIR
from perce.errors import UserError
from perce.reading.formats import FORMATS
from perce.report.terminal import facts, plain, show, table
from perce.visible import visible

SHOWN = 3000  # characters shown of a part of a prompt
ANY = LossConfig(objective="ce")  # takes rows of every kind


def print_preview(options: PreviewOptions, tokenizer: Any) -> None:
    """UserError if there is nothing to read, or the split does not exist."""
    asked, where = options.preview, options.data.data or str(DATA_DIR)
    present = available_splits(where)
    if asked.split not in present:
        raise UserError(f"--split {asked.split}: {where} has no such split; {what_is_there(where)}.")
    reading = vars(Reading.of(options.data, unanswered=True)) | {"skip_bad_rows": True}
    few = asked.sample if options.data.streaming else None  # a stream is not read to its end
    splits = {
        split: load_examples(where, split, streaming=options.data.streaming, limit=few, **reading) for split in present
    }
    _print_counts(where, few, splits)
    rows = splits[asked.split]
    builder = make_builder(tokenizer, options.data, rows.format, ANY)
    sample = _sample(rows.all, asked.sample, asked.seed)
    source = PairSource(sample, builder, skip_bad_rows=True)
    pairs = [pair for index, example in enumerate(sample) for pair in source.build(index, example)]
    if not pairs:
        raise UserError(source.nothing_left())
    show(_lengths(pairs), "", facts(_told(source, rows, sample, pairs, tokenizer)), *dated(builder), "")
    shown: set[Any] = set()
    for pair in pairs:
        example = sample[pair["example"]]
        if len(shown) < asked.rows and example.source not in shown:
            shown.add(example.source)
            show(*_both_prompts(example, pair, tokenizer))


def _print_counts(where: str, few: int | None, splits: dict[str, Examples]) -> None:
    counts = table("split", "format", "rows", "examples", "users", "personas", "bad rows", "weight 0", numbers=True)
    for split, rows in splits.items():
        users = {example.user_id for example in rows.all} - {None}
        personas = {getattr(example, "persona", ()) for example in rows.all} - {()}
        numbers = rows.rows, len(rows.all), len(users), len(personas), rows.skipped, rows.weightless
        counts.add_row(split, rows.format, *(f"{number:,}" for number in numbers))
    show(f"{where}{f', the first {few:,} examples of each split' if few else ''}", counts, "")
    for name in dict.fromkeys(rows.format for rows in splits.values()):
        entry = FORMATS[name]
        fields = ", ".join(need.replace("|", " or ") for need in entry.needs)
        show(f"{name}: {entry.title}, known by its fields {fields}; examples per row: {entry.gives}")
    reasons = [reason for rows in splits.values() for reason in rows.reasons]
    show(*(f"bad row: {reason}" for reason in reasons), *not_read(next(iter(splits.values())).unread), "")


def _sample(examples: Sequence[Record], count: int, seed: int) -> list[Record]:
    """The examples of whole rows, drawn at random, until there are at least `count`."""
    of_row: dict[str, list[Record]] = {}
    for example in examples:
        of_row.setdefault(example.source, []).append(example)
    sources, drawn = [*of_row], list[Record]()
    random.Random(seed).shuffle(sources)
    for source in sources:
        drawn += of_row[source] if len(drawn) < count else []
    return drawn


def _lengths(pairs: Sequence[dict[str, Any]]) -> Any:
    """Table of the lengths of sequences and their parts, in tokens."""
    lengths = table("tokens", "median", "90 %", "longest", numbers=True)
    whole = np.array([len(pair["input_ids"]) for pair in pairs])
    response = np.array([pair["response_length"] for pair in pairs])
    start, end = np.array([pair.get("persona_span", (0, 0)) for pair in pairs]).T
    parts = {"persona": end - start, "rest of the prompt": whole - response - (end - start), "response": response}
    for name, counts in {**({} if "windows" in pairs[0] else parts), "whole": whole}.items():
        lengths.add_row(name, *(f"{np.quantile(counts, share, method='higher'):,}" for share in (0.5, 0.9, 1)))
    return lengths


def _told(
    source: PairSource, rows: Examples, sample: Sequence[Record], pairs: Sequence[dict[str, Any]], tokenizer: Any
) -> Iterator[tuple[str, str]]:
    limit = f"--max_length {source.builder.max_length:,}"
    yield "sample", f"{len(sample):,} of {len(rows.all):,} examples, from rows drawn at random"
    if picked := picked_by(source.builder):
        yield "shown", picked[0].removeprefix("persona: ")
    if entries := sorted(len(example.persona) for example in sample if isinstance(example, Example)):
        yield "persona entries", f"{entries[len(entries) // 2]:,} (median), {entries[-1]:,} at most"
    if trimmed := sum(pair.get("dropped_passages", 0) > 0 for pair in pairs):
        yield "trimmed", f"{trimmed:,} examples, by {source.dropped_passages:,} persona entries in all, to fit {limit}"
    if source.cut_documents:
        yield "cut", f"{source.cut_documents:,} documents, into pieces that fit {limit}"
    if source.unfit:
        yield "refused", f"{source.unfit:,} examples; the first: {source.reason}"
    for note in without_persona(source.without_persona, source.paired):
        yield "no persona", note
    for note in copied_replies(sum(pair.get("copied", False) for pair in pairs), len(pairs)):
        yield "copied", note
    if "windows" not in pairs[0]:
        ids, units = [pair["input_ids"][:-1] for pair in pairs], [pair["conversation"] for pair in pairs]
        needed, computed = sum(map(len, ids)), sum(len(part.ids) for part in segmented(ids, units, "branches")[0])
        if computed < needed:
            yield "shared", f"{1 - computed / needed:.0%} of the tokens, if batches hold whole conversations"
        if words := personal_words(pairs, tokenizer):
            yield "personal words", words
    if unanswered := sum(isinstance(example, Example) and not example.response for example in sample):
        yield "unanswered", f"{unanswered:,} examples have no response: perce.evaluate writes replies to them"


def _both_prompts(example: Record, pair: dict[str, Any], tokenizer: Any) -> Iterator[Any]:
    """The exact text of both sequences, with marks around the persona and the response."""
    texts = token_texts(pair["input_ids"], tokenizer)
    yield plain(f"{example.source}  {example.user_id or ''}".rstrip(), "bold")
    if "windows" in pair:
        yield _marked("a piece", [(texts, "", "")])
        return
    (start, end), n = pair["persona_span"], pair["response_length"]
    before, persona = (texts[:start], "", ""), (texts[start:end], "persona", "cyan")
    behind = [(texts[end:-n], "", ""), (texts[-n:], "response", "green")]
    if end > start:
        yield _marked("with the persona", [before, persona, *behind])
    yield _marked("without the persona", [before, *behind])


def _marked(title: str, parts: Sequence[tuple[list[str], str, str]]) -> Text:
    """The text of a sequence below its title. parts: of each, the texts of its tokens, its mark and its style."""
    tokens = sum(len(texts) for texts, _, _ in parts)
    whole = plain(f"{title}, {tokens:,} tokens", "dim").append("\n")
    for texts, mark, style in parts:
        text = "".join(texts)
        if len(text) > SHOWN:
            text = f"{text[: SHOWN // 2]} … {len(text) - SHOWN:,} characters … {text[-SHOWN // 2 :]}"
        text = visible(text, keep="\n")
        whole.append(f"⟦{mark}: {text}⟧" if mark else text, style)
    return whole.append("\n")
