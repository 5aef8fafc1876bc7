"""Per-example measurements of a model: teacher-forced losses under three prompts, and a generated reply.

    factual          the user's persona          loss with persona; on personal tokens, on the others
    counterfactual   no persona                  loss without persona
    swapped          another user's persona      a loss no higher than with the right persona means that the model does
                                                 not use it; drawn by the seed, one for all examples of a persona
    generated        the user's persona          ROUGE, METEOR, and whether the reply uses a word of the persona, or, by
                                                 chance, of another user's

For an example without a response, only a reply is generated, and whether it uses the persona is recorded.

Personal tokens are those of marked spans if the data has them, else words that occur in the persona but not in the
conversation (data.words.personal_word_spans: quoted facts; no paraphrase, no style).
"""

import contextlib
import hashlib
import itertools
import math
import random
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from perce.config.commands import EvaluateOptions
from perce.config.questions import EvaluateConfig
from perce.data.pairing import copied_replies
from perce.data.pairs import Pair
from perce.data.rows import Example, text_key
from perce.data.sharing import Sharing, common_tokens
from perce.data.tokens import personal_words
from perce.data.words import WORD, personal_word_spans
from perce.errors import UserError
from perce.measuring.inference import (
    TOKENS_A_FORWARD,
    Subject,
    batches_by_length,
    batches_that_share,
    collated,
)  # fmt: skip
from perce.measuring.metrics import Scorer
from perce.model.passes import measured, per_example, token_statistics
from perce.model.prefill import CACHE_ARGUMENT, prefill
from perce.model.probe import decoder_of, unwrapped
from perce.objectives import OBJECTIVES

PERCE = OBJECTIVES["perce"].weighting()
OF_TOKENS = (
    "tokens", "personal_tokens", "personal_mask", "loss", "loss_without", "loss_personal", "loss_other", "loss_swapped",
    "loss_other_swapped", "loss_of_nobody",
)  # fmt: skip
CHANCE = 0.25  # share of the personal tokens from which on a note says what they are instead
KEPT = 4  # this many tokens with only keys and values count as one computed token, which takes far more memory


@dataclass(frozen=True)
class Item:
    """One example to evaluate."""

    index: int
    key: str
    """Made from the example's texts, numbered if several examples have the same; matches the records of two models."""
    example: Example
    pair: Pair
    swapped: Pair | None
    """The pair with another user's persona; None if none fits."""
    others: tuple[str, ...] = ()
    """What that pair shows of the other user's persona."""


class Written(NamedTuple):
    """A generated reply, without its end of turn."""

    text: str
    is_cut: bool
    """Whether it had not ended after max_new_tokens."""


Group = list[Item]
"""Items whose replies are generated together."""


@dataclass(frozen=True)
class Work:
    items: list[Item]
    batches: list[list[Group]]
    """The losses of a batch are computed together."""
    notes: list[str]

    def longest(self, reply: int) -> int:
        """Tokens of the longest sequence: a pair, or a prompt and a reply of so many tokens."""
        pairs = [pair for item in self.items for pair in (item.pair, item.swapped) if pair is not None]
        prompts = (item.pair.prompt_length + reply for item in self.items)
        return max(*prompts, *(len(pair.input_ids) for pair in pairs))


