"""A stream of pairs, and a run of a tiny model on it."""

import torch

from perce import PerceTrainer, load_examples
from perce.data.pairing import PairSource
from perce.data.pairs import PairBuilder
from perce.data.stream import PairStream
from tests.helpers.tiny import tiny_tokenizer
from tests.helpers.trainers import arguments, logged, model_for

TOKENIZER = tiny_tokenizer()
ROWS = [{"persona": f"I am {i}." * (1 + i % 3), "query": "Who?", "response": f"It is {i}."} for i in range(23)]


def pair_stream(path, *, seed=0, skip=False, max_length=500):
    rows = load_examples(path, "train", streaming=True, skip_bad_rows=skip)
    return PairStream(PairSource(rows, PairBuilder(TOKENIZER, max_length=max_length), skip), seed)


def train_stream(directory, path, ranks=1, **options):
    """8 steps of 4 sequences, which reach into the second pass over 23 examples."""
    torch.manual_seed(0)
    args = arguments(directory, per_device_train_batch_size=4 // ranks, max_steps=8)
    return run(args, path, "full", **options)


def run(args, path, kind, **options):
    trainer = PerceTrainer(
        model_for(kind, dropout=0.3), args, train_dataset=pair_stream(path), processing_class=TOKENIZER
    )  # fmt: skip
    seen, collator = [], trainer.data_collator
    trainer.data_collator = lambda pairs: (seen.append([pair["example"] for pair in pairs]), collator(pairs))[1]
    trainer.train(**options)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return {"steps": logged(trainer, "loss", "grad_norm"), "examples": seen[:8]} | (
        {"weights": weights} if kind == "lora" else {}
    )
