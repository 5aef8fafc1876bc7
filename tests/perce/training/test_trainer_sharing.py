"""Training, evaluation and E-steps on conversations whose replies share tokens: the numbers of separate examples."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from perce import DataConfig, LossConfig, UserError
from perce.config.schema import MemoryConfig
from perce.data.batch import collate
from perce.model.memory import CHECKPOINTING
from perce.training.shared import counted
from tests.helpers.ranks import end_rank, run_ranks
from tests.helpers.replies import Exact, conversation, requests
from tests.helpers.trainers import arguments, logged, model_for, trainer_for

PAIRS = [
    pair | {"example": index, "personal": [False, True] + [False] * (pair["response_length"] - 2)}
    for index, pair in enumerate(
        pair for number, replies in enumerate((4, 1, 3, 2, 6)) for pair in conversation(replies, number, thought=True)
    )
]
REQUESTS = [
    pair | {"example": index, "personal": [False, True] + [False] * (pair["response_length"] - 2)}
    for index, pair in enumerate(pair for n, count in enumerate((8, 3, 7, 1, 5)) for pair in requests(count, number=n))
]
ALONE = DataConfig(share="none")


def trainer(directory, kind="full", pairs=PAIRS, architecture="llama", **options):
    """In fp64, so that any difference is a mistake."""
    loss = LossConfig(clip_min=0.05, **options.pop("of_loss", {}))
    args = arguments(directory, loss=loss, **({"max_steps": 4} | options))
    made = trainer_for(model_for(kind, architecture=architecture), args, pairs, eval_dataset=Dataset.from_list(pairs))
    made.model.double()
    return made


def steps(made, resume_from=None):
    """(loss and gradient norm per step, trained weights)."""
    with Exact():
        made.train(resume_from_checkpoint=resume_from)
    return torch.tensor(logged(made, "loss", "grad_norm"), dtype=torch.float64), weights(made)


def weights(made):
    return {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}


def close(one, other, most=1e-9):
    torch.testing.assert_close(one, other, rtol=most, atol=most)


def alone(made):
    """The same trainer on the same batches, in which nothing is shared."""
    made.data_collator = partial(made.data_collator, sharing="none")
    return made


PERSONA = {"memory": MemoryConfig(share_persona=8), "pairs": REQUESTS, "per_device_train_batch_size": 8}
WAYS = {
    "plain": {},
    "batch": {"of_loss": {"normalize": "batch"}, "gradient_accumulation_steps": 2},
    "sequence": {"of_loss": {"normalize": "sequence"}},
    "epoch": {"of_loss": {"estimate": "epoch"}},
    "ce": {"of_loss": {"objective": "ce"}},
    "lora": {"kind": "lora"},
    "checkpointing": {CHECKPOINTING: True},
    "detached": {"memory": MemoryConfig(persona_grad="none"), "pairs": conversation(4) + conversation(3, 1)},
    "tokens": {"tokens_per_batch": 200},
    "persona": PERSONA,
    "persona, pairs": {"memory": MemoryConfig(share_persona=2), "pairs": REQUESTS, "gradient_accumulation_steps": 2},
    "persona, tokens": {"memory": MemoryConfig(share_persona=4), "pairs": REQUESTS, "tokens_per_batch": 400},
    "persona, one by one": PERSONA
    | {"memory": MemoryConfig(share_persona=8, branches_per_forward=1), CHECKPOINTING: True},
    "persona, detached": PERSONA | {"memory": MemoryConfig("none", share_persona=8), "kind": "lora"},
    "persona, epoch": PERSONA | {"of_loss": {"estimate": "epoch"}},
}


SLOW = ("persona, pairs", "persona, tokens", "persona, epoch")  # the first word and the second have quick cases


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way in SLOW)) for way in WAYS])
def test_steps_equal_those_of_separate_examples(tmp_path, way):
    options = {"max_steps": 2} | WAYS[way]
    shared, separate = trainer(tmp_path, **options), alone(trainer(tmp_path, **options))
    assert shared.sharing == "branches"
    one, other = steps(shared), steps(separate)
    close(one[1], other[1])
    close(one[0], other[0], 1e-6)  # the Trainer logs the loss in fp32
    computed, needed = shared.tokens_computed()
    assert computed < (0.8 if "pairs" in way else 0.75) * needed
    assert separate.tokens_computed() == (needed, needed)


def test_the_load_of_experts_counts_every_reply(tmp_path):
    """In fp32, because experts have no fp64 products."""
    found, options = [], {"max_steps": 2, "architecture": "qwen3-moe"}
    for made in (trainer(tmp_path, **options), alone(trainer(tmp_path, **options))):
        made.model.float()
        made.train()
        found.append(torch.tensor(logged(made, "loss", "grad_norm")))
    close(*found, 2e-5)


def test_an_evaluation_has_the_numbers_of_separate_examples_in_the_order_of_the_dataset(tmp_path):
    mixed = [PAIRS[index] for index in (0, 5, 1, 6, 2, 7, 3, *range(8, 16), 4)]
    found = {}
    for name, data in (("shared", DataConfig()), ("alone", ALONE)):
        made = trainer(tmp_path, pairs=mixed, data=data, per_device_eval_batch_size=5)
        with Exact():
            metrics = made.evaluate()
        assert [x.example for x in made.last_evaluation] == [pair["example"] for pair in mixed]
        found[name] = [torch.cat([x.logp, x.logp_cf]) for x in made.last_evaluation]
        found[name].append(torch.tensor([value for key, value in metrics.items() if "persona" in key]))
    assert made.sharing == "none"
    close(found["shared"], found["alone"])


@pytest.mark.slow
@pytest.mark.parametrize("of", ["conversation", "persona"])
def test_resume_in_the_second_epoch_is_bitwise_equal(tmp_path, of):
    options = {"conversation": {}, "persona": PERSONA}[of]
    made = partial(trainer, kind="lora", max_steps=7, save_strategy="steps", save_steps=5, **options)
    first, again = made(tmp_path / "a"), made(tmp_path / "b")
    assert len(first.get_train_dataloader()) in (3, 4), "the checkpoint is in the second epoch"
    straight = steps(first)
    resumed = steps(again, str(tmp_path / "a" / "checkpoint-5"))
    assert torch.equal(straight[0], resumed[0]) and all(straight[1][n].equal(resumed[1][n]) for n in straight[1])


def test_options_of_the_trainers_loader_are_refused_where_conversations_are_dealt(tmp_path):
    for option in ({"dataloader_drop_last": True}, {"train_sampling_strategy": "sequential"}):
        with pytest.raises(UserError, match=rf"{next(iter(option))}: .*--share none"):
            trainer(tmp_path, **option)
        assert trainer(tmp_path, data=ALONE, **option).sharing == "none"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 4}, "share_persona: 8 requests .* has 4.*--per_device_train_batch_size of 8"),
        ({"data": ALONE}, "share_persona: 8 requests .*--share none"),
        ({"data": DataConfig(streaming=True)}, "share_persona: 8 requests .*a stream"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last: "),
    ],
)
def test_options_that_keep_requests_from_sharing_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **(PERSONA | options))


def test_each_request_is_dealt_alone_where_one_shares(tmp_path):
    made = trainer(tmp_path, **(PERSONA | {"memory": MemoryConfig(share_persona=1)}))
    assert made.sharing == "none" and "spans" not in next(iter(made.get_train_dataloader()))


def test_a_collator_without_trunks_is_refused_where_personas_run_by_themselves(tmp_path):
    args = arguments(tmp_path, max_steps=1, memory=MemoryConfig("none"))
    made = trainer_for(model_for(), args, PAIRS, data_collator=collate)
    with pytest.raises(UserError, match=r"data_collator: .*persona_grad=\"none\""):
        made.train()


def test_a_collator_of_the_callers_stays(tmp_path):
    def own(pairs):
        return {name: value for name, value in collate(pairs).items() if name not in ("uses", "tokens")}

    made = trainer_for(model_for(), arguments(tmp_path, max_steps=1), PAIRS, data_collator=own)
    assert made.data_collator is own
    made.train()


def test_only_what_is_trained_on_decides_how_batches_are_dealt(tmp_path):
    """Validation conversations share tokens even if the training examples are not conversations."""
    args = arguments(tmp_path, train_sampling_strategy="sequential")
    made = trainer_for(model_for(), args, conversation(1), eval_dataset=Dataset.from_list(PAIRS))
    assert made.sharing == "none"
    assert "spans" in next(iter(made.get_eval_dataloader()))


def test_estimates_that_are_known_leave_one_pass_to_count(tmp_path):
    made = trainer(tmp_path, max_steps=1, of_loss={"estimate": "epoch"})
    steps(made)
    computed, needed = made.tokens_computed()
    assert computed < needed < sum(len(pair["input_ids"]) for pair in PAIRS)


def test_what_is_said_beforehand_is_what_is_computed(tmp_path):
    made = trainer(tmp_path, max_steps=-1, num_train_epochs=1)
    loader = made.get_train_dataloader()
    expected = counted(loader.batch_sampler, made.train_dataset, made.data_collator, True)
    assert expected.replies == len(PAIRS) and expected.alone < 5
    steps(made)
    assert made.tokens_computed() == expected[:2]


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(tmp_path):
    run_ranks("tests.perce.training.test_trainer_sharing", str(tmp_path))
    for name, found in torch.load(tmp_path / "result.pt").items():
        close(found, by_ranks(tmp_path / "one", name, 1))


OF_RANKS = {
    "online": {"pairs": PAIRS[:-1]},
    "epoch": {"pairs": PAIRS[:-1], "of_loss": {"estimate": "epoch"}},
    "persona": {"pairs": REQUESTS, "memory": MemoryConfig(share_persona=4, branches_per_forward=2)},
}


def by_ranks(directory, way, ranks):
    """Weights after two epochs of steps of two batches, and numbers of an evaluation."""
    made = trainer(
        directory, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2 // ranks,
        per_device_eval_batch_size=4, **OF_RANKS[way],
    )  # fmt: skip
    assert made.sharing == "branches"
    found = steps(made)[1]
    with Exact():
        metrics = made.evaluate()
    return found | {key: torch.tensor(value) for key, value in metrics.items() if "persona" in key}


if __name__ == "__main__":  # one rank
    torch.set_num_threads(1)
    results = {way: by_ranks(Path(sys.argv[1]) / "two", way, 2) for way in OF_RANKS}
    if torch.distributed.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]) / "result.pt")
    end_rank()
