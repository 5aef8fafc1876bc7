"""Per-example measurements of a model: teacher-forced losses under three prompts, and a generated reply.

    factual          the user's persona          loss with persona; on personal tokens, on the others
    counterfactual   no persona                  loss without persona
    swapped          another user's persona      if it does no worse than the right one, the persona is not used
    generated        the user's persona          ROUGE, METEOR, and whether the reply uses a word of the persona

Personal tokens are those of marked spans where the data has them, else words that occur in the persona but not in the
conversation (data.pairs.personal_word_spans: quoted facts; no paraphrase, no style).
"""

import contextlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig

from perce.config.commands import EvaluateOptions
from perce.config.schema import EvaluateConfig
from perce.data.batch import collate
from perce.data.pairs import Pair, PairBuilder, personal_word_spans
from perce.data.rows import Example, text_key
from perce.errors import UserError
from perce.measuring.inference import TOKENS_A_FORWARD, batches_by_length, on_device
from perce.measuring.metrics import Scorer
from perce.model.passes import measured, per_example, token_statistics
from perce.model.probe import unwrapped
from perce.objectives import OBJECTIVES

PERCE = OBJECTIVES["perce"].weighting()


@dataclass(frozen=True)
class Item:
    """One example to evaluate; `swapped` is its pair under another user's persona, None where there is nobody else."""

    index: int
    key: str
    """Of the texts, numbered where several examples have the same: what makes records of two models pairs."""
    example: Example
    pair: Pair
    swapped: Pair | None


@dataclass(frozen=True)
class Work:
    batches: list[list[Item]]
    notes: list[str]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        pairs = (pair for batch in self.batches for item in batch for pair in (item.pair, item.swapped))
        return max(len(pair.input_ids) for pair in pairs if pair is not None)


def make_batches(
    examples: Sequence[Example], builder: PairBuilder, options: EvaluateOptions, device: torch.device
) -> Work:
    """Pairs in batches of similar length. The order depends on nothing but the examples: a second run has the same."""
    notes, items = [], []
    seen: Counter[str] = Counter()
    partners = other_users(examples, options.evaluate.seed)
    for index, (example, partner) in enumerate(zip(examples, partners, strict=True)):
        try:
            pair = builder.build(example)
        except UserError:
            if not options.data.skip_bad_rows:
                raise
            continue
        swapped = None
        if partner is not None:
            with contextlib.suppress(UserError):  # a passage of the other's that does not fit
                swapped = builder.build(replace(example, persona=examples[partner].persona))
        text = text_key(example)
        items.append(Item(index, f"{text}-{seen[text]}", example, pair, swapped))
        seen[text] += 1
    if not items:
        raise UserError("No example is left to evaluate: all were skipped as longer than --max_length.")
    if len(items) < len(examples):
        notes.append(f"{len(examples) - len(items):,} examples skipped, longer than --max_length {builder.max_length}")
    if any(item.swapped is None for item in items):
        count = sum(item.swapped is None for item in items)
        notes.append(
            f"{count:,} examples without another's persona that fits: there is one user only, or it is too long"
        )
    lengths = [len(item.pair.input_ids) for item in items]
    tokens = TOKENS_A_FORWARD[device.type]
    batches = [[items[i] for i in rows] for rows in batches_by_length(lengths, options.model.batch_size, tokens)]
    return Work(batches, notes)


def other_users(examples: Sequence[Example], seed: int) -> list[int | None]:
    """For each example one of another user (another persona where users are not named), or None; drawn by the seed."""
    keys = [example.user_id or example.persona for example in examples]
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    place = {index: at for at, index in enumerate(order)}
    partners: list[int | None] = []
    for index, key in enumerate(keys):
        following = (order[(place[index] + step) % len(order)] for step in range(1, len(order)))
        partners.append(next((other for other in following if keys[other] != key), None))
    return partners


