"""Which examples are batched together."""

import pytest

from perce.data.pairs import Pair
from perce.data.sharing import segmented
from perce.measuring import inference
from perce.measuring.inference import batches_that_share
from tests.helpers.replies import conversation


def pairs_of(*conversations):
    return [Pair(**pair, passages=[0], dropped_passages=0) for pairs in conversations for pair in pairs]


def computed(pairs):
    segments, _ = segmented([x.input_ids[:-1] for x in pairs], [x.conversation for x in pairs], "branches")
    return sum(len(segment.ids) for segment in segments)


@pytest.mark.parametrize("thought", [False, True])
def test_batches_hold_whole_conversations_and_consecutive_pieces_of_long_ones(thought, monkeypatch):
    monkeypatch.setattr(inference, "ROOM", 1.2)
    pairs = pairs_of(conversation(16, 0, thought), conversation(3, 1, thought), conversation(1, 2))
    assert [sorted(rows) for rows in batches_that_share(pairs, "branches", 8, 4096)] == [list(range(20))]
    one_by_one = [list(rows) for rows in batches_that_share(pairs, "branches", 1, 4096)]
    assert one_by_one == [[19], [16, 17, 18], list(range(16))], "a conversation counts as one sequence"
    assert max(map(len, batches_that_share(pairs, "none", 8, 4096))) == 8
    cut = [list(rows) for rows in batches_that_share(pairs, "branches", 8, 60)]
    assert sorted(row for rows in cut for row in rows) == list(range(20))
    for rows in cut:
        assert rows == list(range(rows[0], rows[-1] + 1))
        longest = max(len(pairs[row].input_ids) for row in rows)
        assert computed([pairs[row] for row in rows]) <= max(60, 1.2 * longest)
    assert (list(range(16)) in cut) != thought, "replies that continue each other are not divided"
