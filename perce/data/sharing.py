"""Divides token sequences that begin with the same ids into segments, so that shared tokens are computed once.

    chain     one sequence is the beginning of another: they are one segment, with two places to predict from
    branches  a sequence that differs after n ids shares these n, and has a segment of its own for the rest

Replies of a conversation form a chain if the template always renders earlier turns alike. Qwen3's template puts an
empty thought before the last reply only, so that each reply is a branch of the path that the later replies share:

    ids                                  segments                      path to the end of each sequence
    1 2 3 T 4                            0: 1 2 3 4 5 6 T 7            (0, 3) (1, 2)
    1 2 3 4 5 6 T 7                      1: T 4, after 3 of 0          (0, 8)

Requests of one persona are branches of it. If the persona is to have a forward pass of its own, it is a segment by
itself, the trunk of the segments after it:

    ids                                  segments                      path to the end of each sequence
    1 2 3 | 4 5                          0: 1 2 3                      (0, 3) (1, 2)
    1 2 3 | 6                            1: 4 5, after 3 of 0          (0, 3) (2, 1)
                                         2: 6, after 3 of 0

A token attends only to its own path and has its position on that path, so for causal models the result is the same as
with separate sequences (Prefix Grouper, arXiv 2506.05433, treats the case of one prompt with several replies).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

Sharing = Literal["none", "chains", "branches"]
UnitKind = Literal["conversation", "persona"]
"""The column of the pairs that says which sequences may share tokens."""
Path = tuple[tuple[int, int], ...]
"""(segment, number of its first tokens that are on the path), in order."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens that come after those on `path`, which is () at the beginning of a sequence."""

    ids: np.ndarray  # (n,)
    path: Path = ()

    @property
    def position(self) -> int:
        """Position of the first token."""
        return length_of(self.path)


def length_of(path: Path) -> int:
    return sum(tokens for _, tokens in path)


def segmented(
    sequences: Sequence[Sequence[int]], units: Sequence[int | None], sharing: Sharing
) -> tuple[list[Segment], list[Path]]:
    """The segments of all sequences, and the path to the end of each.

    units: the unit of each sequence. Sequences of one unit may share tokens; with None a sequence shares none.

    A branch needs a call of attention of its own, and a mask, which pays if it shares more tokens than it adds.
    Otherwise, and always with "chains", the sequence is a segment by itself.
    """
    segments: list[Segment] = []
    paths: list[Path | None] = [None] * len(sequences)
    known: dict[int, list[tuple[np.ndarray, Path]]] = {}  # unit → its sequences that have segments of their own
    arrays = [np.asarray(ids, dtype=np.int64) for ids in sequences]
    longest_first = sorted(range(len(arrays)), key=lambda i: -len(arrays[i]))  # a beginning comes after the whole
    for index in range(len(arrays)) if sharing == "none" else longest_first:
        ids, unit = arrays[index], None if sharing == "none" else units[index]
        others = [] if unit is None else known.setdefault(unit, [])
        common, path = max(
            ((common_tokens(ids, other), path) for other, path in others), default=(0, ()), key=lambda x: x[0]
        )
        rest = len(ids) - common
        if rest and (sharing == "chains" or common <= rest):
            common, path = 0, ()
        path = _first(path, common)
        if common < len(ids):
            path = (*path, (len(segments), len(ids) - common))
            segments.append(Segment(ids[common:], path[:-1]))
            others.append((ids, path))
        paths[index] = path
    return segments, [path for path in paths if path is not None]


def segmented_on_trunks(
    sequences: Sequence[Sequence[int]], units: Sequence[int | None], sharing: Sharing, trunks: Sequence[int]
) -> tuple[list[Segment], list[Path]]:
    """Like `segmented`, but the first tokens of each sequence, `trunks` says how many, are a segment of their own. The
    sequences of a unit that begin with the same tokens share it."""
    members: dict[Any, list[int]] = {}
    for index, (ids, unit, tokens) in enumerate(zip(sequences, units, trunks, strict=True)):
        alone = unit is None or sharing == "none"
        members.setdefault(index if alone else (unit, *ids[:tokens]), []).append(index)
    segments: list[Segment] = []
    paths: list[Path] = [()] * len(sequences)
    for indices in members.values():
        first, tokens = len(segments), trunks[indices[0]]
        rests, ends = segmented([sequences[i][tokens:] for i in indices], [units[i] for i in indices], sharing)

        def behind(path: Path, first: int = first, tokens: int = tokens) -> Path:
            return (first, tokens), *((first + 1 + segment, length) for segment, length in path)

        trunk = np.asarray(sequences[indices[0]][:tokens], dtype=np.int64)
        segments += [Segment(trunk), *(Segment(rest.ids, behind(rest.path)) for rest in rests)]
        for index, end in zip(indices, ends, strict=True):
            paths[index] = behind(end)
    return segments, paths


def common_tokens(one: np.ndarray, other: np.ndarray) -> int:
    """The number of first ids that two sequences share."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length


def _first(path: Path, tokens: int) -> Path:
    """The part of a path that holds its first `tokens` tokens."""
    cut = []
    for segment, length in path:
        if tokens > 0:
            cut.append((segment, min(length, tokens)))
        tokens -= length
    return tuple(cut)


def places(path: Path, starts: Sequence[int]) -> np.ndarray:
    """(T,) the places of a path's tokens if the segments begin at `starts`."""
    return np.concatenate([np.arange(starts[segment], starts[segment] + tokens) for segment, tokens in path])


class Span(NamedTuple):
    """A segment in a row of several: tokens [start, end), which come after the tokens in the half-open ranges `path`,
    in order. If the row comes after a trunk, all numbers count from the trunk's first token."""

    start: int
    end: int
    path: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Spans:
    """The segments of a row, for attention, and the masks that attention has made for them, which all layers of a
    forward share."""

    spans: tuple[Span, ...]
    before: int = 0  # tokens of the trunk, which has a forward of its own
    masks: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, segments: Mapping[int, Segment], starts: Mapping[int, int], before: int = 0) -> "Spans":
        """From segments by number; `starts` says where they and the segments on their paths begin."""
        return cls(
            tuple(
                Span(
                    starts[number], starts[number] + len(segment.ids),
                    tuple((starts[i], starts[i] + tokens) for i, tokens in segment.path),
                )
                for number, segment in segments.items()
            ),
            before,
        )  # fmt: skip

    @classmethod
    def behind(cls, trunk: int, lengths: Sequence[int]) -> "Spans":
        """Consecutive segments of these lengths, which all come after the same trunk."""
        ends = [*accumulate(lengths, initial=trunk)]
        return cls(tuple(Span(start, end, ((0, trunk),)) for start, end in pairwise(ends)), trunk)


class Forward(NamedTuple):
    """Tokens [start, end) of a row that are run together after a trunk; without `spans` they are one segment."""

    start: int
    end: int
    spans: Spans | None


class Trunk(NamedTuple):
    """Tokens [start, end) of a row, which are a persona, and the forwards after them."""

    start: int
    end: int
    forwards: tuple[Forward, ...]


@dataclass(frozen=True, eq=False)
class Trunks:
    """The trunks of a row, in order. detached: personas get no gradient. recomputed: backward repeats each forward that
    comes after a trunk."""

    trunks: tuple[Trunk, ...]
    detached: bool
    recomputed: bool
