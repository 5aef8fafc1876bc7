"""Records of scored examples: PerContrast's statistics, token by token."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from tqdm import tqdm

from perce.config.commands import ScoreOptions
from perce.data.pairs import Pair
from perce.data.rows import Example
from perce.data.tokens import token_texts
from perce.errors import UserError
from perce.measuring.inference import TOKENS_A_FORWARD, Subject, batches_that_share, collated
from perce.model.passes import TokenStatistics, token_statistics
from perce.model.positions import settle_lengths
from perce.report.heatmap import ScoredToken

FORM = 2  # version of the records: raise it when their fields change
OF_TOKENS = ("response_tokens", "logp", "logp_cf", "pir", "signal", "weight", "entropy", "persona_word")
"""What is measured of each response token; the last two with --labels."""
WINDOW = 64  # examples that are sorted by length together: records stay in order, with little padding


def scored(
    subject: Subject, done: Sequence[dict[str, Any]], options: ScoreOptions
) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
    """Records of the examples after those that are `done`, a window at a time, in order."""
    settle_lengths(subject.model, lambda: _longest(subject, options))
    total = options.examples.limit if options.data.streaming else len(subject.examples.all)
    numbered = enumerate(tqdm(subject.examples, total=total, desc="scoring", unit="example", leave=False))
    seen = 0
    while window := list(islice(numbered, WINDOW)):
        built: list[tuple[int, Any, Pair]] = []
        for index, example in window:
            built += [(index, example, pair) for pair in subject.built(example)]
        # The file has one record per example that fits, in order. Examples with a record are not scored again.
        known = done[seen : seen + len(built)]
        for before, (index, example, pair) in zip(known, built, strict=False):
            if any(before.get(name) != value for name, value in given(index, example, pair).items()):
                raise UserError(
                    f"--jsonl {options.score.jsonl}: {example.source} is not the example that was scored before; the "
                    "data or the tokenizer has changed. Choose another file, or delete it."
                )
            for name in OF_TOKENS:
                if name in before and len(before[name]) != pair.response_length:
                    raise UserError(
                        f"--jsonl {options.score.jsonl}: {example.source} has {pair.response_length} response tokens, "
                        f"and {len(before[name])} values of {name}. The file is damaged: delete it, and score again."
                    )
        fresh = built[len(known) :]
        seen += len(built)
        if fresh:
            yield score_window(fresh, subject, options)
    if len(done) > seen:
        raise UserError(
            f"--jsonl {options.score.jsonl}: has records of {len(done):,} examples, and the data only {seen:,}; it has "
            "changed. Choose another file, or delete it."
        )


def _longest(subject: Subject, options: ScoreOptions) -> int:
    """Tokens of the longest example; for a stream, the most that an example may have."""
    builder: Any = subject.builder
    longest = 0
    if options.data.streaming:
        return builder.max_length
    for example in subject.examples.all:
        with contextlib.suppress(UserError):  # the error is raised when the example is scored
            longest = max(longest, len(builder.build(example).input_ids))
    return longest


def score_window(
    built: Sequence[tuple[int, Example, Pair]], subject: Subject, options: ScoreOptions
) -> list[dict[str, Any]]:  # fmt: skip
    """The records of (index, example, pair) triples, in their order."""
    model, builder, device = subject.model, subject.builder, subject.device
    score, pad_id = options.score, builder.tokenizer.pad_token_id or 0
    weighting = score.weighting
    pairs, sharing, most = [pair for _, _, pair in built], subject.sharing, TOKENS_A_FORWARD[device.type]
    records: dict[int, dict[str, Any]] = {}
    for rows in batches_that_share(pairs, sharing, options.model.batch_size, most):
        batch = collated([pairs[row] for row in rows], sharing, pad_id, device)
        statistics = token_statistics(model, batch, weighting, entropy=score.labels)
        for row, tokens in zip(rows, statistics, strict=True):
            records[row] = record(*built[row], tokens, builder.tokenizer)
            if score.labels and tokens.entropy is not None:
                unmarked = builder.build(replace(built[row][1], personal_spans=None))
                records[row] |= {"entropy": tokens.entropy.tolist(), "persona_word": unmarked.personal}
    return [records[row] for row in range(len(built))]


def given(index: int, example: Example, pair: Pair) -> dict[str, Any]:
    """What a record has from the data: prompts and response as ids, labels, and the row's weight."""
    n = pair.response_length
    return {
        "example": index, "source": example.source, "user_id": example.user_id,
        "passages": pair.passages, "marked": example.personal_spans is not None,
        "prompt_ids": pair.input_ids[:-n], "prompt_cf_ids": pair.counterfactual_ids()[:-n],
        "response_ids": pair.input_ids[-n:], "personal": pair.personal, "data_weight": pair.data_weight,
    }  # fmt: skip


def record(index: int, example: Example, pair: Pair, tokens: TokenStatistics, tokenizer: Any) -> dict[str, Any]:
    """One line of the JSON Lines file: what is given, and statistics per response token."""
    return given(index, example, pair) | {
        "response_tokens": token_texts(pair.input_ids[-pair.response_length :], tokenizer),
        "logp": tokens.logp.tolist(), "logp_cf": tokens.logp_cf.tolist(), "pir": tokens.pir.tolist(),
        "signal": tokens.signal.tolist(), "weight": tokens.token_weight.tolist(),
    }  # fmt: skip


def scored_tokens(statistics: TokenStatistics, tokenizer: Any) -> list[ScoredToken]:
    texts = token_texts(statistics.target.tolist(), tokenizer)
    columns = (statistics.logp, statistics.logp_cf, statistics.signal, statistics.token_weight)
    return [ScoredToken(*row) for row in zip(texts, *(column.tolist() for column in columns), strict=True)]