def make_batches(examples: Sequence[Example], subject: Subject, options: EvaluateOptions) -> Work:
    """Pairs in batches of similar length; conversations that share tokens stay whole. The order depends only on the
    examples and on what is shared, so a resumed run has the same order."""
    items: list[Item] = []
    seen: Counter[str] = Counter()
    partners = other_users(examples, options.evaluate.seed)
    for index, (example, partner) in enumerate(zip(examples, partners, strict=True)):
        if not (pairs := subject.built(example)):
            continue
        pair, swapped, others = pairs[0], None, tuple[str, ...]()
        if partner is not None:
            with contextlib.suppress(UserError):  # a passage of the other user is too long
                other = subject.builder.build(replace(example, persona=examples[partner].persona))
                swapped = None if other.input_ids == pair.input_ids else other  # the prompt shows the same of both
            swapped = swapped and subject.checked(swapped, examples[partner])
            others = tuple(examples[partner].persona[i] for i in swapped.passages) if swapped else ()
        text = text_key(example)
        items.append(Item(index, f"{text}-{seen[text]}", example, pair, swapped, others))
        seen[text] += 1
    if not items:
        raise UserError(subject.source.nothing_left())
    notes = [*subject.left_out, *copied_replies(sum(item.pair.copied for item in items), len(items))]
    if any(item.swapped is None for item in items):
        without = sum(item.swapped is None for item in items)
        notes.append(
            f"{without:,} examples without another's persona that fits: there is only one user or one persona, the "
            "other's is too long, or they have none themselves"
        )
    if words := personal_words((vars(item.pair) for item in items), subject.tokenizer):
        notes.append(f"personal words: {words}")
    notes += personal_by_chance(items)
    size, tokens = options.model.batch_size, TOKENS_A_FORWARD[subject.device.type]
    batches = []
    for rows in batches_that_share([item.pair for item in items], subject.sharing, size, tokens):
        together = [items[row] for row in rows]
        batches.append([*written_together(together, continues(subject.model, subject.sharing), size, tokens)])
    return Work(items, batches, notes)


def personal_by_chance(items: Sequence[Item]) -> list[str]:
    """A note on how many tokens count as personal, and how many would with another user's persona. Histories of the
    same kind share many words; spans that the data marks are not by chance."""
    compared = [item for item in items if item.swapped and item.example.personal_spans is None]
    own = sum(sum(item.pair.personal) for item in compared)
    others = sum(sum(item.swapped.personal) for item in compared if item.swapped)
    if not own:
        return []
    note = f"personal tokens: {own:,}; with another user's persona, {others:,} would count ({others / own:.0%})"
    return [f"{note}: many are words of the subject, not of the user" if others > CHANCE * own else note]


def continues(model: Any, sharing: Sharing) -> bool:
    """Whether replies can be generated from the keys and values of their prompts' common beginning. Sliding windows
    cannot: they would count the padding after that beginning."""
    kept = {type(layer) for layer in DynamicCache(config=unwrapped(model).config).layers}
    return sharing == "branches" and kept == {DynamicLayer}


def written_together(items: Sequence[Item], continued: bool, size: int, tokens: int) -> Iterator[Group]:
    """Groups of at most `size` items and `tokens` tokens.

    If replies can be `continued` from a persona's keys and values and it is at least half of each prompt, the items of
    that persona are grouped, with up to KEPT × tokens. The other items are grouped by length.
    """
    left: list[Item] = []
    of_persona: dict[int, list[Item]] = {}
    for item in items:
        of_persona.setdefault(item.pair.persona, []).append(item)
    for group in of_persona.values():
        longest = max(item.pair.prompt_length for item in group)
        if continued and len(group) > 1 and 2 * group[0].pair.persona_span[1] >= longest:
            yield from _by_length(group, size, KEPT * tokens)
        else:
            left += group
    yield from _by_length(left, size, tokens)


def _by_length(items: Sequence[Item], size: int, tokens: int) -> Iterator[Group]:
    for group in batches_by_length([len(item.pair.input_ids) for item in items], size, tokens):
        yield [items[place] for place in group]


def other_users(examples: Sequence[Example], seed: int) -> list[int | None]:
    """For each example, the index of one of another user, if users are named, and of another persona, or None; drawn
    by the seed. All examples of a persona get the same one, whose tokens they then share too. Examples without a
    persona get none, and are none's."""
    first: dict[Any, int] = {}  # the first example of each persona
    firsts = [first.setdefault((example.user_id, example.persona), index) for index, example in enumerate(examples)]
    order = [index for index in first.values() if examples[index].persona]
    random.Random(seed).shuffle(order)
    personas = _numbered(examples[index].persona for index in order)
    users = _numbered(examples[index].user_id or examples[index].persona for index in order)
    another_user, another_persona = _until_another(users), _until_another(personas)
    partners: dict[int, int | None] = {}
    for place, index in enumerate(order):
        at, around = place, place + len(order)  # after the last place comes the first again
        while at < around:
            here = at % len(order)
            if users[here] == users[place]:
                at += another_user[here]
            elif personas[here] == personas[place]:
                at += another_persona[here]
            else:
                break
        partners[index] = order[at % len(order)] if at < around else None
    return [partners.get(index) for index in firsts]


