"""Persona and conversation → one text, rendered by the chat template, and its ids, tokenised as a chat server does.

    <|im_start|>system⏎[About the user:⏎- I keep bees.⏎⏎]Write the …<|im_end|>⏎ … assistant⏎ ¦ With the bees.<|im_end|>
                       persona block                                          prompt ends   reply, end of turn

The template renders the whole conversation, and the prompt that a server would send, up to the generation prompt: that
prompt is the one trained with. The whole text is tokenised at once and then divided by characters, so that trained
tokens are those of the whole text. A token across the end of the prompt or a border of the persona is an error. The
persona stands at the beginning of the system message, and the text after it is in both prompts. If a system message
were empty or missing, many chat templates would insert a default of their own, which would spoil every contrast.

Texts in the data may spell control tokens, such as <|im_end|>. They are tokenised as text: such a string is cut in two
before it is tokenised, so that it does not become a control token. CUT marks the place, also in the rendered text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product, takewhile
from typing import Any

from perce.config.prompt import PERSONA_FOOTERS, PromptStyle
from perce.data.prompt import CONVERSATION_START, PLAIN_CHAT_TEMPLATE, tell
from perce.data.template import DAY, ChatTemplate
from perce.data.tokens import Encoded, Line, Piece, Tokens
from perce.errors import UserError, first_line
from perce.hub import check_tokenizer
from perce.reading.fields import Turn
from perce.visible import shortened

# Placeholders for the persona and the reply, and marks in texts. They are private-use characters, which no template
# strips and no real text contains.
_PERSONA, _REPLY = "\ue0f0persona\ue0f1", "\ue0f0reply\ue0f1"
ANCHOR, CUT = "\ue0f2", "\ue0f3"
MARKS = "\ue0f0\ue0f1\ue0f2\ue0f3"
_CUT_MARK = Line((), (Piece((), (), len(CUT)),), len(CUT))

LIKE_CONTROL = re.compile(r"<\S+>|\[\S+\]")
"""Added tokens that are not words, whether they are marked as special or not: <think>, <tool_call>, <|fim_prefix|>."""
THOUGHT = re.compile(r"<think>(.*?)</think>\s*", re.DOTALL)
"""The thought that a reasoning model writes before its answer."""
OPENED_THOUGHT = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
"""A thought that a generation prompt opens at its end, or an empty one there."""
EMPTY_THOUGHT = re.compile(r"\A<think>\s*</think>\s*(?=<think>)")
"""An empty thought from the template before the reply's own thought."""


@dataclass(frozen=True)
class ChatText:
    """A rendered conversation. Places count the characters of `text`, including CUT marks."""

    text: str
    prompt_end: int
    """Where the generation prompt ends and the text that the model is to write begins."""
    answer: int
    """Where the reply's own words begin, after a space or a thought, be it the template's or the reply's."""
    tail: int
    """Where the template's text after the reply begins."""


@dataclass(frozen=True)
class Chat:
    """One conversation in token ids, with its last reply."""

    text: ChatText
    encoded: Encoded
    """The tokens up to the end of turn, which is included."""
    prompt_length: int
    """The number of tokens of the prompt."""


