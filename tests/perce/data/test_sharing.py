"""Shared beginnings of sequences are computed once, and every token keeps its position on its own path."""

import numpy as np
import pytest

from perce.data.sharing import Segment, Spans, length_of, places, segmented

CHAIN = [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]]
THOUGHT = [[1, 2, 3, 0, 4], [1, 2, 3, 4, 5, 6, 0, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]]  # as Qwen3 renders the last reply


def rebuilt(sequences, units=None, sharing="branches"):
    """(number of tokens computed, the sequences put together from their paths)."""
    segments, paths = segmented(sequences, units or [0] * len(sequences), sharing)
    starts = np.cumsum([0, *(len(segment.ids) for segment in segments)])[:-1].tolist()
    row = np.concatenate([segment.ids for segment in segments])
    return len(row), [row[places(path, starts)].tolist() for path in paths]


@pytest.mark.parametrize("sharing", ["none", "chains", "branches"])
@pytest.mark.parametrize("sequences", [CHAIN, CHAIN[::-1], THOUGHT, [[5]], [[1, 2], [1, 2]], [[1, 2], [3, 4]]])
def test_every_path_is_its_sequence(sequences, sharing):
    assert rebuilt(sequences, sharing=sharing)[1] == sequences


@pytest.mark.parametrize(
    ("sequences", "none", "chains", "branches"),
    [(CHAIN, 15, 7, 7), (THOUGHT, 23, 23, 10 + 2 + 2), ([[1, 2], [1, 2]], 4, 2, 2)],
)
def test_what_is_shared_is_computed_once(sequences, none, chains, branches):
    found = [rebuilt(sequences, sharing=sharing)[0] for sharing in ("none", "chains", "branches")]
    assert found == [none, chains, branches]


def test_a_branch_that_is_longer_than_what_it_shares_is_by_itself():
    assert rebuilt([[1, 2, 3, 4, 5, 6], [1, 2, 7, 8]])[0] == 10
    assert rebuilt([[1, 2, 3, 4, 5, 6], [1, 2, 3, 8]])[0] == 7


def test_only_what_is_of_one_unit_is_shared():
    assert rebuilt(CHAIN, [0, 0, 1])[0] == 5 + 7
    assert rebuilt(CHAIN, [None, None, None])[0] == 15


def test_a_branch_may_hang_on_a_branch():
    sequences = [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 20, 21], [1, 2, 3, 4, 5, 20, 22]]
    segments, paths = segmented(sequences, [0, 0, 0], "branches")
    assert [segment.path for segment in segments] == [(), ((0, 5),), ((0, 5), (1, 1))]
    assert [segment.position for segment in segments] == [0, 5, 6]
    assert [length_of(path) for path in paths] == [8, 7, 7]
    assert [tuple(span) for span in Spans.of(dict(enumerate(segments)), {0: 0, 1: 8, 2: 10}).spans] == [
        (0, 8, ()), (8, 10, ((0, 5),)), (10, 11, ((0, 5), (8, 9)))
    ]  # fmt: skip


def test_chance_trees_are_their_sequences():
    generator = np.random.default_rng(0)
    for _ in range(200):
        sequences = [generator.integers(0, 2, generator.integers(1, 12)).tolist() for _ in range(6)]
        units = generator.integers(0, 2, 6).tolist()
        for sharing in ("none", "chains", "branches"):
            assert rebuilt(sequences, units, sharing)[1] == sequences
            assert all(not x.path for x in segmented(sequences, units, sharing)[0] if sharing != "branches")


def test_an_empty_path_is_the_beginning():
    assert Segment(np.array([1])).position == 0
