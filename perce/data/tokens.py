"""Text → token ids, and the characters of each token. Texts are cut into pieces, which are tokenised once and cached.

    - I keep bees.⏎- I run.⏎   →   "-"  " I"  " keep"  " bees.⏎"  "-"  " I"  " run.⏎"

Most tokenizers divide a text into words before they make tokens. Their words always end before a single space that
stands between printable characters, and after a single line end there. For tokenizers that are known to do so, a text
is cut at these borders first: the ids are the same, and among a million rows most pieces are in the cache already. For
other tokenizers the whole text is one piece.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream

# Borders lie between printable ASCII characters, for which all tokenizers agree on what is a space, letter or digit.
# GPT-4o's tokenizer continues a word with a "/" after a line end, so there is no border there.
BORDER = r"(?<=[!-~])(?= [!-~])|(?<=[!-~]\n)(?=[!-.0-~])"
LINE = re.compile(r"(?:.*\n)*?.*[!-~]\n(?=[!-.0-~])|[\s\S]+")
PIECE = re.compile(rf" ?[!-~]+(?:\n(?=[!-.0-~])|(?= [!-~])|\Z)|[\s\S]+?(?:{BORDER}|\Z)")
# Sizes of the caches. Both texts of a pair, and pairs of one user, share most lines; most pieces are frequent words.
KEPT_LINES, KEPT_PIECES = 2**11, 2**16
KEPT_LENGTH = 256  # characters of the longest text that is cached

SHOWN_WORDS = 10  # of the most frequent personal words

# Regular expressions of pre-tokenizers. None of their matches crosses a BORDER, or depends on the text after one.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS, _REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
WORDS = frozenset(
    (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
        *(f"{_CONTRACTIONS}|{_LETTERS}|{digits}|{_REST}" for digits in (r"\p{N}", r"\p{N}{1,3}")),  # Qwen, Llama 3
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CASED}|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CASED}|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # GPT-4o
    )
)


class Piece(NamedTuple):
    """Part of a line: its token ids, the characters of the piece that each token covers, and its characters."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    length: int


class Line(NamedTuple):
    """Part of a text; `ids` are the ids of all its pieces."""

    ids: tuple[int, ...]
    pieces: tuple[Piece, ...]
    length: int

    @classmethod
    def of(cls, *pieces: Piece) -> "Line":
        ids = tuple(chain.from_iterable([piece.ids for piece in pieces]))
        return cls(ids, pieces, sum([piece.length for piece in pieces]))


@dataclass(frozen=True)
class Encoded:
    """The first tokens of a text."""

    ids: list[int]
    lines: list[Line]
    """The lines of the whole text."""

    @classmethod
    def of(cls, lines: list[Line]) -> "Encoded":
        return cls([*chain.from_iterable([line.ids for line in lines])], lines)

    def spans(self, first: int = 0) -> list[tuple[int, int]]:
        """The half-open ranges of characters of the text that the tokens from `first` on cover."""
        token, end = sum([len(line.ids) for line in self.lines]), sum([line.length for line in self.lines])
        found: list[tuple[int, int]] = []
        for piece in self._from_the_end():  # callers ask for the last tokens
            if token <= first:
                break
            token, end = token - len(piece.ids), end - piece.length
            found += [(end + start, end + stop) for start, stop in reversed(piece.spans)]
        return found[::-1][max(first - token, 0) : len(self.ids) - token]

    def before(self, place: int) -> int:
        """How many tokens of the whole text remain without those that begin at or after character `place`."""
        token, end = sum([len(line.ids) for line in self.lines]), sum([line.length for line in self.lines])
        for piece in self._from_the_end():
            end -= piece.length
            for start, _ in reversed(piece.spans):
                if end + start < place:
                    return token
                token -= 1
        return token

    def _from_the_end(self) -> Iterator[Piece]:
        return (piece for line in reversed(self.lines) for piece in reversed(line.pieces))


