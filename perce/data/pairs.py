"""Example → aligned token pair: the factual sequence, and the span of it that is the persona.

    factual         prefix  [ persona block ]  suffix  response  end-of-turn
    counterfactual  prefix                     suffix  response  end-of-turn

The counterfactual sequence *is* the factual one with one contiguous span of ids deleted, so it is not stored itself.
Response token i is the same id at the same response offset in both passes. chat.py renders and tokenises both texts,
and refuses a pair if deleting the span does not give the ids of the text without persona.
"""

import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from perce.config.prompt import PERSONA_FOOTERS, PromptStyle
from perce.data.chat import CUT, THOUGHT, Chat, ChatFormat, refuse_marks
from perce.data.prompt import system_text
from perce.data.retrieval import Retriever
from perce.data.rows import OR_SKIP, Example
from perce.data.words import personal_word_spans, stands_in
from perce.errors import UserError
from perce.reading.fields import given_persona, parse_messages
from perce.reading.readers import BadRow

MOST_CHARACTERS = 16  # per token, more than any text has: a longer history cannot fit, and is not tokenised


@dataclass(frozen=True)
class Pair:
    """One training example in token ids."""

    input_ids: list[int]
    """Factual prompt and response, end-of-turn included, (T,)."""
    persona_span: tuple[int, int]
    """The half-open range of input_ids that the counterfactual sequence lacks; empty without a persona."""
    response_length: int
    """How many of the last ids are the response."""
    personal: list[bool]
    """(response_length,) whether a token is in a marked span or, without marked spans, in a word from the persona."""
    passages: list[int]
    """Indices of the entries of Example.persona that the prompt shows, in the prompt's order."""
    dropped_passages: int
    """Persona entries left out, last-ranked first, so that the sequence fits max_length."""
    conversation: int
    """A key that is equal for the examples of one row and persona, which may share tokens; see sharing.py."""
    persona: int
    """A key that is equal for examples with the same input_ids up to the persona's end, which they may share too.
    Without a persona these are all its input_ids."""
    data_weight: float = 1.0
    """The row's factor for the weights of the response's tokens."""
    copied: bool = False
    """Whether the response stands word for word in a passage that the prompt shows."""

    @property
    def prompt_length(self) -> int:
        return len(self.input_ids) - self.response_length

    def counterfactual_ids(self) -> list[int]:
        return counterfactual_ids(self.input_ids, self.persona_span, self.response_length)


def counterfactual_ids(input_ids: Sequence[int], persona_span: Sequence[int], response_length: int) -> list[int]:
    """input_ids without the persona span; asserts that both end in the identical response."""
    start, end = persona_span
    assert 0 <= start <= end <= len(input_ids) - response_length, "the persona span must lie inside the prompt"
    ids = [*input_ids[:start], *input_ids[end:]]
    assert ids[-response_length:] == list(input_ids[-response_length:]), "both passes must end in the same response ids"
    return ids


def counterfactual_pieces(pair: Mapping[str, Any]) -> list[tuple[list[int], int]]:
    """The counterfactual sequences of a pair, from its columns, each with how many of its last ids it predicts.

    A Pair has one; a DocumentPair has one per window. Asserts that together they predict the response, in order.
    """
    ids, length = pair["input_ids"], pair["response_length"]
    if "windows" in pair:
        pieces = [(list(ids[start:end]), predicted) for start, end, predicted in pair["windows"]]
    else:
        pieces = [(counterfactual_ids(ids, pair["persona_span"], length), length)]
    predicted_ids = [token for piece, predicted in pieces for token in piece[-predicted:]]
    assert predicted_ids == list(ids[-length:]), "both passes must predict the same ids"
    return pieces


def prompt_ids(
    tokenizer: Any,
    persona: str | Sequence[str],
    query: str | Iterable[Mapping[str, str]],
    *,
    chat_template_kwargs: dict[str, Any] | None = None,
    prompt: Mapping[str, str] | None = None,
    special_tokens_in_text: str = "text",
) -> list[int]:
    """Token ids of the prompt that training puts before a reply; pass them to `model.generate`.

    Args:
        tokenizer: the trained model's.
        persona: what is known of the user, best first; [] for nothing. No entry is left out.
        query: the message to reply to, or the conversation as {"role": …, "content": …} messages, "user" last; the
            first may have the role "system", and replaces SYSTEM_MESSAGE.
        chat_template_kwargs, special_tokens_in_text: as in training. prompt: as in training, keys of --prompt; default:
            the style that was saved with the tokenizer.

    Raises:
        UserError (a ValueError): a persona without text, a conversation that training would refuse or that ends with a
            reply, an unknown value of special_tokens_in_text.
    """
    known = given_persona(persona, "persona")
    said = [{"role": "user", "content": query}] if isinstance(query, str) else query
    if isinstance(said, Mapping) or not isinstance(said, Iterable):
        raise UserError(f"query: expected a text or a list of messages, got {query!r}.")
    try:  # checked like rows: the model was not trained on what training refuses
        turns, _ = parse_messages([dict(x) if isinstance(x, Mapping) else x for x in said], "query")
    except BadRow as bad:
        raise UserError(f"{bad}.") from None
    if turns[-1].role != "user":
        raise UserError("query: expected the conversation to end with a user turn, got an assistant turn.")
    refuse_marks(known, [turn.content for turn in turns])
    example = Example(known, turns, "", None, None, "prompt_ids")
    builder = PairBuilder(
        tokenizer, max_length=sys.maxsize, chat_template_kwargs=chat_template_kwargs, prompt=prompt,
        special_tokens_in_text=special_tokens_in_text,
    )  # fmt: skip
    return builder.prompt_ids(example)


