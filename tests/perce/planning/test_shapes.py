"""A step is planned in the shape that its batches have."""

import random
from dataclasses import asdict, replace
from itertools import accumulate

import pytest

from perce import MemoryConfig
from perce.config.step import StepConfig
from perce.data.batch import collate
from perce.data.documents import DocumentPair, short_windows
from perce.data.sharing import Spans
from perce.planning.shapes import shape_of
from tests.helpers.plans import NONE, SHORT, TALK, TREE


def test_documents_are_planned_with_their_windows():
    plan = replace(SHORT, context=100, objective="longce", short_context=24, short_stride=8)
    piece = DocumentPair(list(range(100)), short_windows(100, 24, 8), 99, [False] * 99)
    batch = collate([vars(piece)])
    shape = shape_of(plan, MemoryConfig())
    assert (shape.batch, shape.tokens) == tuple(batch["input_ids"].shape)
    assert (shape.sequences_cf, shape.tokens_cf) == tuple(batch["input_ids_cf"].shape)
    assert shape.rows == batch["target"].numel()


@pytest.mark.parametrize("step", [TALK, TREE, replace(TREE, query=30, response=1), replace(TREE, query=4, response=26)])
def test_a_conversation_is_planned_as_a_batch_arranges_it(step):
    """A reply that is longer than the tokens before it shares none: here the last one, without its persona."""
    from benchmarks.step_memory import pairs

    spec = asdict(step) | {"model": {"vocab_size": 400}}
    batch, shape = collate(pairs(spec, 6), sharing="branches"), shape_of(step, MemoryConfig())
    assert shape.rows == batch["target"].numel()
    for suffix, segments in (("", shape.segments), ("_cf", shape.segments_cf)):
        starts = [0, *accumulate(len(segment.ids) for segment in segments)]
        assert starts[-1] == batch[f"input_ids{suffix}"].numel()
        expected = Spans.of(dict(enumerate(segments)), dict(enumerate(starts)))
        assert expected.spans == batch[f"spans{suffix}"].spans
    assert shape.computed + starts[-1] == batch["tokens"][0]


@pytest.mark.parametrize("memory", [{}, {"branches_per_forward": 2}, {"persona_grad": "none"}], ids=str)
def test_requests_of_a_persona_are_planned_as_a_batch_arranges_them(memory):
    options = MemoryConfig(share_persona=3, **memory)
    step = StepConfig(context=60, query=6, response=5, per_device_train_batch_size=6)
    shape, persona = shape_of(step, options), 60 - 6 - 5
    rng = random.Random(0)
    made = []
    for number in range(6):
        shown = random.Random(number // 3).choices(range(400), k=4 + persona)
        ids = shown + rng.choices(range(400), k=60 - len(shown))
        span = {"persona_span": (4, 4 + persona), "persona": number // 3, "conversation": number}
        made.append(span | {"input_ids": ids, "response_length": 5, "personal": [False] * 5})
    batch = collate(made, sharing="branches", unit="persona", **memory)
    assert shape.rows == batch["target"].numel() and shape.personas == 2
    assert abs(shape.computed - int((batch["uses"] > 0).sum())) <= 4 * 6, "the template's first tokens"
    assert sum(len(segment.ids) for segment in shape.segments_cf) == batch["input_ids_cf"].numel()
    if memory:
        assert [len(trunk.forwards) for trunk in batch["trunks"].trunks] == [
            2 if "branches_per_forward" in memory else 1
        ] * 2


def test_behind_a_persona_without_a_gradient_a_conversation_is_one_sequence():
    """It has all branches: two replies, except for their last tokens, stand next to their copies."""
    for step, copies in ((TALK, 0), (TREE, 2 * (16 - 1))):
        shape = shape_of(step, NONE)
        assert (shape.batch, shape.sequences_cf, shape.replies) == (2, 2, 1)
        assert shape.tokens - shape.prefix == shape.tokens_cf == 3 * 24 - 1 + copies
        assert shape.prefix == 96 - 3 * 24
