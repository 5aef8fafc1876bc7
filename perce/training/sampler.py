"""Batches under a token budget: sequences of similar length together, in an order that (seed, epoch) decides alone.

    sort by length → buckets whose longest sequence is at most a tenth longer than the shortest
    each epoch: shuffle every bucket, cut it into batches of budget // longest sequences, shuffle the batches

What a bucket leaves over joins the next, longer one, so that a single batch of the epoch is not full. How many batches
there are follows from the lengths alone: it is the same in every epoch, which the Trainer relies on.
"""

import itertools
import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

BUCKET_RATIO = 1.1  # longest ÷ shortest of a bucket: at most 9 % padding, but for what a shorter bucket left over


class TokenBatches(Sampler[list[int]]):
    """The batches of one process: lists of indices whose count × longest is at most the budget; a longer one is alone.

    All processes draw the same batches and take turns: batches k·ranks … (k + 1)·ranks − 1 are the k-th of each. Where
    they do not come out even, the first few of the epoch are dealt again, so that no process waits for another.

    Args:
        lengths: tokens of each sequence of the dataset.
        budget: tokens of a batch, padding included.
        seed: decides, with the epoch, the order; `set_epoch` is called by the Trainer, also after a resume.
        rank, ranks: this process and how many there are.
    """

    def __init__(self, lengths: Sequence[int], budget: int, *, seed: int, rank: int = 0, ranks: int = 1):
        self._buckets = _buckets(lengths, budget)
        self._seed, self._rank, self._ranks = seed, rank, ranks
        self._epoch = 0
        self._len = len(self._drawn()) // ranks

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._drawn()[self._rank :: self._ranks])

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    @property
    def sampler(self) -> "TokenBatches":
        """Where accelerate looks for set_epoch when a resume has put its SkipBatchSampler before this one."""
        return self

    def _drawn(self) -> list[list[int]]:
        """The epoch's batches, of all processes."""
        rng = random.Random(f"{self._seed}-{self._epoch}")
        batches: list[list[int]] = []
        left: list[int] = []
        for indices, size in self._buckets:
            pool = left + rng.sample(indices, len(indices))
            full = len(pool) - len(pool) % size
            batches += [pool[start : start + size] for start in range(0, full, size)]
            left = pool[full:]
        if left:
            batches.append(left)
        rng.shuffle(batches)
        even = len(batches) + -len(batches) % self._ranks
        return list(itertools.islice(itertools.cycle(batches), even))


def _buckets(lengths: Sequence[int], budget: int) -> list[tuple[list[int], int]]:
    """(indices, sequences a batch) from the shortest to the longest."""
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not buckets or lengths[index] > BUCKET_RATIO * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(index)
    return [(bucket, max(budget // lengths[bucket[-1]], 1)) for bucket in buckets]
