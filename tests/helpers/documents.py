"""What the tests of documents share."""

import torch

from perce.data.documents import DocumentBuilder
from tests.helpers.tiny import tiny_tokenizer

K, S = 16, 8

TOKENIZER = tiny_tokenizer()

TEXT = "The bees left on Monday. Ana wrote it down, as she does. By Friday they were back, louder than before. "


def documents(lengths):
    """Pairs of documents of so many tokens, chance ids."""
    torch.manual_seed(2)
    builder = DocumentBuilder(TOKENIZER, max_length=1000, short_context=K, short_stride=S)
    return [{**vars(builder._pair(torch.randint(1, 400, (n,)).tolist())), "example": i} for i, n in enumerate(lengths)]
