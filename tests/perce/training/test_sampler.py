"""Batches under a token budget or of a number of replies, and their order."""

import random
from collections import Counter
from itertools import accumulate, pairwise

import pytest

from perce.training.sampler import ReplyBatches, TokenBatches, dealt, in_order
from tests.helpers.models import LENGTHS, drawn


def test_batches_respect_the_budget_and_hold_every_sequence_once():
    batches = drawn()
    assert sorted(index for batch in batches for index in batch) == list(range(len(LENGTHS)))
    padded = [len(batch) * max(LENGTHS[index] for index in batch) for batch in batches]
    assert [cost for cost in padded if cost > 1000] == [1200] and [500] in batches, "an over-long sequence is alone"
    assert sum(padded) < 1.1 * sum(LENGTHS), "padding"
    assert len(batches) < 1.25 * sum(LENGTHS) / 1000, "too many batches are far from full"


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


ENDS = [0, *accumulate(random.Random(1).choices(range(1, 12), k=100))]  # conversations of up to 11 replies
CONVERSATIONS = [list(range(start, end)) for start, end in pairwise(ENDS)]
CONVERSATION_OF = {reply: number for number, replies in enumerate(CONVERSATIONS) for reply in replies}


def replies(epoch=0, conversations=CONVERSATIONS, most=8, **options):
    batches = ReplyBatches([[one] for one in conversations], most, **({"seed": 7} | options))
    batches.set_epoch(epoch)
    return list(batches)


@pytest.mark.parametrize("epoch", [0, 1])
def test_every_reply_is_dealt_once_an_epoch_beside_those_of_its_conversation(epoch):
    batches = replies(epoch)
    assert sorted(reply for batch in batches for reply in batch) == list(range(ENDS[-1]))
    assert max(map(len, batches)) == 8 and len(batches) < 1.05 * ENDS[-1] / 8, "as full as possible"
    whole = 0
    for conversation in CONVERSATIONS:
        pieces = sorted(filter(None, ([reply for reply in batch if reply in conversation] for batch in batches)))
        whole += pieces == [part for part in (conversation[:8], conversation[8:]) if part]
    assert whole >= 0.95 * len(CONVERSATIONS), "cut only if more than a quarter of a batch would be empty"


def test_a_batch_is_filled_where_whole_conversations_leave_much_of_it_empty():
    """Steps of conversations of five replies have seven or eight replies, not five."""
    fives = [list(range(start, start + 5)) for start in range(0, 400, 5)]
    batches = replies(conversations=fives)
    assert sorted(map(len, batches))[1] >= 6 and len(batches) <= 60
    assert sorted(reply for batch in batches for reply in batch) == list(range(400))


def test_conversations_meet_others_each_epoch_in_equally_many_batches():
    assert replies() == replies()
    assert replies() != replies(epoch=1) and replies() != replies(seed=8)
    assert len({len(replies(epoch)) for epoch in range(20)}) == 1
    met = [{frozenset(CONVERSATION_OF[reply] for reply in batch) for batch in replies(epoch)} for epoch in (0, 1)]
    several = [{numbers for numbers in of_epoch if len(numbers) > 1} for of_epoch in met]
    assert len(several[0] & several[1]) < 0.1 * len(several[0])
    alone = [[reply] for reply in range(21)]
    assert sorted(map(len, replies(conversations=alone))) == [5, 8, 8], "as without conversations"


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_ranks_take_turns_at_replies_too(ranks):
    whole, parts = replies(), [replies(rank=rank, ranks=ranks) for rank in range(ranks)]
    turns = [batch for turn in zip(*parts, strict=True) for batch in turn]
    assert turns[: len(whole)] == whole and turns[len(whole) :] == whole[: len(turns) - len(whole)]


def test_without_chance_conversations_follow_each_other_and_are_whole_if_they_can_be():
    batches = in_order([[0, 1, 2], [3, 4], [5], [6, 7, 8, 9, 10, 11]], 5)
    assert batches == [[0, 1, 2, 3, 4], [5], [6, 7, 8, 9, 10], [11]]
    assert [dealt(batches, rank, 3) for rank in range(3)] == [
        [[0, 1, 2, 3, 4], [11]], [[5], [0, 1, 2, 3, 4]], [[6, 7, 8, 9, 10], [5]],
    ]  # fmt: skip


def test_units_under_a_budget_stay_together():
    units = [[2 * unit, 2 * unit + 1] for unit in range(len(LENGTHS))]
    batches = TokenBatches(LENGTHS, 1000, units, seed=7)
    assert list(batches) == [[index for unit in batch for index in units[unit]] for batch in drawn()]


def test_a_persona_meets_its_requests_in_another_order_each_epoch():
    """Conversations of one, two and three replies; a batch of eight has up to four of a persona, and stays full."""
    ends = [0, *accumulate(random.Random(2).choices((1, 1, 1, 2, 3), k=200))]
    conversations = [list(range(start, end)) for start, end in pairwise(ends)]
    persona_of = {index: number // 10 for number, indices in enumerate(conversations) for index in indices}
    units = [conversations[start : start + 10] for start in range(0, 200, 10)]
    sampler, dealt = ReplyBatches(units, 8, 4, seed=0), []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        dealt.append(list(sampler))
        assert sorted(index for batch in dealt[-1] for index in batch) == list(range(ends[-1]))
        assert len(dealt[-1]) == len(sampler) <= ends[-1] // 8 + 2
        together = [count for batch in dealt[-1] for count in Counter(map(persona_of.get, batch)).values()]
        assert ends[-1] / len(together) > 3, "groups of at most four"
    met = [{frozenset(batch) for batch in batches} for batches in dealt]
    assert len(met[0] & met[1]) < 0.2 * len(met[0])
    assert dealt[0] == list(ReplyBatches(units, 8, 4, seed=0))
    parts = [list(ReplyBatches(units, 8, 4, seed=0, rank=rank, ranks=2)) for rank in range(2)]
    assert [batch for turn in zip(*parts, strict=True) for batch in turn][: len(dealt[0])] == dealt[0]
