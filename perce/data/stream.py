"""Pairs read and built while training, for data too large to read first: endless, shuffled in blocks, dealt to ranks.

    pass 0, pass 1, …  →  blocks of BLOCK examples, each shuffled by (seed, pass, block)  →  example k to share k mod n

The order depends on the seed alone. The passes follow each other without an end, which processes might reach at
different times. So a resumed run gets the examples that it would have got: the Trainer skips as many batches as were
trained on. Every process reads and checks all rows, which is cheap, and tokenises only its share, which is not.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from perce.data.pairing import PairSource
from perce.data.rows import Record
from perce.errors import UserError

BLOCK = 1000  # examples that are read, shuffled and handed out together


class PairStream(IterableDataset):
    """Columns of pairs, without end; UserError if a row cannot be used, or if no example of a pass fits.

    Args:
        source: the examples, and the builder of their pairs.
        seed: of the order.
        share: (k, n): this process takes every n-th example from the k-th on. Loader workers divide these further.
    """

    column_names = ("input_ids", "response_length")  # a selection, by which pairs are told from raw rows

    def __init__(self, source: PairSource, seed: int, share: tuple[int, int] = (0, 1)):
        self.source, self.seed, self._share = source, seed, share

    def of_process(self, rank: int, ranks: int) -> "PairStream":
        """The same stream, restricted to the share of one process."""
        return PairStream(self.source, self.seed, (rank, ranks))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        mine, shares = self._share
        if worker := get_worker_info():
            mine, shares = mine * worker.num_workers + worker.id, shares * worker.num_workers
        unfit_in_a_row, place = 0, 0
        for number in itertools.count():
            started = place
            for index, example in self._shuffled(number):
                if place % shares == mine:
                    pairs = self.source.build(index, example)
                    unfit_in_a_row = 0 if pairs else unfit_in_a_row + 1
                    yield from pairs
                place += 1
            self.source.end_of_pass()
            if unfit_in_a_row >= place - started:
                raise UserError(self.source.nothing_left())

    def _shuffled(self, number: int) -> Iterator[tuple[int, Record]]:
        """The examples of a pass, shuffled in blocks, each with its index in the data."""
        examples = iter(enumerate(self.source.examples))
        for block in itertools.count():
            drawn = list(itertools.islice(examples, BLOCK))
            if not drawn:
                return
            random.Random(f"{self.seed}-{number}-{block}").shuffle(drawn)
            yield from drawn
