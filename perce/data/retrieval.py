"""A user's long history → the few passages that go into the prompt, best first.

    Example  →  query (from the request)  and  indexed text of each passage  →  scores  →  the k best

    bm25      words in common, of which rare ones count most; needs no model
    dense     similarity of embeddings; the paper retrieves so, with Contriever (encoder.py)
    recency   the most recent
    none      everything, most recent first

Example.persona has the most recent passage first, and equal scores keep that order: for a query that shares no word
with the history, the most recent passages are picked, not the oldest.
"""

import logging
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from perce.config.schema import DataConfig
from perce.data.rows import Example
from perce.data.words import IDEOGRAPHS, LETTERS, spaced
from perce.errors import UserError
from perce.reading.fields import LABELS, PASSAGES, Turn, given_persona

DECIMALS = 5  # scores equal to this many decimals tie: another batch or order of sums changes the seventh digit
DEFAULT_ENCODER = "facebook/contriever"

# Finds what a request is about in the benchmarks' own wordings: the groups of the first pattern that fits, joined, are
# the query. A request in any other wording is itself the query. For LaMP its authors search with the same parts.
QUERIES: dict[str, str] = {
    "LongLaMP abstracts": r'Generate an abstract for the title ".*" using the following items: ?(.*)',
    "LongLaMP reviews": (
        r'Generate the review text .*? product with description "(.*)"\. The summary of the review text is "(.*)"'
    ),
    "LongLaMP topics": r"Generate the content for a reddit post:? (.*)",
    "Amazon reviews": r'Write a review with the rating .*? and the title "(.*)"\.',
    "LaMP-1": r'For an author who has written the paper .*?which reference is related\?.*?\[1\]: "(.*)" \[2\]: "(.*)"',
    "LaMP-2": r"Which tag does this movie relate to .*? description: (.*)",
    "LaMP-2N": r"Which category does this article relate to .*? article: (.*)",
    "LaMP-3": r"What is the score of the following review .*? review: (.*)",
    "LaMP-4": r"Generate a headline for the following article: (.*)",
    "LaMP-5": r"Generate a title for the following abstract of a paper: (.*)",
    "LaMP-6": r"Generate a subject for the following email: (.*)",
    "LaMP-7": r"Paraphrase the following tweet without any explanation before or after it: (.*)",
}
_QUERIES = [re.compile(pattern, re.DOTALL | re.IGNORECASE) for pattern in QUERIES.values()]

_UNINDEXED_LINE = re.compile(rf"\A(?:{'|'.join(LABELS)}): .*\n")
_LABEL = re.compile(rf"^(?:{'|'.join(sorted({label for _, parts in PASSAGES for label, _ in parts}))}): ", re.MULTILINE)

# As a word counts each character of Chinese and Japanese, and every four neighbours of scripts such as Thai.
_WORD = rf"[{IDEOGRAPHS}]|[{LETTERS}]+|{spaced(IDEOGRAPHS + LETTERS)}"
_UNSPACED = re.compile(rf"[{LETTERS}]{{5,}}")

Score = Callable[[str, Sequence[str]], np.ndarray]  # (query, n texts) → (n,), higher is better


@dataclass(frozen=True)
class Retriever:
    """Picks k passages of a history."""

    score: Score
    k: int
    name: str
    """For users to read, such as "bm25"."""
    identity: str
    """What the picks depend on, except k and the code; part of the fingerprint of cached pairs."""
    may_fork: bool = True
    """Whether it works in a process that was forked from this one."""

    @property
    def description(self) -> str:
        return f"{self.k} passages of each history, by {self.name}"

    def __call__(self, example: Example) -> list[int]:
        """Indices into example.persona, best first."""
        scores = self.score(query_of(example.turns[-1].content), [indexed_text(entry) for entry in example.persona])
        return np.argsort(-np.round(scores, DECIMALS), kind="stable")[: self.k].tolist()


def make_retriever(config: DataConfig) -> Retriever | None:
    """The retriever that the options choose, or None to keep every passage. UserError if its model cannot be loaded."""
    if config.retriever == "none":
        return None
    if config.retriever == "recency":
        return Retriever(recency_scores, config.retrieve_k, "recency", "recency")
    if config.retriever == "bm25":
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # bm25s sets DEBUG, and logs a line per index
        return Retriever(bm25_scores, config.retrieve_k, "bm25", f"bm25s {bm25s.__version__}")
    if config.retriever != "dense":
        raise UserError(f"retriever: expected bm25, dense, recency or none, got {config.retriever!r}.")
    from perce.data.encoder import Encoder

    encoder = Encoder(config.retriever_model or DEFAULT_ENCODER)
    return Retriever(encoder.scores, config.retrieve_k, encoder.name, encoder.identity, may_fork=False)


def pick_passages(
    history: Sequence[Any], request: str, *, retriever: str = "bm25", k: int = 4, retriever_model: str | None = None
) -> list[str]:
    """What the prompt of a request shows of a user's history, best first: the persona for `prompt_text` or
    `prompt_ids`. A server of a model that was trained on histories needs it.

    Args:
        history: texts, or entries of a profile as in LaMP and LongLaMP, the oldest first.
        request: the message to reply to.
        retriever, retriever_model: as in training. k: retrieve_k in training.

    Raises:
        UserError (a ValueError): an entry that training would refuse, no entry with text, an unknown retriever.

    An encoder is loaded at the first call.
    """
    if not isinstance(request, str):
        raise UserError(f"request: expected a text, got {request!r}.")
    passages = given_persona(history, "history")[::-1]
    pick = _retriever(retriever, retriever_model, k)
    if pick is None or not passages:
        return [*passages]
    example = Example(passages, (Turn("user", request),), "", None, None, "pick_passages")
    return [passages[index] for index in pick(example)]


@lru_cache(1)
def _retriever(name: Any, model: str | None, k: int) -> Retriever | None:
    return make_retriever(DataConfig(retriever=name, retriever_model=model, retrieve_k=k))


def query_of(request: str) -> str:
    """The part of a request that says what it is about (table `QUERIES`), or else the whole request."""
    for pattern in _QUERIES:
        if found := pattern.match(request):
            return " ".join(found.groups())
    return request


def indexed_text(passage: str) -> str:
    """A passage without its labels and without the fields that are not searched."""
    return _LABEL.sub("", _UNINDEXED_LINE.sub("", passage))


def recency_scores(query: str, passages: Sequence[str]) -> np.ndarray:
    return np.zeros(len(passages))  # all equal, and equal scores keep the order


def bm25_scores(query: str, passages: Sequence[str]) -> np.ndarray:
    """The BM25 score of each passage among those of one user (Lucene's variant, whose scores are never negative)."""
    import bm25s

    asked, *words = _words([query, *passages])
    if not asked or not any(words):
        return np.zeros(len(passages))
    index = bm25s.BM25(method="lucene")
    index.index(words, show_progress=False)
    return index.get_scores(asked)


def _words(texts: Sequence[str]) -> list[list[str]]:
    import bm25s

    plain = [_UNSPACED.sub(_in_fours, unicodedata.normalize("NFKC", text).casefold()) for text in texts]
    return bm25s.tokenize(
        plain, lower=False, token_pattern=_WORD, stopwords="en", return_ids=False, show_progress=False
    )  # fmt: skip


def _in_fours(run: re.Match) -> str:
    """A run of letters as overlapping parts of four, with spaces between them."""
    return " ".join(run[0][i : i + 4] for i in range(len(run[0]) - 3))
