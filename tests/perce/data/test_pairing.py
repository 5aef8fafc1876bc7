"""The builder of pairs for a format."""

from perce import DataConfig
from perce.data.pairing import make_builder
from tests.helpers.pairs import TOKENIZERS


def test_only_histories_are_cut_to_retrieve_k():
    tokenizer, config = TOKENIZERS["chatml"], DataConfig(retrieve_k=2)
    assert make_builder(tokenizer, config, "longlamp").retriever.k == 2
    assert make_builder(tokenizer, config, "lamp").retriever.k == 2
    assert make_builder(tokenizer, config, "convai2").retriever is None
