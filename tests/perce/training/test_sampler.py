"""Batches under a token budget, and their order."""

import pytest

from perce.training.sampler import TokenBatches
from tests.helpers.models import LENGTHS, drawn


def test_batches_respect_the_budget_and_hold_every_sequence_once():
    batches = drawn()
    assert sorted(index for batch in batches for index in batch) == list(range(len(LENGTHS)))
    padded = [len(batch) * max(LENGTHS[index] for index in batch) for batch in batches]
    assert [cost for cost in padded if cost > 1000] == [1200] and [500] in batches, "an over-long sequence is alone"
    assert sum(padded) < 1.1 * sum(LENGTHS), "padding"
    assert len(batches) < 1.25 * sum(LENGTHS) / 1000, "batches that are far from full"


def test_the_order_depends_on_seed_and_epoch_and_their_number_on_the_lengths_alone():
    assert drawn() == drawn()
    assert drawn() != drawn(epoch=1) and drawn() != drawn(seed=8)
    assert {frozenset(batch) for batch in drawn()} != {frozenset(batch) for batch in drawn(epoch=1)}
    assert len({len(drawn(epoch)) for epoch in range(20)}) == 1


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_ranks_take_turns_and_get_equally_many(ranks):
    whole = drawn()
    parts = [drawn(rank=rank, ranks=ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {len(TokenBatches(LENGTHS, 1000, seed=0, ranks=ranks))}
    dealt = [batch for turn in zip(*parts, strict=True) for batch in turn]
    assert dealt[: len(whole)] == whole and dealt[len(whole) :] == whole[: len(dealt) - len(whole)]
    assert all(len(drawn(lengths=[5], rank=rank, ranks=ranks)) == 1 for rank in range(ranks)), (
        "fewer batches than ranks"
    )
