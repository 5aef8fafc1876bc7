"""Example → aligned token pair: the factual sequence, and the span of it that is the persona.

    factual         prefix  [ persona block ]  suffix  response  end-of-turn
    counterfactual  prefix                     suffix  response  end-of-turn

The counterfactual sequence *is* the factual one with one contiguous span of ids deleted; it is never rendered,
tokenised or stored on its own, so response token i is the same id at the same response offset in both passes. The
persona block opens the system message and is followed by one fixed sentence that both prompts keep: a message that were
empty or missing would make many chat templates insert a default system prompt of their own, and poison every contrast.

The pieces are tokenised one by one. Dropping a passage that does not fit then drops whole ids, and no byte-pair merge
can reach across the border of the block.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perce.data.formats import parse_persona, parse_turns
from perce.data.retrieval import Retriever
from perce.data.rows import Example
from perce.data.sources import BadRow
from perce.errors import UserError

PERSONA_HEADER = "About the user:\n"
PERSONA_ITEM = "- {}\n"
PERSONA_FOOTER = "\n"
SYSTEM_MESSAGE = "Write the next message exactly as this user would."

# For tokenizers without a chat template (base models): plain text, the end-of-sequence token closes each reply.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}Message: {{ message.content }}\n"
    "{% else %}Reply: {{ message.content }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}"
)
CONVERSATION_START = "(the conversation begins)"  # for templates that insist on a user turn first

# Stand-ins that mark where the persona and the response go while a chat template is rendered; private-use characters,
# so that no template strips them and no real text contains them.
_PERSONA, _RESPONSE = "\ue0f0persona\ue0f1", "\ue0f0response\ue0f1"

ANCHOR = "\ue0f2"

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
# Words too common to be anybody's own, for the automatic label of personal tokens.
COMMON_WORDS = frozenset(
    """a about after again all also always am an and another any are as at back be because been before being but by can
    come could day did do does doing done down each even ever every few find first for from get give go going good got
    great had has have having he her here him his how i i'm i've if in into is it it's its just keep know last least let
    like little live long look lot love made make many maybe me more most much my need never new next nice no not now of
    off old on once one only or other our out over own people really right same say see she should since so some
    something still such take than thank thanks that that's the their them then there these they thing things think this
    those though three time to today too two until up us use used very want was way we well were what when where which
    while who why will with work would yeah year years yes you you're your""".split()
)


@dataclass(frozen=True)
class Pair:
    """One training example in token ids."""

    input_ids: list[int]
    """Factual prompt and response, end-of-turn included, (T,)."""
    persona_span: tuple[int, int]
    """The half-open range of input_ids that the counterfactual sequence lacks."""
    response_length: int
    """How many of the last ids are the response."""
    personal: list[bool]
    """(response_length,) whether a token belongs to a marked span, or else to a word taken from the persona."""
    passages: list[int]
    """Which entries of Example.persona the prompt shows, in its order."""
    dropped_passages: int
    """Persona entries left out, last-ranked first, so that the sequence fits max_length."""

    def counterfactual_ids(self) -> list[int]:
        return counterfactual_ids(self.input_ids, self.persona_span, self.response_length)


def counterfactual_ids(input_ids: Sequence[int], persona_span: Sequence[int], response_length: int) -> list[int]:
    """input_ids without the persona span; asserts that both end in the identical response."""
    start, end = persona_span
    assert 0 <= start < end <= len(input_ids) - response_length, "the persona span must lie inside the prompt"
    ids = [*input_ids[:start], *input_ids[end:]]
    assert ids[-response_length:] == list(input_ids[-response_length:]), "both passes must end in the same response ids"
    return ids


def counterfactual_pieces(pair: Mapping[str, Any]) -> list[tuple[list[int], int]]:
    """The sequences of the second pass from the columns of a pair, each with how many of its last ids it predicts.

    Of a Pair it is one; of a DocumentPair one a window. Asserts that together they predict the response, in order.
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
    query: str | Sequence[Mapping[str, str]],
    *,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of the prompt that training puts before a reply: what to call `model.generate` with.

    Args:
        tokenizer: the trained model's.
        persona: what is known of the user, best first. None of it is left out.
        query: the message to reply to, or the conversation as {"role": …, "content": …} messages, "user" last.
        chat_template_kwargs: as in training.

    Raises:
        UserError (a ValueError): an empty persona, a conversation that training would refuse or that ends with a reply.
    """
    messages = [{"role": "user", "content": query}] if isinstance(query, str) else [dict(message) for message in query]
    try:  # as rows are read: what training would refuse was not trained on
        known = parse_persona(persona if isinstance(persona, str) else list(persona), "persona")
        turns = parse_turns(messages, "query")
    except BadRow as bad:
        raise UserError(f"{bad}.") from None
    if turns[-1].role != "user":
        raise UserError("query: expected the conversation to end with a user turn, got an assistant turn.")
    example = Example(known, turns, "", None, None, "prompt_ids")
    builder = PairBuilder(tokenizer, max_length=sys.maxsize, chat_template_kwargs=chat_template_kwargs)
    return builder.prompt_ids(example)


