"""Lengths of sequences, and the batches drawn of them under a budget."""

import random

from perce.training.sampler import TokenBatches

LENGTHS = [random.Random(0).randint(20, 400) for _ in range(500)] + [1200]


def drawn(epoch=0, lengths=LENGTHS, budget=1000, **options):
    batches = TokenBatches(lengths, budget, **({"seed": 7} | options))
    batches.set_epoch(epoch)
    return list(batches)