class Evaluator:
    """Records of batches under one model."""

    def __init__(
        self, model: Any, tokenizer: Any, device: torch.device, options: EvaluateConfig, scorers: Mapping[str, Scorer]
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.device, self.options, self.scorers = model, tokenizer, device, options, scorers
        # Whatever ours leaves unset, generate() would take from the model's: penalties of repeating the prompt, say,
        # which are penalties of using the persona.
        model.generation_config = unwrapped(model).generation_config = GenerationConfig()
        self._pad = tokenizer.pad_token_id or 0

    def evaluate(self, items: Sequence[Item], number: int) -> list[dict[str, Any]]:
        """One record an item. `number` seeds the sampling: a batch that is evaluated again gets the same replies."""
        records = self.losses(items)
        if self.options.generate:
            torch.manual_seed(self.options.seed * 1_000_003 + number)
            replies = self.replies([item.pair.input_ids[: -item.pair.response_length] for item in items], items)
            for item, record, reply in zip(items, records, replies, strict=True):
                record |= self.scores(item, reply)
        return records

    @torch.no_grad()
    def losses(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Sums of −log p over each example's tokens, under the three prompts, and their counts."""
        batch = on_device(collate([vars(item.pair) for item in items], self._pad), self.device)
        statistics = token_statistics(self.model, batch, PERCE)
        swapped = iter(self._swapped_losses([item.swapped for item in items if item.swapped is not None]))
        records = []
        for item, tokens in zip(items, statistics, strict=True):
            personal = tokens.personal
            records.append(
                {
                    "example": item.index, "source": item.example.source, "user_id": item.example.user_id,
                    "key": item.key, "tokens": len(tokens.logp), "personal_tokens": int(personal.sum()),
                    "loss": -tokens.logp.sum().item(), "loss_without": -tokens.logp_cf.sum().item(),
                    "loss_personal": -tokens.logp[personal].sum().item(),
                    "loss_other": -tokens.logp[~personal].sum().item(),
                    "loss_swapped": None if item.swapped is None else next(swapped),
                }
            )  # fmt: skip
        return records

    def _swapped_losses(self, pairs: Sequence[Pair]) -> list[float]:
        if not pairs:
            return []
        batch = on_device(collate([vars(pair) for pair in pairs], self._pad), self.device)
        logp = measured(self.model, batch, OBJECTIVES["ce"].weighting(), counterfactual=False).logp
        return [-x.sum().item() for x in per_example(batch, logp)[0]]

    @torch.no_grad()
    def replies(self, prompts: Sequence[list[int]], items: Sequence[Item]) -> list[str]:
        """One reply a prompt, padded on the left, without its end-of-turn."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        ends = {item.pair.input_ids[-1] for item in items} | {self.tokenizer.eos_token_id} - {None}
        sampling: dict[str, Any] = {"do_sample": False}
        if self.options.temperature > 0:  # nothing but the temperature: no top-k, no top-p
            sampling = {"do_sample": True, "temperature": self.options.temperature, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            max_new_tokens=self.options.max_new_tokens, eos_token_id=sorted(ends), pad_token_id=self._pad, **sampling
        )
        output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        written = []
        for reply in output:
            end = next((place for place, token in enumerate(reply) if token in ends), len(reply))
            written.append(self.tokenizer.decode(reply[:end], skip_special_tokens=True).strip())
        return written

    def scores(self, item: Item, reply: str) -> dict[str, Any]:
        """Of a reply: overlap with what the user wrote, and whether either uses a word of the persona in the prompt."""
        example = item.example
        persona = [example.persona[i] for i in item.pair.passages]
        conversation = " ".join(turn.content for turn in example.turns)
        uses = [bool(personal_word_spans(text, persona, conversation)) for text in (reply, example.response)]
        return {
            "reply": reply, "reference": example.response, "uses_persona": float(uses[0]),
            "reference_uses_persona": float(uses[1]),
            **{name: score(reply, example.response) for name, score in self.scorers.items()},
        }  # fmt: skip
