"""The shape of a step that is planned: how many sequences and tokens a forward pass has, and what of them is shared."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from perce.config.schema import MemoryConfig
from perce.config.step import StepConfig
from perce.data.documents import short_windows
from perce.data.sharing import Segment, segmented
from perce.objectives import OBJECTIVES, Objective


@dataclass(frozen=True)
class StepShape:
    """One forward and backward of B sequences: one row each, or segments of one row if they share tokens."""

    batch: int
    tokens: int  # T, input tokens per sequence
    tokens_cf: int  # input tokens per counterfactual sequence; 0: no counterfactual pass
    rows: int  # N, response tokens of all sequences
    accumulates: bool  # gradients of an earlier forward are alive already
    sequences_cf: int = 0  # 0: B
    prefix: int = 0  # tokens of each factual sequence, its persona, that have a forward of their own
    detached: bool = True  # whether the prefix gets no gradient
    objective: Objective = OBJECTIVES["perce"]
    replies: int = 1  # per sequence, which ends with the last reply
    turn: int = 0  # tokens from the end of one reply to the end of the next
    branch: int = 0  # tokens of an earlier reply's branch next to its copy in the sequence; 0: it has no branch
    requests: int = 1  # sequences per persona
    persona: int = 0  # tokens of the persona that these sequences begin with
    together: int = 0  # requests per forward after the persona, each recomputed in backward; 0: all, not recomputed

    @property
    def segments(self) -> list[Segment]:
        """The segments that the factual pass computes, with placeholder ids."""
        if self.requests == 1:
            return self._divided(self.batch, self.tokens)
        ids, found = np.zeros(self.tokens, dtype=np.int64), []
        for first in range(0, self.batch, self.requests):
            another = Segment(ids[self.persona :], ((first, self.persona),))
            found += [Segment(ids), *[another] * (self.requests - 1)]
        return found

    @property
    def shares(self) -> bool:
        """Whether sequences share tokens, as segments of one row."""
        return self.replies > 1 or self.requests > 1

    @property
    def personas(self) -> int:
        """The number of personas that are computed."""
        return self.batch // self.requests

    @property
    def segments_cf(self) -> list[Segment]:
        return self._divided((self.sequences_cf or self.batch) if self.tokens_cf else 0, self.tokens_cf)

    @property
    def computed(self) -> int:
        """Input tokens of the factual pass."""
        return sum(len(segment.ids) for segment in self.segments)

    def _divided(self, sequences: int, tokens: int) -> list[Segment]:
        return _divided(sequences, tokens, self.replies, self.turn, self.branch)


@functools.lru_cache(maxsize=32)  # slow for a long context
def _divided(sequences: int, tokens: int, replies: int, turn: int, branch: int) -> list[Segment]:
    """Sequences shaped like those of a conversation, divided into segments as a batch is."""
    path: Any = np.arange(1, tokens + 1)
    earlier = [path[: tokens - before * turn] for before in range(1, replies)]
    if branch:
        own = np.zeros(branch, dtype=path.dtype)  # ids that are no part of the path
        earlier = [np.concatenate([ids[:-branch], own]) for ids in earlier]
    conversation = [path, *earlier]
    units = [number for number in range(sequences) for _ in conversation]
    return segmented(conversation * sequences, units, "branches")[0]


def shape_of(step: StepConfig, memory: MemoryConfig) -> StepShape:
    """The shape of one forward. The last token of a sequence is only a target, in both passes. If personas have a
    forward of their own, a conversation is planned as one sequence of all its branches."""
    batch, accumulates = step.sequences, step.forwards > 1
    objective, tokens = step.computed, step.context - 1
    rows, prefix = step.batch * step.response, 0
    conversation: dict[str, int] = {}
    copies = 0
    if memory.share_persona > 1:
        persona = step.context - step.without_persona
        conversation = {"requests": memory.share_persona, "persona": persona}
    elif memory.on_trunks:
        copies = (step.replies - 1) * (step.response - 1) * step.branches
    elif step.replies > 1:
        turn, branch = step.query + step.response, (step.response - 1) * step.branches
        conversation = {"replies": step.replies, "turn": turn, "branch": branch}
    if step.of_documents:
        windows = short_windows(step.context, step.short_context, step.short_stride)
        tokens_cf, sequences_cf = max(end - start for start, end, _ in windows) - 1, batch * len(windows)
        rows = batch * tokens
    else:
        tokens, tokens_cf, sequences_cf = tokens + copies, step.without_persona - 1 + copies, batch
        prefix = tokens - tokens_cf if memory.on_trunks else 0
    return StepShape(
        batch, tokens, tokens_cf if objective.counterfactual else 0, rows, accumulates, sequences_cf, prefix,
        memory.persona_grad == "none", objective, together=memory.branches_per_forward, **conversation,
    )  # fmt: skip
