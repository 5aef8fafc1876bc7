"""Shared by the tests of retrieval: a user's history, a request, and which entries are picked and shown."""

from perce import DataConfig
from perce.data.retrieval import make_retriever
from perce.data.rows import Example
from perce.reading.fields import Turn
from tests.helpers.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TWEET = "Paraphrase the following tweet without any explanation before or after it: "
HISTORY = ("Rain again.", "My bees swarmed today.", "Ran five miles.", "Honey from the bees!", "New shoes.")


def history(request, *passages):
    return Example(passages or HISTORY, (Turn("user", request),), "A reply.", None, None, "train.jsonl:1")


def picks(request, *passages, **options):
    return make_retriever(DataConfig(**options))(history(request, *passages))


def row(request, output, texts, **fields):
    """A row in LaMP-7's format; files hold the oldest entry first."""
    return {"id": "1", "input": request, "output": output, "profile": [{"text": text, "id": "1"} for text in texts]}


def shown(pairs, number=0):
    start, end = pairs["persona_span"][number]
    return TOKENIZER.decode(pairs["input_ids"][number][start:end])
