"""Texts that are tokenised in pieces have the tokens of the whole text, at the same characters."""

import itertools
import pickle
import random
import re

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from perce.data import tokens
from perce.data.tokens import LINE, PIECE, WORDS, Encoded, Tokens, knows_borders
from tests.helpers.conversations import conversations
from tests.helpers.tiny import tiny_tokenizer
from tests.helpers.tokenizers import FAMILIES, tokenizer_like

CUT = ("gpt2", "qwen2", "llama3")
"""Families whose borders are known."""


def texts(count, seed):
    """Made-up texts with control tokens between them, joined by many kinds of spaces and line breaks."""
    chance = random.Random(seed)
    joints = ["<|im_end|>\n<|im_start|>user\n", "\n", "\n\n", " ", "", "\n- ", "\r\n", "<|im_end|>", "\n/", " \n", "'s"]
    said = [text for x in conversations(count, seed) for text in (*x.persona, x.response)]
    return ["".join(chance.choice(joints) + text for text in chance.sample(said, 4)) for _ in range(count)]


def assert_as_whole(tokenizer, own, text):
    plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    encoded = Encoded.of(own.lines(text))
    assert encoded.ids == plain["input_ids"]
    assert encoded.spans() == plain["offset_mapping"]
    first = len(encoded.ids) // 2
    assert encoded.spans(first) == plain["offset_mapping"][first:]
    place = plain["offset_mapping"][first][0] if encoded.ids else 0
    assert encoded.before(place) == _before(plain["offset_mapping"], place)


def _before(spans, place):
    length = len(spans)
    while length and spans[length - 1][0] >= place:
        length -= 1
    return length


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_have_the_tokens_of_the_whole(family):
    tokenizer = tokenizer_like(family)
    own = Tokens(tokenizer)
    assert own.cuts == (family in CUT)
    for text in texts(150, 0):
        assert_as_whole(tokenizer, own, text)
    first, again = (own.lines(text)[0].pieces[0] for text in ("Juno tonight", "Juno today"))
    assert (first is again) == own.cuts, "and a piece that was met before is looked up"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_of_thousands_of_texts_have_the_tokens_of_the_whole(family):
    tokenizer = tokenizer_like(family)
    own = Tokens(tokenizer)
    for seed in range(1, 21):
        for text in texts(500, seed):
            assert_as_whole(tokenizer, own, text)


ALPHABET = "aA1.'/-é字\u0301 \n\r\t"
"""A character of each kind that the regular expressions tell apart."""


def words(pattern, text):
    return [word for word, _ in pattern.pre_tokenize_str(text)]


def assert_cut_where_words_end(pattern, text):
    cut = [word for line in LINE.findall(text) for part in PIECE.findall(line) for word in words(pattern, part)]
    assert cut == words(pattern, text), repr(text)


