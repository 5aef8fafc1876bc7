"""Token sequences that begin with the same ids, divided into segments so that what they share is computed once.

    chain     a sequence that another one begins with is a part of it: one segment, two places to predict from
    branches  a sequence that goes its own way after n ids shares these, and has a segment for the rest

Replies of a conversation under a template that keeps its turns as they were are a chain; under Qwen3's, which puts an
empty thought before the last reply alone, each reply is a branch of the path that the later ones share:

    ids                                  segments                      path to the end of each sequence
    1 2 3 T 4                            0: 1 2 3 4 5 6 T 7            (0, 3) (1, 2)
    1 2 3 4 5 6 T 7                      1: T 4, behind 3 of 0         (0, 8)

Requests of one persona are branches of it, or, where what follows the persona is to run apart from it, in a forward of
its own, the persona is a segment by itself, the trunk of those behind it:

    ids                                  segments                      path to the end of each sequence
    1 2 3 | 4 5                          0: 1 2 3                      (0, 3) (1, 2)
    1 2 3 | 6                            1: 4 5, behind 3 of 0         (0, 3) (2, 1)
                                         2: 6, behind 3 of 0

A token attends to its own path alone and stands at its own position on it, so it computes what it would by itself: the
mathematics is that of separate sequences, for causal models (Prefix Grouper, arXiv 2506.05433, has the case of one
prompt with several replies).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

Sharing = Literal["none", "chains", "branches"]
UnitKind = Literal["conversation", "persona"]
"""Whose sequences share: columns of the pairs."""
Path = tuple[tuple[int, int], ...]
"""Segments, and how many of the first tokens of each."""


@dataclass(frozen=True)
class Segment:
    """Tokens that follow each other, behind those on `path`, which is () for what begins a sequence."""

    ids: np.ndarray  # (n,)
    path: Path = ()

    @property
    def position(self) -> int:
        """Of its first token."""
        return length_of(self.path)


def length_of(path: Path) -> int:
    return sum(tokens for _, tokens in path)


def segmented(
    sequences: Sequence[Sequence[int]], units: Sequence[int | None], sharing: Sharing
) -> tuple[list[Segment], list[Path]]:
    """The segments of all sequences, and the path to the end of each.

    units: of each sequence; those of one unit may share tokens, and None shares with none.

    A branch is worth its own call of attention, and a mask, where it shares more than it adds: else, and always under
    "chains", the sequence is a segment by itself.
    """
    segments: list[Segment] = []
    paths: list[Path | None] = [None] * len(sequences)
    known: dict[int, list[tuple[np.ndarray, Path]]] = {}  # of each unit, the sequences that have segments
    arrays = [np.asarray(ids, dtype=np.int64) for ids in sequences]
    longest_first = sorted(range(len(arrays)), key=lambda i: -len(arrays[i]))  # what another begins with comes later
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
    """As `segmented`, with the first tokens of each sequence, as many as `trunks` has, in a segment before the others:
    one for all sequences of a unit that have the same."""
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
    """How many of the first ids are the same."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length


def _first(path: Path, tokens: int) -> Path:
    """The part of a path with its first tokens."""
    cut = []
    for segment, length in path:
        if tokens > 0:
            cut.append((segment, min(length, tokens)))
        tokens -= length
    return tuple(cut)


def places(path: Path, starts: Sequence[int]) -> np.ndarray:
    """(T,) where the tokens of a path are, of segments that begin at `starts`."""
    return np.concatenate([np.arange(starts[segment], starts[segment] + tokens) for segment, tokens in path])


class Span(NamedTuple):
    """A segment in a row of several: tokens [start, end), behind those of the half-open ranges `path`, in order. Where
    the row itself stands behind a trunk, all of them are counted from the trunk's first."""

    start: int
    end: int
    path: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Spans:
    """The segments of a row, for attention, and what masks it has made for them: those of a forward's layers are the
    same."""

    spans: tuple[Span, ...]
    before: int = 0  # tokens of the trunk, whose keys and values come from a forward of its own
    masks: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, segments: Mapping[int, Segment], starts: Mapping[int, int], before: int = 0) -> "Spans":
        """Segments by their number, and where each that is one or on a path begins."""
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
        """Segments of such lengths, one after the other, each behind the same trunk."""
        ends = [*accumulate(lengths, initial=trunk)]
        return cls(tuple(Span(start, end, ((0, trunk),)) for start, end in pairwise(ends)), trunk)


class Forward(NamedTuple):
    """Tokens [start, end) of a row that are run together behind a trunk; without `spans` they are one segment."""

    start: int
    end: int
    spans: Spans | None


class Trunk(NamedTuple):
    """Tokens [start, end) of a row, a persona, and the forwards behind them."""

    start: int
    end: int
    forwards: tuple[Forward, ...]


@dataclass(frozen=True, eq=False)
class Trunks:
    """Of a row, in order. detached: personas have no gradient; recomputed: a forward behind one is, in backward."""

    trunks: tuple[Trunk, ...]
    detached: bool
    recomputed: bool
