"""What conversations share in a run: whether they can, in which units, and how many tokens are computed."""

from types import SimpleNamespace

import pytest
from datasets import Dataset

from perce.config.schema import DataConfig, LossConfig, MemoryConfig
from perce.data.batch import collate
from perce.model.patch import prepare_model
from perce.training.sampler import ReplyBatches, TokenBatches
from perce.training.shared import counted, largest_batch, shared_by, units
from tests.helpers.replies import conversation, requests
from tests.helpers.tiny import demo_pairs, tiny_model

KINDS = ("chains", "branches")


def pairs_of(thought):
    """Pairs of 20 conversations of one to nine replies."""
    pairs = [pair for number in range(20) for pair in conversation(1 + number * 7 % 9, number, thought)]
    return [pair | {"example": index} for index, pair in enumerate(pairs)]


def rows_and_tokens(pairs, sharing):
    rows, width = collate(pairs, sharing=sharing)["input_ids"].shape
    return rows, rows * width


@pytest.mark.parametrize("thought", [False, True])
@pytest.mark.parametrize("sharing", KINDS)
def test_units_are_computed_within_a_budget(sharing, thought, budget=110):
    pairs = pairs_of(thought)
    found = units(pairs, budget, sharing, MemoryConfig())
    assert found == units(Dataset.from_list(pairs), budget, sharing, MemoryConfig())
    assert sorted(index for unit in found for index in unit.indices) == list(range(len(pairs)))
    for unit in found:
        assert rows_and_tokens([pairs[index] for index in unit.indices], sharing) == (1, unit.tokens)
    if sharing == "branches":
        assert all(unit.tokens <= budget or len(unit.indices) == 1 for unit in found)
        assert len(found) > len(units(pairs, 100_000, sharing, MemoryConfig())) == 20, "some are cut"
    indices, lengths = zip(*found, strict=True)
    for batch in TokenBatches(lengths, budget, indices, seed=0):
        _, tokens = rows_and_tokens([pairs[index] for index in batch], sharing)
        assert tokens <= budget or batch in indices, "longer units are alone"


def test_units_of_a_persona_are_computed_within_a_budget(budget=150):
    pairs = [pair for number in range(6) for pair in requests(7, number=number)]
    memory = MemoryConfig(share_persona=3)
    found = units(pairs, budget, "branches", memory, seed=1)
    assert sorted(index for unit in found for index in unit.indices) == list(range(len(pairs)))
    assert found == units(Dataset.from_list(pairs), budget, "branches", memory, seed=1)
    assert found != units(pairs, budget, "branches", memory, seed=2)
    for unit in found:
        assert len({pairs[index]["persona"] for index in unit.indices}) == 1 and len(unit.indices) <= 3
        batch = collate([pairs[index] for index in unit.indices], sharing="branches", unit="persona")
        assert batch["input_ids"].numel() == unit.tokens <= budget
    detached = MemoryConfig("none", share_persona=3)
    assert units(pairs, budget, "chains", detached, seed=1) == found, "a persona and its requests, without branches too"
    for replies in (4, 8):
        bound = largest_batch(pairs, replies, "branches", MemoryConfig(share_persona=4))
        assert bound < 0.7 * largest_batch(pairs, replies, "none", MemoryConfig())


@pytest.mark.parametrize("sharing", KINDS)
def test_no_batch_is_larger_than_the_largest(sharing):
    pairs = pairs_of(thought=True)
    conversations = {}
    for index, pair in enumerate(pairs):
        conversations.setdefault(pair["conversation"], []).append(index)
    for replies in (2, 8):
        bound = largest_batch(pairs, replies, sharing, MemoryConfig())
        sampler = ReplyBatches([[indices] for indices in conversations.values()], replies, seed=0)
        largest = 0
        for epoch in range(20):
            sampler.set_epoch(epoch)
            largest = max(rows_and_tokens([pairs[i] for i in b], sharing)[1] for b in sampler)
        assert largest <= bound < 2 * largest
    longest = max(len(pair["input_ids"]) for pair in pairs)
    assert largest_batch(pairs, 8, "none", MemoryConfig()) == 8 * longest > bound


def test_what_is_counted_of_batches():
    pairs = conversation(3) + conversation(1, number=1)
    [*lengths] = [len(pair["input_ids"]) - 1 for pair in pairs]
    factual = counted([range(4)], pairs, lambda x: collate(x, sharing="chains"), counterfactual=False)
    assert factual == (lengths[2] + lengths[3], sum(lengths), 4, 1)
    both = counted([[0, 2], [1]], pairs, lambda x: collate(x, sharing="chains"), counterfactual=True)
    persona = 12
    assert both == (2 * (lengths[2] + lengths[1] - persona), 2 * sum(lengths[:3]) - 3 * persona, 3, 1)


def asked(**options):
    defaults = {
        "data": DataConfig(), "memory": MemoryConfig(), "loss": LossConfig(), "bf16": False, "fsdp": [],
        "deepspeed": None, "packing": False, "torch_compile": False, "neftune_noise_alpha": None,
    }  # fmt: skip
    return SimpleNamespace(**defaults | options)


def test_a_batch_in_which_nothing_is_shared_is_as_ever():
    alone = [conversation(1, number)[0] for number in range(3)]
    assert collate(alone, sharing="branches")["input_ids"].shape[0] == 3


def test_whether_replies_are_shared():
    model, several = prepare_model(tiny_model()), Dataset.from_list(conversation(2))
    assert shared_by(model, asked(), None, several) == ("branches", "")
    assert shared_by(model, asked(), {"a": Dataset.from_list(conversation(1)), "b": several}) == ("branches", "")
    assert shared_by(model, asked(data=DataConfig(share="none")), several) == ("none", "")
    assert shared_by(model, asked(), Dataset.from_list(demo_pairs(3)), None) == ("none", "")
    detached = {"memory": MemoryConfig(persona_grad="none")}
    assert shared_by(model, asked(**detached), several) == ("branches", "")
    users = Dataset.from_list([pair for pair in requests(5) if pair["conversation"]])
    for memory, expected in ((MemoryConfig(share_persona=2), "branches"), (MemoryConfig(), "none")):
        assert shared_by(model, asked(memory=memory), users) == (expected, "")
    assert shared_by(model, asked(memory=MemoryConfig(share_persona=1)), several) == ("none", "")
    sharing, why = shared_by(model, asked(memory=MemoryConfig(share_persona=2), torch_compile=True), users)
    assert sharing == "none" and "torch_compile" in why and "without --share_persona" in why
    one_by_one = MemoryConfig(share_persona=2, branches_per_forward=1)
    assert shared_by(model, asked(memory=one_by_one, torch_compile=True), users)[0] == "chains"
    several_ways = shared_by(prepare_model(tiny_model("mixtral")), asked(memory=MemoryConfig(share_persona=2)), users)
    assert several_ways == ("branches", "")
    for options, reason in (
        ({"deepspeed": "zero3.json"}, "DeepSpeed"), ({"packing": True}, "packing"),
        ({"torch_compile": True}, "torch_compile"),
    ):  # fmt: skip
        sharing, why = shared_by(model, asked(**options), several)
        assert sharing == "chains" and reason in why
    noisy = shared_by(model, asked(neftune_noise_alpha=5.0), several)
    balanced = shared_by(prepare_model(tiny_model("mixtral")), asked(**detached), several)
    assert noisy[0] == balanced[0] == "none" and "noise" in noisy[1] and "experts" in balanced[1]
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    for options in ({}, {"deepspeed": "zero3.json"}):
        sharing, why = shared_by(model, asked(**options), several)
        assert sharing == "none" and "position encoding" in why