class PairBuilder:
    """Turns Examples into Pairs for one tokenizer. Raises UserError for an example that cannot be built.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        max_length: longest factual sequence, in tokens; persona entries are dropped from the end until it fits.
        retriever: chooses which entries of a persona to show, best first, or None for all.
        chat_template_kwargs: extra variables of the chat template, such as {"enable_thinking": False}.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        retriever: Retriever | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.retriever = retriever
        self.template_kwargs = chat_template_kwargs or {}
        self.chat_template = None if tokenizer.chat_template else PLAIN_CHAT_TEMPLATE
        if not tokenizer.chat_template and tokenizer.eos_token is None:
            raise UserError(
                "The tokenizer has neither a chat template nor an end-of-sequence token, so a reply could not be "
                "ended. Set tokenizer.eos_token, save the tokenizer, and pass that directory as --model."
            )
        self.has_system_role = self._accepts([("system", "s"), ("user", "u"), ("assistant", "a")])
        opening = [("system", "s")] if self.has_system_role else []
        self.accepts_reply_first = self._accepts([*opening, ("assistant", "a"), ("user", "u"), ("assistant", "b")])
        self.prepends_space = tokenizer.convert_ids_to_tokens(self._encode_start("a"))[0].startswith(("▁", "Ġ"))
        self._header = self._encode(PERSONA_HEADER)
        self._footer = self._encode(PERSONA_FOOTER)

    @property
    def settings(self) -> tuple[Any, ...]:
        """What the pairs depend on besides tokenizer and text."""
        picked = (self.retriever.identity, self.retriever.k) if self.retriever else None
        return self.max_length, picked, sorted(self.template_kwargs.items())

    def pairs(self, example: Example) -> list[Pair]:
        return [self.build(example)]

    def build(self, example: Example) -> Pair:
        prefix, suffix, space, tail = self._frame(example)
        reply, offsets = self._encode_with_offsets(space + example.response.strip())
        response = [*reply, *self._end_of_turn(tail)]
        chosen = list(self.retriever(example) if self.retriever else range(len(example.persona)))
        persona = [example.persona[i] for i in chosen]
        passages = [self._encode_passage(entry) for entry in persona]
        fixed = len(prefix) + len(self._header) + len(self._footer) + len(suffix) + len(response)
        kept = len(passages)
        while kept and fixed + sum(map(len, passages[:kept])) > self.max_length:
            kept -= 1
        if not kept:
            raise UserError(
                f"{example.source}: query and response take {fixed} of max_length={self.max_length} tokens (the "
                f"response {len(response)}), which leaves no room for even the first persona entry "
                f"({len(passages[0])} tokens). Raise --max_length, or leave such rows out with --skip_bad_rows."
            )
        block = self._block(passages[:kept])
        shift = len(example.response) - len(example.response.lstrip()) - len(space)
        personal = self._personal(example, persona[:kept], offsets, shift)
        pair = Pair(
            input_ids=[*prefix, *block, *suffix, *response],
            persona_span=(len(prefix), len(prefix) + len(block)),
            response_length=len(response),
            personal=[*personal, *[False] * (len(response) - len(personal))],
            passages=chosen[:kept],
            dropped_passages=len(persona) - kept,
        )
        assert pair.counterfactual_ids() == [*prefix, *suffix, *response]
        return pair

    def prompt_ids(self, example: Example) -> list[int]:
        """The factual prompt of an example whose response is still to be written, with its whole persona."""
        prefix, suffix, _, _ = self._frame(example)
        return [*prefix, *self._block([self._encode_passage(entry) for entry in example.persona]), *suffix]

    def _frame(self, example: Example) -> tuple[list[int], list[int], str, str]:
        """Ids before and after the persona block, and the texts next to the response: a space before it, all after it.

        Tokenizers put a space into the word that follows it: one before the reply ("Reply: ") belongs to the reply, or
        the model would learn to begin in a way that it never meets when it writes.
        """
        prefix, suffix, tail = self._render(example)
        before_reply = suffix.rstrip(" ")
        return self._encode_start(prefix), self._encode(before_reply), suffix[len(before_reply) :], tail

    def _encode_passage(self, entry: str) -> list[int]:
        return self._encode(PERSONA_ITEM.format(entry.strip()))

    def _block(self, passages: Sequence[list[int]]) -> list[int]:
        return [*self._header, *(token for passage in passages for token in passage), *self._footer]

    def _encode_start(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _encode(self, text: str) -> list[int]:
        return self._encode_with_offsets(text)[0] if self.prepends_space else self._encode_start(text)

    def _encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text that continues another, and their character offsets in it.

        Tokenizers like Llama 2's begin every text with a space of their own. Behind an anchor, whose ids are dropped
        again, a piece is tokenised as it is in the middle of a text.
        """
        anchor = ANCHOR if self.prepends_space else ""
        encoded = self.tokenizer(anchor + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pieces = [
            (token, (max(start - len(anchor), 0), end - len(anchor)))
            for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if end > len(anchor) or not anchor
        ]
        return [token for token, _ in pieces], [offsets for _, offsets in pieces]

    def _apply_template(self, messages: Sequence[tuple[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            chat_template=self.chat_template,
            **self.template_kwargs,
        )

    def _accepts(self, messages: Sequence[tuple[str, str]]) -> bool:
        """Whether the chat template renders all of these messages: some raise from Jinja, others leave one out."""
        from jinja2.exceptions import TemplateError

        marked = [(role, f"{_PERSONA}{content}") for role, content in messages]
        try:
            text = self._apply_template(marked)
        except TemplateError:
            return False
        return all(content in text for _, content in marked)

    def _render(self, example: Example) -> tuple[str, str, str]:
        """The text before the persona block, between it and the response, and after the response."""
        system = _PERSONA + SYSTEM_MESSAGE
        turns = [(turn.role, turn.content) for turn in example.turns]
        if turns[0][0] != "user" and not self.accepts_reply_first:
            turns.insert(0, ("user", CONVERSATION_START))
        if self.has_system_role:
            turns.insert(0, ("system", system))
        elif turns[0][0] == "user":
            turns[0] = ("user", f"{system}\n\n{turns[0][1]}")
        else:
            turns.insert(0, ("user", system))
        text = self._apply_template([*turns, ("assistant", _RESPONSE)])
        if text.count(_PERSONA) != 1 or text.count(_RESPONSE) != 1:
            raise UserError(
                f"{example.source}: the chat template of {self.tokenizer.name_or_path!r} repeats or drops the system "
                "message or the reply, so the two passes could not be aligned. Give the tokenizer another chat "
                "template."
            )
        prompt, tail = text.split(_RESPONSE)
        prefix, suffix = prompt.split(_PERSONA)
        return prefix, suffix, tail

    def _end_of_turn(self, tail: str) -> list[int]:
        """The ids that end a reply: what the template puts after it, up to and with the first special token."""
        ids = self._encode(tail)
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        for position, token in enumerate(ids):
            if token in special or token == self.tokenizer.eos_token_id:
                return ids[: position + 1]
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    def _personal(
        self, example: Example, persona: Sequence[str], offsets: Sequence[tuple[int, int]], shift: int
    ) -> list[bool]:
        """Whether each token overlaps a personal span; offset + shift is the place in example.response."""
        spans = example.personal_spans
        if spans is None:
            conversation = " ".join(turn.content for turn in example.turns)
            spans = tuple(personal_word_spans(example.response, persona, conversation))
        return [
            any(start + shift < span_end and span_start < end + shift for span_start, span_end in spans) and start < end
            for start, end in offsets
        ]


def personal_word_spans(response: str, persona: Sequence[str], conversation: str) -> list[tuple[int, int]]:
    """Character spans of a response's words that are in the persona but not in the conversation; never common words.

    The automatic label of personal tokens for data without marked spans: it finds quoted facts, and misses paraphrase
    and style.
    """
    persona_words = {word.lower() for entry in persona for word in WORD.findall(entry)}
    said = {word.lower() for word in WORD.findall(conversation)}
    own = {word for word in persona_words - said - COMMON_WORDS if len(word) > 2 or word.isdigit()}
    return [match.span() for match in WORD.finditer(response) if match.group().lower() in own]