PATTERNS = {
    str(number): pre_tokenizers.Split(Regex(regex), "isolated") for number, regex in enumerate(sorted(WORDS))
} | {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_words_end_at_borders(name):
    chance = random.Random(0)
    for _ in range(2000):
        assert_cut_where_words_end(PATTERNS[name], "".join(chance.choices(ALPHABET, k=chance.randint(1, 12))))


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_words_end_at_borders_in_every_short_text(name):
    for length in range(1, 6):
        for characters in itertools.product(ALPHABET, repeat=length):
            assert_cut_where_words_end(PATTERNS[name], "".join(characters))


def test_parts_are_the_text():
    for text in (*texts(100, 3), "", "\n", "a\n\nb", "a\n/b c"):
        assert "".join(LINE.findall(text)) == "".join(PIECE.findall(text)) == text
        border = re.compile(tokens.BORDER)
        assert not any(border.search(part) for line in LINE.findall(text) for part in PIECE.findall(line))


def byte_level(**changes):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = changes.pop("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_what_is_not_known_of_a_tokenizer_is_not_assumed():
    assert knows_borders(byte_level()) and knows_borders(byte_level(normalizer=normalizers.NFC()))
    trimmed = processors.ByteLevel(add_prefix_space=True, trim_offsets=True)
    others = [
        byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        byte_level(pre_tokenizer=pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated")),
        byte_level(pre_tokenizer=pre_tokenizers.Metaspace()),
        byte_level(normalizer=normalizers.Lowercase()),
        byte_level(normalizer=normalizers.Prepend("▁")),
        byte_level(model=models.BPE(dropout=0.1)),
        byte_level(post_processor=trimmed),
        byte_level(post_processor=processors.Sequence([trimmed])),
        byte_level(post_processor=processors.RobertaProcessing(("</s>", 1), ("<s>", 0))),
    ]
    for token in ("New York", AddedToken("<mask>", lstrip=True), AddedToken("<x>", rstrip=True)):
        others.append(byte_level())
        others[-1].add_tokens([token])
    others.append(Tokenizer(models.BPE()))
    assert not any(map(knows_borders, others))


def with_token(token, **changes):
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = byte_level(model=models.BPE(letters, []), **changes)
    backend.add_tokens([token])
    return backend


def cut_as_whole(backend, text):
    """Whether a text that is cut at all borders has the tokens of the whole text."""
    pieces = [backend.encode(piece) for line in LINE.findall(text) for piece in PIECE.findall(line)]
    return [name for piece in pieces for name in piece.tokens] == backend.encode(text).tokens


@pytest.mark.parametrize("normalized", [True, False])
def test_an_added_token_forbids_to_cut_where_it_may_lie_across_a_border_and_only_there(normalized):
    short = [
        ["".join(some) for length in range(1, longest + 1) for some in itertools.product("a \n", repeat=length)]
        for longest in (3, 5)
    ]
    for content in short[0]:
        backend = with_token(AddedToken(content, normalized=normalized))
        assert knows_borders(backend) == all(cut_as_whole(backend, text) for text in short[1]), repr(content)


@pytest.mark.parametrize(
    ("content", "text"),
    [("\né", "x\ne\u0301x"), ("\u037e x", "a; xa"), ("é\nthe", "é\nthe"), ("\nUser:", "a.\nUser: b")],
)
def test_an_added_token_is_compared_as_texts_may_have_it_before_they_are_normalised(content, text):
    backend = with_token(content, normalizer=normalizers.NFC())
    assert cut_as_whole(backend, text) == knows_borders(backend) == (content == "é\nthe")


def test_pieces_for_which_there_is_no_room_are_the_same(monkeypatch):
    monkeypatch.setattr(tokens, "KEPT_PIECES", 50)
    monkeypatch.setattr(tokens, "KEPT_LINES", 5)
    tokenizer = tokenizer_like("gpt2")
    own = Tokens(tokenizer)
    for text in texts(60, 1):
        assert_as_whole(tokenizer, own, text)


@pytest.mark.parametrize(
    "other", [{"padding": True, "truncation": True, "max_length": 2}, {"split_special_tokens": True}]
)
def test_a_tokenizer_that_was_used_otherwise_in_between_is_used_as_before(monkeypatch, other):
    monkeypatch.setattr(tokens, "KEPT_LENGTH", 0)
    tokenizer = tiny_tokenizer()
    own = Tokens(tokenizer)
    before = own.lines("Bees and Juno, tonight.<|im_end|>")
    tokenizer(["Bees", "Bees and Juno"], **other)
    again = pickle.loads(pickle.dumps(own)).lines("Bees and Juno, tonight.<|im_end|>")
    tokenizer(["Bees", "Bees and Juno"], **other)
    assert own.lines("Bees and Juno, tonight.<|im_end|>") == before == again


def test_a_tokenizer_without_pre_tokenizer_is_given_whole_texts():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, " ": 1}, [])))
    own = Tokens(tokenizer)
    assert not own.cuts and Encoded.of(own.lines("a a")).ids == [0, 1, 0]