class ChatFormat:
    """Renders and tokenises conversations with one tokenizer and its chat template.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        template_kwargs: extra variables of the chat template, such as {"enable_thinking": False}.
        style: how the prompt words the persona; default: as saved with the tokenizer.
        allow_control: whether strings in the data that spell control tokens become these tokens.

    Raises:
        UserError: a tokenizer that is not fast, or has no end of turn; a variable that the template does not read; a
            template that does not render a plain conversation, or whose finished replies do not begin with its
            generation prompt.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_kwargs: dict[str, Any],
        *,
        style: PromptStyle | None = None,
        allow_control: bool = False,
    ):
        check_tokenizer(tokenizer, "tokenizer")
        self.tokenizer, self.template_kwargs, self.tokens = tokenizer, template_kwargs, Tokens(tokenizer)
        self.style = style or PromptStyle.saved_with(tokenizer)
        self._template = ChatTemplate(
            tokenizer, None if tokenizer.chat_template else PLAIN_CHAT_TEMPLATE, template_kwargs
        )  # fmt: skip
        self._template.check_variables()
        if not tokenizer.chat_template and tokenizer.eos_token is None:
            raise UserError(
                "The tokenizer has neither a chat template nor an end-of-sequence token, so nothing would end a reply. "
                "Set tokenizer.eos_token, save the tokenizer, and pass that directory as --model."
            )
        first = tokenizer.convert_ids_to_tokens([*self.tokens.whole("a").ids[:1]])
        self.prepends_space = any(token.startswith(("▁", "Ġ")) for token in first)
        self._added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        self.control: re.Pattern | None = None
        self._uncuttable: list[str] = []
        self.has_system_role = self._accepts([("system", "s"), ("user", "u"), ("assistant", "a")])
        reply_first = [("system", "s"), ("assistant", "a"), ("user", "u"), ("assistant", "b")]
        self.needs_user_first = self.has_system_role and not self._accepts(reply_first)
        if not allow_control:
            self.control = self._control_tokens()
        self.footer = self._choose_footer()

    # ---- text

    def block(self, entries: Sequence[str]) -> str:
        """The persona's text in the prompt, "" if it has no entries."""
        return self.style.block(entries, self.footer)

    def messages(self, turns: Sequence[Turn], block: str, reply: str | None = None) -> list[tuple[str, str]]:
        """The (role, content) messages to give to the template. `turns` may begin with a system message."""
        said = [{"role": turn.role, "content": turn.content} for turn in turns]
        opening = int(said[0]["role"] == "system")
        if self.needs_user_first and said[opening]["role"] != "user":
            said.insert(opening, {"role": "user", "content": CONVERSATION_START})
        told = tell(said, block, self.style, self.has_system_role)
        told += [] if reply is None else [{"role": "assistant", "content": reply}]
        as_text = {"system": self.as_text, "user": self.as_text, "assistant": self._reply_as_text}
        return [(message["role"], as_text[message["role"]](message["content"])) for message in told]

    def prompt(self, turns: Sequence[Turn], block: str) -> str:
        """The prompt that a chat server sends, which ends with the template's generation prompt."""
        return self._render(self.messages(turns, block), generation=True)

    def writes_the_date(self) -> bool:
        """Whether a prompt is another on another day."""
        said = self.messages((Turn("user", "u"),), "")
        return self._render(said, True) != self._render(said, True, DAY.replace(2027, 2, 3))

    def finished(self, turns: Sequence[Turn], block: str, reply: str, tail: str) -> ChatText:
        """The conversation with its reply, which begins where the generation prompt ends. tail: the text after it, from
        `_frame`."""
        said = self.messages(turns, block, reply)
        whole, prompt = self._render(said), self._render(said[:-1], generation=True)
        opened = OPENED_THOUGHT.search(prompt)
        header, begun = (prompt[: opened.start()], opened[0]) if opened else (prompt, "")
        marked = said[-1][1]
        thought = THOUGHT.match(marked)
        answer = marked[thought.end() :] if thought else marked
        if thought and whole.startswith(header) and whole.endswith(tail):
            body = EMPTY_THOUGHT.sub("", whole[len(header) : len(whole) - len(tail)])  # without the template's
            rendered = THOUGHT.match(body)
            if not rendered or rendered[1].strip() != thought[1].strip():  # the template drops thoughts of replies
                body = marked if not begun else begun + marked[len("<think>") :].lstrip()
            whole = header + body + tail
        elif begun and "</think>" in begun and not whole.startswith(prompt) and whole.startswith(header):
            whole = prompt + whole[len(header) :]  # only the prompt has an empty thought
        if not whole.startswith(prompt):
            raise self._disagreement(prompt, whole)
        end = len(whole) - len(tail)
        place = whole.rfind(answer, len(prompt), end)
        if place < 0 or not whole.endswith(tail):
            raise UserError(
                f"{self._who} changes the reply {_excerpt(reply)}, so the reply cannot be found in the rendered text."
            )
        return ChatText(whole, len(prompt), place, end)

    def _frame(self, turns: Sequence[Turn]) -> tuple[str, str, str]:
        """The text before the persona block, between it and the reply, and after the reply."""
        text = self._render(self.messages(turns, _PERSONA, _REPLY))
        if text.count(_PERSONA) != 1 or text.count(_REPLY) != 1:
            raise UserError(
                f"{self._who} repeats or drops the system message or the reply, so the two passes cannot be "
                "aligned. Give the tokenizer another chat template."
            )
        prompt, tail = text.split(_REPLY)
        before, between = prompt.split(_PERSONA)
        return before, between, tail

    @property
    def _who(self) -> str:
        return f"The chat template of {self.tokenizer.name_or_path!r}"

    def _disagreement(self, prompt: str, whole: str) -> UserError:
        same = _common(prompt, whole)
        return UserError(
            f"{self._who} ends its generation prompt with {_excerpt(prompt[same:])}, but a finished reply begins with "
            f"{_excerpt(whole[same:])} there: the model would be prompted in another way than it was trained. Choose "
            "with --chat_template_kwargs how the template begins a reply (usually '{\"enable_thinking\": false}'), "
            "give replies a <think> block if it opens one, or give the tokenizer another chat template."
        )

    def _render(self, messages: Sequence[tuple[str, str]], generation: bool = False, day: datetime = DAY) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self._template.render(messages, generation, day)
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            roles = ", ".join(role for role, _ in messages)
            raise UserError(
                f"{self._who} does not render a conversation of {roles} ({first_line(error)}). Give it the variables "
                "that it needs with --chat_template_kwargs, or give the tokenizer another chat template."
            ) from error

    def _accepts(self, messages: Sequence[tuple[str, str]]) -> bool:
        """Whether the chat template renders all of these messages; some templates raise an error or omit one."""
        marked = [(role, f"{_PERSONA}{content}") for role, content in messages]
        try:
            text = self._render(marked)
        except UserError:
            return False
        return all(content in text for _, content in marked)

    # ---- control tokens in texts

    def as_text(self, text: str) -> str:
        """The text with a CUT mark in every string that would become a control token."""
        if self.control is None:
            return text
        if found := next((character for character in self._uncuttable if character in text), None):
            raise UserError(
                f"The text {_excerpt(text)} has {found!r}, a control token of a single character, which cannot be "
                "tokenised as text. Replace it, or pass --special_tokens_in_text allow."
            )
        return self.control.sub(lambda found: found[0] + CUT, text)

    def _reply_as_text(self, reply: str) -> str:
        """Like as_text, but without marks in the tags of a thought that begins the reply: templates look for them."""
        thought = THOUGHT.match(reply, len(reply) - len(reply.lstrip()))
        if thought is None:
            return self.as_text(reply)
        (start, end), rest = thought.span(1), thought.end()
        return f"{reply[:start]}{self.as_text(thought[1])}{reply[end:rest]}{self.as_text(reply[rest:])}"

    def _control_tokens(self) -> re.Pattern | None:
        """Matches the first characters of special tokens, and of added tokens that look like them or that the template
        writes, if the rest of the token follows. Words that were added to a vocabulary are not matched."""
        written = "".join(self._frame([Turn("user", "u")]))
        tokens = {
            token.content for token in self._added.values()
            if token.special or LIKE_CONTROL.fullmatch(token.content) or token.content in written
        }  # fmt: skip
        self._uncuttable = sorted(token for token in tokens if len(token) == 1)
        rests: dict[str, list[str]] = {}
        for token in sorted(tokens - {*self._uncuttable}):
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
        each = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()]
        return re.compile("|".join(each)) if each else None

    # ---- ids

    def encode(self, text: str) -> Encoded:
        """The ids of a rendered text: its pieces between CUT marks, each as a continuation of the one before."""
        first, *others = text.split(CUT)
        lines = self.tokens.lines(first)
        for piece in others:
            lines += [_CUT_MARK, *self._continued(piece)]
        return Encoded.of(lines)

    def _continued(self, text: str) -> list[Line]:
        """The tokens of a text that continues another. Tokenizers like Llama 2's add a space before every text. So the
        text is tokenised after an anchor, as in the middle of a text, and the anchor's ids are dropped."""
        if not self.prepends_space:
            return self.tokens.lines(text)
        (anchored,) = self.tokens.whole(ANCHOR + text).pieces
        kept = [(token, span) for token, span in zip(anchored.ids, anchored.spans, strict=True) if span[1] > 1]
        spans = tuple((max(a - 1, 0), b - 1) for _, (a, b) in kept)
        return [Line.of(Piece(tuple(token for token, _ in kept), spans, len(text)))]

    def chat(self, text: ChatText) -> Chat:
        """The conversation in ids; UserError if a token lies across the prompt's end, or nothing ends the reply."""
        encoded = self.ended(text)
        prompt = self.encode(text.text[: text.prompt_end]).ids
        if encoded.ids[: len(prompt)] != prompt:
            around = text.text[max(text.prompt_end - 8, 0) : text.prompt_end + 8].replace(CUT, "")
            raise UserError(
                f"{self._who} ends the prompt inside a token: in {around!r} the end of the prompt and the beginning of "
                "the reply share a token, but a server tokenises the prompt alone. Give the tokenizer a chat template "
                "whose generation prompt does not end with a space."
            )
        return Chat(text, encoded, len(prompt))

    def ended(self, text: ChatText) -> Encoded:
        """The ids through the end of turn: the first control token after the reply, and those directly after it."""
        whole = self.encode(text.text)
        length = whole.before(text.tail)
        ends = [token == self.tokenizer.eos_token_id or token in self._added for token in whole.ids[length:]]
        if any(ends):
            length += ends.index(True) + len(list(takewhile(bool, ends[ends.index(True) :])))
            return Encoded(whole.ids[:length], whole.lines)
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"{self._who} ends a reply with {_excerpt(text.text[text.tail :])}, which has no control token, and "
                "the tokenizer has no end-of-sequence token: a trained model would never stop. Set tokenizer.eos_token."
            )
        cut = self.encode(text.text[: text.tail])
        return Encoded.of([*cut.lines, Line.of(Piece((self.tokenizer.eos_token_id,), ((0, 0),), 0))])

    def pair(self, turns: Sequence[Turn], entries: Sequence[str], reply: str) -> tuple[Chat, tuple[int, int]]:
        """The conversation with the persona, and the range of tokens that is the persona: without it the ids are those
        of the conversation without persona. UserError if they are not. Without entries the range is empty."""
        refuse_marks([turn.content for turn in turns], entries, [reply])
        reply, block = reply.strip(), self.block(entries)
        before, _, tail = self._frame(turns)
        with_persona, without = (self.finished(turns, part, reply, tail) for part in (block, ""))
        place, block = len(before), self.as_text(block)
        if with_persona.text != without.text[:place] + block + without.text[place:]:
            raise UserError(
                f"{self._who} changes the persona, or changes other text because of it, so the two passes cannot be "
                "aligned. Begin and end the system message with words, or give the tokenizer another chat template."
            )
        chat = self.chat(with_persona)
        self._check_control(chat)
        if not block:
            start = chat.encoded.before(place)
            return chat, (start, start)
        ids, ids_cf = chat.encoded.ids, self.ended(without).ids
        added = len(ids) - len(ids_cf)
        start = _common(ids[: chat.prompt_length - added], ids_cf)
        if added <= 0 or ids[start + added :] != ids_cf[start:]:
            end = place + len(block)
            borders = [with_persona.text[max(at - 8, 0) : at + 8].replace(CUT, "") for at in (place, end)]
            raise UserError(
                f"A token lies across a border of the persona, {borders[0]!r} or {borders[1]!r}, so the text around "
                "the persona has other tokens in the pass without it. Begin the system message with a word, or give "
                "the tokenizer another chat template."
            )
        return chat, (start, start + added)

    def _check_control(self, chat: Chat) -> None:
        """UserError if there are more control tokens than the template wrote: a tokenizer that replaces characters,
        such as full-width ones, may make control tokens of strings that as_text did not cut. The prompt may have
        characters that the vocabulary lacks; in the reply they would be learnt."""
        if self.control is None or self.tokenizer.backend_tokenizer.normalizer is None:
            return
        added = self._added
        made = [
            added[index].content
            for place, (index, (start, end)) in enumerate(zip(chat.encoded.ids, chat.encoded.spans(), strict=True))
            if start < end and index in added and added[index].special
            and (place >= chat.prompt_length or index != self.tokenizer.unk_token_id)
        ]  # fmt: skip
        for token in dict.fromkeys(made):
            if made.count(token) > chat.text.text.count(token):
                raise UserError(
                    f"A text of this conversation becomes the control token {token!r}, because the tokenizer replaces "
                    "or lacks its characters. Correct the text, or pass --special_tokens_in_text allow."
                )

    def _choose_footer(self) -> str:
        """The first footer after which a conversation has the same tokens as without the persona block. Tried with a
        plain reply first, and then with a thought in the reply, which some templates require."""
        failure: UserError | None = None
        footers = PERSONA_FOOTERS if self.style.footer is None else (self.style.footer,)
        for reply, self.footer in product(("A reply.", "<think>\nA thought.\n</think>\n\nA reply."), footers):
            try:
                chat, _ = self.pair([Turn("user", "u")], ["A fact."], reply)
            except UserError as error:
                failure = failure or error
            else:
                self.end_of_turn = chat.encoded.ids[-1]
                return self.footer
        assert failure is not None
        raise failure


def refuse_marks(*texts: Sequence[str]) -> None:
    """UserError for texts with a character that this module uses as a mark."""
    for text in (text for several in texts for text in several):
        if found := next((mark for mark in MARKS if mark in text), None):
            raise UserError(
                f"The text {text[:40]!r} has the private-use character {found!r}, which perce uses itself. Remove it."
            )


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The number of first ids or characters that both share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _excerpt(text: str) -> str:
    return repr(shortened(text.replace(CUT, ""), 40))
