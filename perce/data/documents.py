"""Document → pieces of token ids, and windows, the short contexts of their tokens (LongCE).

    piece      x_0 … x_T-1      predicts x_1 … x_T-1, each from all before it: the long context
    windows    x_0 … x_K+S-1    the beginning, whose long and short contexts are the same: weight 1
               x_i-K … x_i+S-1  for i = K + S, K + 2S, …: predicts x_i … x_i+S-1 from K to K + S - 1 tokens

Fang et al., "What is Wrong with Perplexity for Long-context Language Modeling?" (arXiv 2410.23771), weight the loss of
token i with min(P(x_i | long context) / P(x_i | last K tokens), 5). One window per token would cost as much as K
forward passes of the document. In the authors' own package (longppl) S tokens share a window that begins K tokens
before the first of them, with K = 4096 and S = 1024, and so they do here. The counterfactual pass then reads about
(K + S) / S times as many tokens as the document has.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from perce.data.rows import OR_SKIP, Document
from perce.errors import UserError


@dataclass(frozen=True)
class DocumentPair:
    """One piece of a document: the columns of a Pair (pairs.py), with windows instead of a persona."""

    input_ids: list[int]
    """(T,)."""
    windows: list[tuple[int, int, int]]
    """(start, end, predicted): input_ids[start:end] predicts its last `predicted` ids. The windows together predict all
    ids except x_0."""
    response_length: int
    """T - 1."""
    personal: list[bool]
    """(T - 1,), all False."""
    data_weight: float = 1.0
    """As in Pair."""


def short_windows(length: int, short_context: int, stride: int) -> list[tuple[int, int, int]]:
    """The windows of a piece of `length` tokens."""
    ends = [*range(short_context + stride, length, stride), length]
    rest = [(start - short_context, end, end - start) for start, end in pairwise(ends)]
    return [(0, ends[0], ends[0] - 1), *rest]


class DocumentBuilder:
    """Turns Documents into DocumentPairs for one tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer; its own special tokens are added, and the end-of-sequence token.
        max_length: longest piece in tokens. A longer document is cut into pieces; each begins with the last token of
            the one before it, so that every token except the document's first is predicted once.
        short_context, short_stride: K and S.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, short_context: int, short_stride: int):
        self.tokenizer = tokenizer
        self.max_length, self.short_context, self.short_stride = max_length, short_context, short_stride

    @property
    def settings(self) -> tuple[Any, ...]:
        """What the pairs depend on besides tokenizer and text."""
        return self.max_length, self.short_context, self.short_stride

    def pairs(self, document: Document) -> list[DocumentPair]:
        """The pieces in order; UserError for a text of a single token, in which nothing can be predicted."""
        ids = self.tokenizer(document.text, verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
        if len(ids) < 2:
            raise UserError(f"{document.source}: expected a text of at least two tokens, got one: a first token is not "
                            f"predicted.{OR_SKIP}")  # fmt: skip
        return [
            self._pair(ids[start : start + self.max_length], document.data_weight)
            for start in range(0, len(ids) - 1, self.max_length - 1)
        ]

    def _pair(self, ids: list[int], weight: float = 1.0) -> DocumentPair:
        windows = short_windows(len(ids), self.short_context, self.short_stride)
        return DocumentPair(ids, windows, len(ids) - 1, [False] * (len(ids) - 1), weight)
