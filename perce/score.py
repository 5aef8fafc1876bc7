"""python -m perce.score: which tokens of a reply are personal, by PerContrast, for any model and data.

examples → pairs → both passes → records (JSON lines) → heat maps, histogram, means, token identification
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from perce.config import DataConfig, InferenceConfig, ScoreConfig, SplitConfig, is_training_option
from perce.errors import UserError
from perce.options import Options

WINDOW = 64  # examples that are sorted by length together: records stay in order, and little is padded

OPTIONS = Options(
    prog="python -m perce.score",
    description="Score every token of the replies with PerContrast: its log-probability with the persona and without "
    "it. Without arguments: the default model on the built-in test examples, in the terminal.",
    sections={"model": InferenceConfig, "data": DataConfig, "examples": SplitConfig, "score": ScoreConfig},
    passes_over=is_training_option,
)


@dataclass(frozen=True)
class Config:
    model: InferenceConfig
    data: DataConfig
    examples: SplitConfig
    score: ScoreConfig


main = OPTIONS.command(Config, lambda config: run(config))


def run(config: Config) -> None:
    """Score the examples, write what was asked for, and print a summary."""
    from perce.environment import quiet_libraries
    from perce.files import claim_files

    quiet_libraries()
    claim_files([config.score.output, config.score.summary])
    from perce.dataset import make_persona_builder
    from perce.identification import identify
    from perce.inference import load, load_split, model_facts, split_seed
    from perce.records import RecordFile
    from perce.score_report import print_summary, print_tokens, write_report, write_summary

    seed = split_seed(config.examples, config.model.model)
    examples, split = load_split(config.data, config.examples, seed)
    model, tokenizer, device = load(config.model)
    builder = make_persona_builder(tokenizer, config.data, _format_of(examples))
    score = config.score
    file = RecordFile(
        Path(score.jsonl).expanduser() if score.jsonl else None,
        {
            "command": "score", **model_facts(config.model, model), "split": split,
            "sample": config.examples.sample, "split_seed": seed, "labels": score.labels,
            "clip_min": score.clip_min, "clip_max": score.clip_max, "contrast": score.contrast, **asdict(config.data),
        },
    )  # fmt: skip
    shown: list[Any] = list(islice(examples, max(score.shown, score.terminal, 1)))
    print_tokens(file.records[: score.terminal], config)
    for records in scored(examples, file.records[:], model, builder, device, config):
        print_tokens(records[: max(score.terminal - len(file.records), 0)], config)
        file.append(records)
    limit = config.examples.limit
    records = [record for record in file.records if limit is None or record["example"] < limit]
    if not records:
        raise UserError("No example is left to score: all were skipped as longer than --max_length.")
    found = identify(records) if score.labels else None
    print_summary(records, found, config)
    if score.summary:
        write_summary(Path(score.summary).expanduser(), records, found, config)
    if score.output:
        write_report(Path(score.output).expanduser(), records, shown, found, config, split)
    for path in filter(None, (score.output, score.jsonl, score.summary)):
        print(f"written  {path}")


def _format_of(examples: Any) -> str:
    """The rows' format, which a stream knows once its first row has been read."""
    next(iter(examples))
    return examples.format


def scored(
    examples: Iterable[Any], done: Sequence[dict[str, Any]], model: Any, builder: Any, device: Any, config: Config
) -> Iterator[list[dict[str, Any]]]:
    """Records of the examples after those that are `done`, a window at a time, in order."""
    from tqdm import tqdm

    total = len(examples.examples) if not config.data.streaming else config.examples.limit  # type: ignore[attr-defined]
    numbered = enumerate(tqdm(examples, total=total, desc="scoring", unit="example", leave=False))
    seen = 0
    while window := list(islice(numbered, WINDOW)):
        built = []
        for index, example in window:
            try:
                built.append((index, example, builder.build(example)))
            except UserError:
                if not config.data.skip_bad_rows:
                    raise
        # Records hold the examples that fit, in order: those of an earlier run are as many, and are not scored again.
        known = done[seen : seen + len(built)]
        for before, (_, example, pair) in zip(known, built, strict=False):
            if before["prompt_ids"] + before["response_ids"] != pair.input_ids:
                raise UserError(
                    f"--jsonl {config.score.jsonl}: {example.source} is not what was scored before; the data or the "
                    "tokenizer has changed. Choose another file, or delete it."
                )
        fresh = built[len(known) :]
        seen += len(built)
        if fresh:
            yield score_window(fresh, model, builder, device, config)


def score_window(
    built: Sequence[tuple[int, Any, Any]], model: Any, builder: Any, device: Any, config: Config
) -> list[dict[str, Any]]:
    """The records of (index, example, pair) triples, in their order."""
    from perce.batch import collate
    from perce.inference import TOKENS_A_FORWARD, batches_by_length, on_device
    from perce.scoring import token_entropies, token_statistics

    score, pad_id = config.score, builder.tokenizer.pad_token_id or 0
    clip: dict[str, Any] = {"clip_min": score.clip_min, "clip_max": score.clip_max, "contrast": score.contrast}
    lengths = [len(pair.input_ids) for _, _, pair in built]
    records: dict[int, dict[str, Any]] = {}
    for rows in batches_by_length(lengths, config.model.batch_size, TOKENS_A_FORWARD[device.type]):
        batch = on_device(collate([vars(built[row][2]) for row in rows], pad_id), device)
        entropies = token_entropies(model, batch) if score.labels else [None] * len(rows)
        for row, tokens, entropy in zip(rows, token_statistics(model, batch, **clip), entropies, strict=True):
            records[row] = record(*built[row], tokens, builder.tokenizer)
            if entropy is not None:
                unmarked = builder.build(replace(built[row][1], personal_spans=None))
                records[row] |= {"entropy": entropy.tolist(), "persona_word": unmarked.personal}
    return [records[row] for row in range(len(built))]


def record(index: int, example: Any, pair: Any, tokens: Any, tokenizer: Any) -> dict[str, Any]:
    """One line of the JSONL: prompts and response in ids, and the response's statistics token by token."""
    from perce.summary import token_texts

    n = pair.response_length
    return {
        "example": index, "source": example.source, "user_id": example.user_id,
        "passages": pair.passages, "marked": example.personal_spans is not None,
        "prompt_ids": pair.input_ids[:-n], "prompt_cf_ids": pair.counterfactual_ids()[:-n],
        "response_ids": pair.input_ids[-n:], "response_tokens": token_texts(pair.input_ids[-n:], tokenizer),
        "logp": tokens.logp.tolist(), "logp_cf": tokens.logp_cf.tolist(), "pir": tokens.pir.tolist(),
        "weight": tokens.token_weight.tolist(), "personal": pair.personal,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