class Tokens:
    """The token ids of texts, without the special tokens that a tokenizer would add.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.backend = tokenizer, tokenizer.backend_tokenizer
        tokenizer("a")  # sets the backend's truncation, padding and treatment of special tokens
        self.cuts = knows_borders(self.backend)
        self._pieces = _kept(KEPT_PIECES, self._piece)
        self._lines = _kept(KEPT_LINES, self._line)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokens, (self.tokenizer,)

    def lines(self, text: str) -> list[Line]:
        return [*map(self._lines, LINE.findall(text))] if self.cuts else [self.whole(text)]

    def whole(self, text: str) -> Line:
        """The text as one line of one piece."""
        return Line.of(self._piece(text))

    def _line(self, text: str) -> Line:
        return Line.of(*map(self._pieces, PIECE.findall(text)))

    def _piece(self, text: str) -> Piece:
        backend = self.backend
        splits = backend.encode_special_tokens != self.tokenizer.split_special_tokens
        if splits or backend.truncation or backend.padding:  # another use of the tokenizer has set these
            self.tokenizer("a")
        encoded = backend.encode(text, add_special_tokens=False)
        return Piece(tuple(encoded.ids), tuple(encoded.offsets), len(text))


def _kept(room: int, make: Callable[[str], Any]) -> Callable[[str], Any]:
    """`make`, whose results for short texts are cached."""
    cached = lru_cache(room)(make)
    return lambda text: (cached if len(text) <= KEPT_LENGTH else make)(text)


def knows_borders(backend: Any) -> bool:
    """Whether a `tokenizers.Tokenizer` is known to give the same tokens if a text is cut at every BORDER."""
    normalizer, steps = _rule(backend.normalizer), [*_steps(_rule(backend.pre_tokenizer))]
    ends = _steps(_rule(backend.post_processor))
    added = backend.get_added_tokens_decoder().values()
    return (
        not any(token.lstrip or token.rstrip or token.single_word for token in added)
        and not any(_may_cross(token.content) for token in added)
        and (normalizer is None or normalizer["type"] == "NFC")
        and any(map(_cuts_words, steps))
        and all(_cuts_words(step) or _is_passive(step) for step in steps)
        and not any(
            end.get("trim_offsets") and end["add_prefix_space"] for end in ends
        )  # these change the span of a text's first token
        and not getattr(backend.model, "dropout", None)
    )


def _may_cross(token: str) -> bool:
    """Whether an added token can lie across a BORDER, which also depends on the characters around the token."""
    token = unicodedata.normalize("NFD", token)  # NFC may make the token from this form, which has the most borders
    return any(1 < border.start() < 1 + len(token) for border in re.finditer(BORDER, f"!{token}!"))


def _rule(part: Any) -> dict[str, Any] | None:
    return part and json.loads(part.__getstate__())


def _steps(rule: dict[str, Any] | None) -> Iterable[dict[str, Any]]:
    """The single pre-tokenizers or post-processors in a rule, which may be a (nested) sequence of them."""
    if rule and rule["type"] == "Sequence":
        return chain.from_iterable(map(_steps, rule.get("pretokenizers") or rule.get("processors", ())))
    return [rule] if rule else []


def _cuts_words(step: dict[str, Any]) -> bool:
    """Whether this pre-tokenizer ends a word at every BORDER."""
    if step["type"] == "ByteLevel":
        return step["use_regex"] and not step["add_prefix_space"]
    plain = step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
    return plain and step["pattern"].get("Regex") in WORDS


def _is_passive(step: dict[str, Any]) -> bool:
    """Whether this pre-tokenizer treats every character independently of the characters around it."""
    return step["type"] == "Digits" or (step["type"] == "ByteLevel" and not step["add_prefix_space"])


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token; a character that several tokens make up is given to the last of them."""
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.backend_tokenizer, token) or "" for token in ids]


def personal_words(pairs: Iterable[Mapping[str, Any]], tokenizer: Any) -> str:
    """The most frequent words that the personal tokens of pairs make, with their counts: "nicht (31), ich (24)"."""
    counts: Counter[str] = Counter()
    for pair in pairs:
        if any(pair["personal"]):
            texts = token_texts(pair["input_ids"][-pair["response_length"] :], tokenizer)
            own = (text if personal else " " for text, personal in zip(texts, pair["personal"], strict=True))
            counts.update("".join(own).lower().split())
    shown = [f"{word} ({count:,})" for word, count in counts.most_common(SHOWN_WORDS)]
    return ", ".join([*shown, *["…"] * (len(counts) > SHOWN_WORDS)])
