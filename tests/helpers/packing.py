"""What the tests of packed batches share."""

from perce.data.retrieval import Retriever, recency_scores
from perce.model.patch import prepare_model
from tests.helpers.tiny import demo_pairs, tiny_model

PAIRS = demo_pairs(2, retriever=Retriever(recency_scores, 1, "", ""))

ARCHITECTURES = ("llama", "qwen3", "gemma3")


def model_with(architecture, attention):
    model = prepare_model(tiny_model(architecture))
    model.set_attn_implementation(attention)
    return model