def _numbered(values: Iterable[Any]) -> list[int]:
    """A number for each value, the same for equal ones."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def _until_another(values: Sequence[int]) -> list[int]:
    """How many places after each the next other value stands, around the end; at least the number of values if none
    does."""
    count = len(values)
    steps = [count] * count
    for place in reversed(range(2 * count)):
        here, after = place % count, (place + 1) % count
        steps[here] = 1 if values[here] != values[after] else steps[after] + 1
    return steps


class Evaluator:
    """Records of batches under one model."""

    def __init__(
        self, model: Any, tokenizer: Any, device: torch.device, options: EvaluateConfig, scorers: Mapping[str, Scorer],
        sharing: Sharing = "none",
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.device, self.options, self.scorers = model, tokenizer, device, options, scorers
        self.sharing: Sharing = sharing
        # generate() takes settings that ours leaves unset from the model's generation config, for example a penalty
        # for repeating the prompt, which penalises using the persona.
        model.generation_config = unwrapped(model).generation_config = GenerationConfig()
        self._pad = tokenizer.pad_token_id or 0
        self._continues = continues(model, sharing)

    def evaluate(self, batch: Sequence[Group], done: Container[int]) -> Iterator[list[dict[str, Any]]]:
        """One record per item, one group after the other, without the examples that are done."""
        left = [group for group in batch if any(item.index not in done for item in group)]
        losses = self.losses([item for group in batch for item in group]) if left else []
        records = {record["example"]: record for record in losses}
        for items in left:
            if self.options.generate:
                # the same for this group in a resumed run
                torch.manual_seed(self.options.seed * 1_000_003 + items[0].index)
                for item, reply in zip(items, self.replies(items), strict=True):
                    records[item.index] |= self.scores(item, reply)
            yield [records[item.index] for item in items if item.index not in done]

    @torch.no_grad()
    def losses(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Records with the sums of −log p over each example's tokens, under the three prompts, the token counts, and a
        digest of which tokens are personal; None for an example without a response. Of an example without a persona
        there is one loss, which is kept apart."""
        sums = self._sums([item for item in items if item.example.response])
        nothing = dict.fromkeys(OF_TOKENS)
        return [
            {
                "example": item.index, "source": item.example.source, "user_id": item.example.user_id, "key": item.key,
                "turn": sum(turn.role == "user" for turn in item.example.turns), **sums.get(item.index, nothing),
            }
            for item in items
        ]  # fmt: skip

    def _sums(self, items: Sequence[Item]) -> dict[int, dict[str, Any]]:
        if not items:
            return {}
        batch = collated([item.pair for item in items], self.sharing, self._pad, self.device)
        statistics = token_statistics(self.model, batch, PERCE)
        swapped = iter(self._swapped_losses([item.swapped for item in items if item.swapped is not None]))
        sums = {}
        for item, tokens in zip(items, statistics, strict=True):
            personal, loss = tokens.personal, -tokens.logp
            if not item.pair.passages:
                sums[item.index] = dict.fromkeys(OF_TOKENS) | {"tokens": len(loss), "loss_of_nobody": loss.sum().item()}
                continue
            others = None if item.swapped is None else next(swapped)
            values = (
                len(loss), int(personal.sum()), hashlib.sha256(bytes(personal.tolist())).hexdigest()[:12],
                loss.sum().item(), -tokens.logp_cf.sum().item(),
                loss[personal].sum().item(), loss[~personal].sum().item(),
                *((None, None) if others is None else (others.sum().item(), others[~personal].sum().item())), None,
            )  # fmt: skip
            sums[item.index] = dict(zip(OF_TOKENS, values, strict=True))
        return sums

    def _swapped_losses(self, pairs: Sequence[Pair]) -> list[torch.Tensor]:
        """(n,) losses of each pair's response tokens."""
        if not pairs:
            return []
        batch = collated(pairs, self.sharing, self._pad, self.device)
        logp = measured(self.model, batch, OBJECTIVES["ce"].weighting(), counterfactual=False).logp
        return [-x for x in per_example(batch, logp)[0]]

    @torch.no_grad()
    def replies(self, items: Sequence[Item]) -> list[Written]:
        """One reply per item."""
        prompts = [item.pair.input_ids[: item.pair.prompt_length] for item in items]
        ends = {item.pair.input_ids[-1] for item in items} | {self.tokenizer.eos_token_id} - {None}
        return [
            Written(
                self.tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids) >= self.options.max_new_tokens
            )
            for ids in self.generated(prompts, ends)
        ]

    def generated(self, prompts: Sequence[list[int]], ends: Set[int]) -> list[list[int]]:
        """Ids of one reply per prompt, up to the first of `ends`. Prompts are padded on the left. A common beginning of
        all prompts that is at least half of the longest is computed once and stands before the padding."""
        width, common = max(map(len, prompts)), self._begins_all(prompts)

        def padded(prompt: list[int], padding: int) -> list[int]:
            return [*prompt[:common], *[padding] * (width - len(prompt)), *prompt[common:]]

        ids = torch.tensor([padded(prompt, self._pad) for prompt in prompts], device=self.device)
        mask = torch.tensor([padded([1] * len(prompt), 0) for prompt in prompts], device=self.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.options.temperature > 0:  # only the temperature: no top-k, no top-p
            sampling = {"do_sample": True, "temperature": self.options.temperature, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            max_new_tokens=self.options.max_new_tokens, eos_token_id=sorted(ends), pad_token_id=self._pad, **sampling
        )
        given = {"input_ids": ids, "attention_mask": mask, "generation_config": config}
        if common:
            decoder: Any = decoder_of(unwrapped(self.model))
            cache = prefill(decoder, ids[:1, :common])
            cache.filled = False  # each prompt continues with its own keys and values
            cache.batch_repeat_interleave(len(prompts))
            given[CACHE_ARGUMENT] = cache
        output = self.model.generate(**given)[:, width:].tolist()
        return [list(itertools.takewhile(lambda token: token not in ends, reply)) for reply in output]

    def _begins_all(self, prompts: Sequence[list[int]]) -> int:
        """Tokens that all prompts begin with, if sharing their keys and values is worthwhile, else 0."""
        first, *others = (np.asarray(prompt[:-1]) for prompt in prompts)
        common = min((common_tokens(first, other) for other in others), default=0)
        return common if self._continues and 2 * common >= max(map(len, prompts)) else 0

    def scores(self, item: Item, reply: Written) -> dict[str, Any]:
        """A reply's overlap with the reference, their lengths, and whether they use a word of the persona in the
        prompt, if there is one, or of another user's."""
        example, said = item.example, reply.text
        persona = [example.persona[i] for i in item.pair.passages]
        conversation = " ".join(turn.content for turn in example.turns)

        def uses(text: str, entries: Sequence[str]) -> float | None:
            return float(bool(personal_word_spans(text, entries, conversation))) if entries else None

        def score(name: str) -> float | None:
            try:
                value = self.scorers[name](said, example.response)
                return None if value is None or math.isnan(value) else float(value)
            except Exception as error:  # a metric of one's own may raise anything
                what = f"{example.source}: the metric {name} failed ({type(error).__name__}: {error})."
                raise RuntimeError(what) from error

        of_reference: dict[str, Any] = dict.fromkeys(("reference_uses_persona", "reference_words", *self.scorers))
        if example.response:
            of_reference |= {"reference_uses_persona": uses(example.response, persona)}
            of_reference |= {"reference_words": len(WORD.findall(example.response))}
            of_reference |= {name: score(name) for name in self.scorers}
        of_reply: dict[str, Any] = {"is_cut": reply.is_cut, "reply_words": len(WORD.findall(said))}
        of_reply |= {"uses_persona": uses(said, persona), "uses_another": uses(said, item.others)}
        return {"reply": said, "reference": example.response, **of_reply, **of_reference}
