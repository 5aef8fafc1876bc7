"""Batches of every kind for a tiny model: padded, packed, documents, and lengths under a budget."""

import random
from dataclasses import replace

import torch

from perce.data.documents import DocumentBuilder
from perce.data.retrieval import Retriever, recency_scores
from perce.model.passes import counterfactual_hidden, factual
from perce.model.patch import prepare_model
from perce.objectives import OBJECTIVES, HeadCall
from perce.training.sampler import TokenBatches
from tests.helpers.tiny import demo_pairs, tiny_model, tiny_tokenizer

PAIRS = demo_pairs(3)
WEIGHTING = OBJECTIVES["perce"].weighting(clip_min=0.005)  # a random model hardly depends on the persona
PACKED = demo_pairs(2, retriever=Retriever(recency_scores, 1, "", ""))
PACKABLE = ("llama", "qwen3", "gemma3")
TOKENIZER = tiny_tokenizer()
TEXT = "The bees left on Monday. Ana wrote it down, as she does. By Friday they were back, louder than before. "
K, S = 16, 8  # of LongCE's short contexts
LENGTHS = [random.Random(0).randint(20, 400) for _ in range(500)] + [1200]


def perce_forward(model, batch, **options):
    """(loss, logp, logp_cf, signal, token_weight) of a batch after both passes; `options`: of HeadCall."""
    call = HeadCall(batch["target"], **({"weighting": WEIGHTING} | options))
    done = factual(model, batch, replace(call, hidden_cf=counterfactual_hidden(model, batch)))
    return done.loss, *done[:4]


def model_with(architecture, attention):
    model = prepare_model(tiny_model(architecture))
    model.set_attn_implementation(attention)
    return model


def documents(lengths):
    """Pairs of documents of so many tokens, with random ids."""
    torch.manual_seed(2)
    builder = DocumentBuilder(TOKENIZER, max_length=1000, short_context=K, short_stride=S)
    return [{**vars(builder._pair(torch.randint(1, 400, (n,)).tolist())), "example": i} for i, n in enumerate(lengths)]


def drawn(epoch=0, lengths=LENGTHS, budget=1000, **options):
    batches = TokenBatches(lengths, budget, **({"seed": 7} | options))
    batches.set_epoch(epoch)
    return list(batches)