def prompt_text(
    persona: str | Sequence[str],
    system: str | None = None,
    *,
    tokenizer: Any = None,
    prompt: Mapping[str, str] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> str:
    """The system message to send to a server of a trained model, which renders and tokenises it as in training.

    If the style's `place` is "user", it is the text to put before the first user message instead, and the system
    message stays as it is.

    Args:
        persona: what is known of the user, best first; [] for nothing.
        system: the conversation's own system message; default: SYSTEM_MESSAGE, or that of `prompt`.
        tokenizer: the trained model's; without it, the text is for tokenizers that the first of PERSONA_FOOTERS fits.
        prompt: as in training, keys of --prompt; default: the style that was saved with the tokenizer.
        chat_template_kwargs: as in training, if the template needs them.

    Raises:
        UserError (a ValueError): a persona without text, or an argument that is not a text.
    """
    entries = given_persona(persona, "persona")
    if not isinstance(system, str | None):
        raise UserError(f"system: expected a text, got {system!r}.")
    style = PromptStyle.of(prompt) if prompt else None
    if tokenizer is None:
        style = style or PromptStyle()
        footer = PERSONA_FOOTERS[0] if style.footer is None else style.footer
    else:
        chat_format = ChatFormat(tokenizer, chat_template_kwargs or {}, style=style)
        style, footer = chat_format.style, chat_format.footer
    block = style.block(entries, footer)
    return block if style.place == "user" else system_text(style, block, system)


class PairBuilder:
    """Turns Examples into Pairs for one tokenizer. Raises UserError for an example that cannot be built.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        max_length: longest factual sequence, in tokens; persona entries are dropped from the end until it fits.
        retriever: chooses which entries of a persona to show, best first; None shows all.
        whole_if_it_fits: a persona is a conversation, the latest part first; if all of it fits, it is shown from its
            beginning, without retrieval.
        chat_template_kwargs: extra variables of the chat template, such as {"enable_thinking": False}.
        prompt: how the prompt words the persona, by keys of config/prompt.py's PromptStyle; default: as saved with
            the tokenizer.
        special_tokens_in_text: how strings in the data that spell control tokens are tokenised: as "text", or as these
            tokens ("allow").
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        retriever: Retriever | None = None,
        whole_if_it_fits: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        prompt: Mapping[str, str] | None = None,
        special_tokens_in_text: str = "text",
    ):
        if special_tokens_in_text not in ("text", "allow"):
            raise UserError(f"special_tokens_in_text: expected text or allow, got {special_tokens_in_text!r}.")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.retriever = retriever
        self.whole_if_it_fits = whole_if_it_fits
        self.chat_format = ChatFormat(
            tokenizer, chat_template_kwargs or {}, style=PromptStyle.of(prompt) if prompt else None,
            allow_control=special_tokens_in_text == "allow",
        )  # fmt: skip

    @property
    def settings(self) -> tuple[Any, ...]:
        """What the pairs depend on besides tokenizer and text."""
        picked = (self.retriever.identity, self.retriever.k) if self.retriever else None
        chat = self.chat_format
        shown = self.max_length, picked, self.whole_if_it_fits
        return *shown, sorted(chat.template_kwargs.items()), chat.style, chat.control is None

    def pairs(self, example: Example) -> list[Pair]:
        return [self.build(example)]

    def build(self, example: Example) -> Pair:
        try:
            chosen, kept, (chat, span) = self._whole(example) or self._chosen(example)
        except UserError as error:
            raise UserError(f"{example.source}: {error}") from None
        ids, prompt, shown = chat.encoded.ids, chat.prompt_length, [example.persona[i] for i in chosen[:kept]]
        pair = Pair(
            input_ids=ids,
            persona_span=span,
            response_length=len(ids) - prompt,
            personal=self._personal(example, shown, chat),
            passages=chosen[:kept],
            dropped_passages=len(chosen) - kept,
            conversation=_digest(repr(example.conversation).encode()),
            persona=_digest(array("q", ids[: span[1]] if shown else ids).tobytes()),
            data_weight=example.data_weight,
            copied=stands_in(example.response, shown),
        )
        pair.counterfactual_ids()
        return pair

    def _whole(self, example: Example) -> tuple[list[int], int, tuple[Chat, tuple[int, int]]] | None:
        """As _chosen, for a conversation that is shown whole, from its beginning; None if it does not fit."""
        count, characters = len(example.persona), sum(map(len, example.persona))
        if not self.whole_if_it_fits or characters > MOST_CHARACTERS * self.max_length:
            return None
        told = self.chat_format.pair(example.turns, example.persona[::-1], example.response)
        fits = len(told[0].encoded.ids) <= self.max_length
        return ([*range(count)][::-1], count, told) if fits else None

    def _chosen(self, example: Example) -> tuple[list[int], int, tuple[Chat, tuple[int, int]]]:
        """The indices of the chosen entries, how many of these fit, and the conversation with the ones that fit."""
        retriever = self.retriever if example.persona else None
        chosen = list(retriever(example) if retriever else range(len(example.persona)))
        kept, chat, span = self._fitting(example, [example.persona[i] for i in chosen])
        return chosen, kept, (chat, span)

    def _fitting(self, example: Example, persona: Sequence[str]) -> tuple[int, Chat, tuple[int, int]]:
        """How many entries of the persona fit max_length, and the conversation with them."""
        kept, too_many = len(persona), len(persona) + 1
        fitting: tuple[int, Chat, tuple[int, int]] | None = None
        if not persona:
            chat, span = self.chat_format.pair(example.turns, (), example.response)
            fitting = (0, chat, span) if len(chat.encoded.ids) <= self.max_length else None
        while kept:
            chat, span = self.chat_format.pair(example.turns, persona[:kept], example.response)
            excess = len(chat.encoded.ids) - self.max_length
            if excess <= 0:
                fitting = kept, chat, span
                if kept + 1 == too_many:
                    break
                kept += 1
            else:
                too_many = kept
                if fitting is not None:
                    break
                kept = self._without(excess, persona[:kept], chat, span)
        if fitting is not None:
            return fitting
        of_first = span[1] - span[0]
        no_room = f"no room for even the first persona entry ({of_first} tokens with the words around it)"
        raise UserError(
            f"query and response take {len(chat.encoded.ids) - of_first} of max_length={self.max_length} tokens (the "
            f"response {len(chat.encoded.ids) - chat.prompt_length}){f', which leaves {no_room}' if persona else ''}. "
            f"Raise --max_length.{OR_SKIP}"
        )

    def _without(self, excess: int, persona: Sequence[str], chat: Chat, span: tuple[int, int]) -> int:
        """About how many entries remain if the last ones, with `excess` tokens together, are dropped; at least one is
        dropped."""
        style, as_text = self.chat_format.style, self.chat_format.as_text
        starts = [place for place, _ in chat.encoded.spans(span[0])[: span[1] - span[0]]]
        begin = chat.text.text.index(as_text(style.block(persona, "")))

        def border(kept: int) -> int:
            return begin + len(as_text(style.block(persona[:kept], "")))

        last = starts[-min(excess, len(starts))]  # where the dropped tokens begin at the latest
        return bisect_right(range(1, len(persona)), last, key=border) or min(len(persona) - 1, 1)

    def prompt_ids(self, example: Example) -> list[int]:
        """The factual prompt of an example, with its whole persona and without its response."""
        chat_format = self.chat_format
        return chat_format.encode(chat_format.prompt(example.turns, chat_format.block(example.persona))).ids

    def _personal(self, example: Example, persona: Sequence[str], chat: Chat) -> list[bool]:
        """Whether each token of the response overlaps a personal span."""
        spans = example.personal_spans if persona else ()
        if spans is None:
            conversation = " ".join(turn.content for turn in example.turns)
            spans = tuple(personal_word_spans(example.response, persona, conversation))
        if not spans:
            return [False] * (len(chat.encoded.ids) - chat.prompt_length)
        reply = example.response.strip()
        thought = THOUGHT.match(reply)
        # `before` counts the response's characters before its answer. `places` says where the answer's characters are
        # in the rendered text, which has CUT marks between them.
        before = len(example.response) - len(example.response.lstrip()) + (thought.end() if thought else 0)
        text, answer = chat.text, len(reply) - (thought.end() if thought else 0)
        places = [text.answer + i for i, x in enumerate(text.text[text.answer : text.tail]) if x != CUT][:answer]
        inside = [(max(start - before, 0), min(end - before, answer)) for start, end in spans]
        marks = [(places[start], places[end - 1] + 1) for start, end in inside if start < end]
        return [
            any(start < mark_end and mark_start < end for mark_start, mark_end in marks) and start < end
            for start, end in chat.encoded.spans(chat.prompt_length)
        ]


def _digest(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data) >> 1  # of 63 bits
