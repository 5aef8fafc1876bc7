"""The words of a text, in any script, and those of a reply that count as personal.

Scripts without spaces have no borders that could be found without a dictionary. There a few neighbouring characters
count as a word: two of Chinese or Katakana, four of Thai, Lao, Burmese or Khmer, whose characters are letters.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # with the syllables of Japanese
_PAIRED = r"[\u30a1-\u30fa\u30fc\u3400-\u4dbf\u4e00-\u9fff]"  # without Hiragana, which is endings and particles
LETTERS = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
# Vowel signs of Hindi, decomposed accents: \w has none of them. Those above U+FE2F are of historical scripts.
MARKS = "".join(x for x in map(chr, range(0x300, 0xFE30)) if unicodedata.category(x)[0] == "M")


def spaced(but: str) -> str:
    """A pattern for runs of letters, digits and marks, but for these characters."""
    return rf"[^\W{but}]+(?:[{MARKS}]+[^\W{but}]*)*"


_SPACED = spaced(f"_{IDEOGRAPHS}{LETTERS}")
WORD = re.compile(rf"{_SPACED}(?:['’]{_SPACED})?|(?=({_PAIRED}{{2}})).|(?=([{LETTERS}]{{4}})).")
ASCII_WORD = re.compile(r"[a-z0-9]+(?:'[a-z0-9]+)?")
_OF_SEVERAL = re.compile(rf"{_PAIRED}|[{LETTERS}]")
_CONTRACTED = re.compile("(?:n't|'(?:d|ll|m|re|ve))$")  # isn't, I'll; not 's, which names have too
FEWEST_WORDS = 5  # of a reply that is called copied
# Words too common to be personal.
COMMON_WORDS = frozenset(
    """a about after again ain't all also always am an and another any are as at back be because been before being but
    by can can't come could day did do does doing done down each even ever every few find first for from get give go
    going good got great had has have having he he's her here here's him his how how's i if in into is it it's its just
    keep know last least let let's like little live long look lot love made make many maybe me more most much my need
    never new next nice no not now of off old on once one only or other our out over own people really right same say
    see she she's should since so some something still such take than thank thanks that that's the their them then there
    there's these they thing things think this those though three time to today too two until up us use used very want
    was way we well were what what's when where where's which while who who's why will with won't work would yeah year
    years yes you your ความ เป็น""".split()
)
COMMON_CHARACTERS = frozenset(
    "我你您他她它们們这這那哪的地得了着著过過是不没沒在有和与與也都就很还還再又要会會能可以想说說去来來到把被给給对對跟让讓从從"
    "吗嗎呢吧啊么麼什怎为為因所如果但而且或之其个個一上下里喜欢歡"
)


def personal_word_spans(response: str, persona: Sequence[str], conversation: str) -> list[tuple[int, int]]:
    """Character spans of a response's words that are in the persona but not in the conversation; never common words.

    This labels personal tokens in data without marked spans. It finds quoted facts, and misses paraphrases and style.
    """
    matches = [(match, match.lastindex or 0) for match in WORD.finditer(response)]
    found = [(_plain(match[group]), match.span(group)) for match, group in matches]
    own = {word for word, _ in found if not _is_common(word)}
    own &= words_of("\n".join(persona)) - words_of(conversation)
    return [span for word, span in found if word in own]


def stands_in(response: str, passages: Sequence[str]) -> bool:
    """Whether a response of at least FEWEST_WORDS different words stands word for word in one of the passages. Shorter
    ones, such as a rating or a greeting, may stand there by chance."""
    text = response.strip()
    return any(text in passage for passage in passages) and len(words_of(text)) >= FEWEST_WORDS


@lru_cache(64)  # the rows of a user have the same persona
def words_of(text: str) -> frozenset[str]:
    """The distinct words, in lower case, with composed accents and one kind of apostrophe."""
    if text.isascii():  # a simpler pattern, which takes a third of the time
        return frozenset(ASCII_WORD.findall(text.lower()))
    return frozenset([match[match.lastindex or 0] for match in WORD.finditer(_plain(text))])


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text.lower().replace("’", "'"))


def _is_common(word: str) -> bool:
    """Whether a word is too common to be personal, or too short."""
    if _OF_SEVERAL.match(word):
        return word in COMMON_WORDS or not COMMON_CHARACTERS.isdisjoint(word)
    stem = _CONTRACTED.sub("", word)
    return word in COMMON_WORDS or stem in COMMON_WORDS or (len(word) < 3 and not word.isdigit())
