"""Which examples make a batch, and the order of the batches, which depends only on (seed, epoch).

TokenBatches: batches under a token budget, of sequences of similar length.

    sort by length → buckets whose longest sequence is at most a tenth longer than the shortest
    each epoch: shuffle every bucket, cut it into batches of budget // longest sequences, shuffle the batches

Sequences left over from a bucket join the next, longer one, so only one batch of the epoch is not full.

ReplyBatches: batches of a number of replies, with those of a conversation, or several of a persona, together.

    cut conversations of more replies than a batch has → pack pieces into batches, by how many replies they have
    each epoch: shuffle the pieces of a size among the places of that size, shuffle the batches

The number of batches depends only on the lengths, or on the numbers of replies, so it is the same in every epoch, which
the Trainer relies on.
"""

import itertools
import random
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch.utils.data import Sampler

BUCKET_RATIO = 1.1  # longest ÷ shortest of a bucket: at most 9 % padding, except for sequences left over from another
Batches = list[list[int]]


class SeededBatches(Sampler[list[int]]):
    """The batches of one process, lists of indices, whose order the seed and the epoch decide.

    All processes draw the same batches and take turns: batches k·ranks … (k + 1)·ranks − 1 are the k-th of each. If
    the number does not divide evenly, the first few of the epoch are used again, so that no process waits for another.

    Args:
        seed: decides the order, together with the epoch. The Trainer calls `set_epoch`, also after a resume.
        rank, ranks: this process and how many there are.
    """

    def __init__(self, *, seed: int, rank: int = 0, ranks: int = 1):
        self._seed, self._rank, self._ranks = seed, rank, ranks
        self._epoch = 0
        self._len = sum(1 for _ in self)

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(f"{self._seed}-{self._epoch}")
        batches = self._drawn(rng)
        rng.shuffle(batches)
        return iter(dealt(batches, self._rank, self._ranks))

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    @property
    def sampler(self) -> "SeededBatches":
        """Where accelerate looks for set_epoch when a resume has put its SkipBatchSampler before this one."""
        return self

    @abstractmethod
    def _drawn(self, rng: random.Random) -> Batches:
        """An epoch's batches for all processes."""


class TokenBatches(SeededBatches):
    """Batches whose (number of units × longest unit) is at most the budget; a unit beyond the budget is alone.

    Args:
        lengths: tokens of each unit.
        budget: tokens of a batch, including padding.
        units: indices of the examples that form one row, or one tree; default: each example is a unit.
    """

    def __init__(
        self, lengths: Sequence[int], budget: int, units: Sequence[Sequence[int]] | None = None, **order: int
    ):  # fmt: skip
        self._buckets = _buckets(lengths, budget)
        self._units = units
        super().__init__(**order)

    def _drawn(self, rng: random.Random) -> Batches:
        batches: Batches = []
        left: list[int] = []
        for indices, size in self._buckets:
            pool = left + rng.sample(indices, len(indices))
            full = len(pool) - len(pool) % size
            batches += [pool[start : start + size] for start in range(0, full, size)]
            left = pool[full:]
        if left:
            batches.append(left)
        if self._units is None:
            return batches
        return [[index for unit in batch for index in self._units[unit]] for batch in batches]


class Part(NamedTuple):
    """Replies [start, stop) of the number-th piece that has `size` of them."""

    size: int
    number: int
    start: int
    stop: int


class ReplyBatches(SeededBatches):
    """Batches of at most `replies` examples: whole conversations, pieces of longer ones, and beginnings that fill up.

    Args:
        units: lists of conversations, which are lists of indices: all those of a persona, or one by itself.
        together: at most so many examples of a unit are put together; default: as many as a batch has.
    """

    def __init__(
        self, units: Iterable[Sequence[Sequence[int]]], replies: int, together: int | None = None, **order: int
    ):  # fmt: skip
        self._units, self._together = list(units), min(together or replies, replies)
        sizes = Counter(map(len, drawn_pieces(self._units, self._together, random.Random(0))))
        self._places = places(sizes, replies)
        super().__init__(**order)

    def _drawn(self, rng: random.Random) -> Batches:
        of_size: dict[int, Batches] = defaultdict(list)
        for piece in drawn_pieces(self._units, self._together, rng):
            of_size[len(piece)].append(piece)
        drawn = {size: rng.sample(pieces, len(pieces)) for size, pieces in sorted(of_size.items())}
        return [
            [index for part in batch for index in drawn[part.size][part.number][part.start : part.stop]]
            for batch in self._places
        ]


def pieces(conversations: Iterable[Sequence[int]], replies: int) -> Iterator[list[int]]:
    """The conversations; those with more than `replies` are cut into consecutive pieces of `replies`, and a rest."""
    for indices in conversations:
        yield from (list(indices[start : start + replies]) for start in range(0, len(indices), replies))


def drawn_pieces(units: Iterable[Sequence[Sequence[int]]], replies: int, rng: random.Random) -> Iterator[list[int]]:
    """Pieces of units, with the conversations of each unit in a drawn order. The order does not change how many pieces
    have which size."""
    drawn = (itertools.chain(*rng.sample(unit, len(unit))) for unit in units)
    yield from pieces(map(list, drawn), replies)


def places(counts: Mapping[int, int], replies: int) -> list[list[Part]]:
    """Batches of at most `replies`, from counts[size] pieces of each size: the largest first, then whatever fits. If
    none fits and more than a quarter is empty, the beginning of a smallest one, because otherwise a step would hold far
    fewer replies than it was asked to; its rest becomes a piece by itself."""
    left: list[list[Part]] = [[] for _ in range(replies + 1)]  # by how many replies they still have
    for size, count in counts.items():
        left[size] = [Part(size, number, 0, size) for number in range(count)]
    batches: list[list[Part]] = []
    while any(left):
        batch, room = [], replies
        while size := next((size for size in range(room, 0, -1) if left[size]), 0):
            batch.append(left[size].pop())
            room -= size
        if room > replies // 4 and (size := next((size for size, parts in enumerate(left) if parts), 0)):
            part = left[size].pop()
            batch.append(part._replace(stop=part.start + room))
            left[size - room].append(part._replace(start=part.start + room))
        batches.append(batch)
    return batches


def in_order(conversations: Iterable[Sequence[int]], replies: int) -> Batches:
    """Batches of at most `replies` examples in a fixed order: conversation by conversation, each whole if it fits."""
    batches: Batches = []
    for piece in pieces(conversations, replies):
        if not batches or len(batches[-1]) + len(piece) > replies:
            batches.append([])
        batches[-1] += piece
    return batches


def dealt(batches: Batches, rank: int, ranks: int) -> Batches:
    """The batches of one process. Each has the same number: if it does not divide evenly, the first are used again."""
    even = len(batches) + -len(batches) % ranks
    return list(itertools.islice(itertools.cycle(batches), rank, even, ranks))


def _buckets(lengths: Sequence[int], budget: int) -> list[tuple[list[int], int]]:
    """(indices, units per batch) from the shortest to the longest."""
    buckets: Batches = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not buckets or lengths[index] > BUCKET_RATIO * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(index)
    return [(bucket, max(budget // lengths[bucket[-1]], 1)) for bucket in buckets]
