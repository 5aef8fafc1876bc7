"""Training under a token budget: the same as sequence by sequence, with two processes, and resumed."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from perce import UserError
from perce.data.dataset import sequence_lengths
from perce.data.retrieval import Retriever, recency_scores
from perce.training.loader import undivided_loader
from perce.training.sampler import TokenBatches
from tests.helpers.models import LENGTHS, drawn
from tests.helpers.ranks import finish_rank, result_of_ranks
from tests.helpers.streams import ROWS, train_stream
from tests.helpers.tiny import demo_pairs, write_jsonl
from tests.helpers.trainers import LOSS, arguments, logged, model_for, plain_loop, trainer_for

PAIRS = demo_pairs(24)[:10] + demo_pairs(24, retriever=Retriever(recency_scores, 1, "", ""))[10:]

BUDGET = 1000  # 11 batches of 1 to 3: an odd number, which two processes cannot share evenly


def test_lengths_of_datasets_and_lists():
    expected = [len(pair["input_ids"]) for pair in PAIRS]
    dataset = Dataset.from_list(PAIRS)
    assert sequence_lengths(dataset) == sequence_lengths(PAIRS) == expected
    assert sequence_lengths(dataset.select([3, 1])) == [expected[3], expected[1]]
    assert sequence_lengths(dataset.select([3, 1] * 700)) == [expected[3], expected[1]] * 700, "more than one piece"


def test_set_epoch_reaches_the_batches_behind_skipped_ones():
    args = TrainingArguments("unused", use_cpu=True, report_to="none", dataloader_pin_memory=False)
    loader = undivided_loader(LENGTHS, list, args, batch_sampler=TokenBatches(LENGTHS, 1000, seed=7))
    assert isinstance(loader, DataLoader) and not loader._non_blocking
    skipped = skip_first_batches(loader, 3)
    skipped.set_epoch(2)
    assert list(skipped) == [[LENGTHS[index] for index in batch] for batch in drawn(epoch=2)[3:]]


def test_batches_are_sent_to_the_device_as_the_arguments_say():
    config = {"non_blocking": True}
    args = TrainingArguments("unused", use_cpu=True, report_to="none", accelerator_config=config)
    assert undivided_loader(LENGTHS, list, args, batch_size=2)._non_blocking


def train(directory, ranks=1, **options):
    """Two epochs whose steps are two batches over all ranks."""
    torch.manual_seed(0)
    options = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2 // ranks} | options
    args = arguments(directory, tokens_per_batch=BUDGET, **options)
    trainer = trainer_for(model_for("full"), args, pairs=PAIRS)
    seen, collator = [], trainer.data_collator
    trainer.data_collator = lambda pairs: (seen.append([pair["example"] for pair in pairs]), collator(pairs))[1]
    trainer.train()
    return {"steps": logged(trainer, "loss", "grad_norm"), "batches": seen}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"))


def test_a_step_equals_its_sequences_one_by_one(one_process):
    batches = one_process["batches"]
    epoch = len(TokenBatches(sequence_lengths(PAIRS), BUDGET, seed=0))
    assert len(batches) == 2 * epoch and len({len(batch) for batch in batches}) > 1
    steps = [
        [PAIRS[index] for batch in batches[start : min(start + 2, end)] for index in batch]
        for end in (epoch, 2 * epoch)
        for start in range(end - epoch, end, 2)
    ]
    expected = plain_loop(model_for("full").train(), steps, [LOSS] * len(steps))
    torch.testing.assert_close(torch.tensor(one_process["steps"]), torch.tensor(expected), atol=2e-5, rtol=2e-5)


def test_two_processes_train_as_one(tmp_path, one_process):
    """A dataset under a token budget, a stream and an evaluation, in one run of two processes."""
    streamed = train_stream(tmp_path / "one", write_jsonl(tmp_path / "rows.jsonl", ROWS))
    budget, stream, (loss, examples) = result_of_ranks("tests.perce.training.test_loader", 2, tmp_path)
    taken = one_process["batches"]
    even = len(taken) // 2 - len(taken) // 2 % 2
    assert budget["batches"][: even // 2] == taken[:even:2]
    steps = torch.tensor(budget["steps"])[: even // 2], torch.tensor(one_process["steps"])[: even // 2]
    torch.testing.assert_close(*steps, atol=1e-5, rtol=1e-5)
    assert loss == pytest.approx(evaluated(tmp_path / "one")[0], abs=1e-6) and examples == [0, 1, 4, 5]
    assert stream["examples"] == [batch[::2] for batch in streamed["examples"]]
    torch.testing.assert_close(torch.tensor(stream["steps"]), torch.tensor(streamed["steps"]), atol=1e-5, rtol=1e-5)


def test_resume_in_the_second_epoch_is_bitwise_equal(tmp_path, accumulation=2):
    def weights(directory, **more):
        args = arguments(
            directory, tokens_per_batch=BUDGET, gradient_accumulation_steps=accumulation, max_steps=stop + 3,
            save_strategy="steps", save_steps=stop,
        )  # fmt: skip
        trainer = trainer_for(model_for("lora", dropout=0.3), args, pairs=PAIRS)
        trainer.train(**more)
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, trainer

    batches = len(TokenBatches(sequence_lengths(PAIRS), BUDGET, seed=0))
    stop = -(-batches // accumulation) + 1  # one step into the second epoch
    straight, trainer = weights(tmp_path / "a")
    resumed, again = weights(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert logged(trainer, "loss", "grad_norm") == logged(again, "loss", "grad_norm")


def test_a_budget_is_refused_where_it_cannot_be(tmp_path):
    with pytest.raises(UserError, match="tokens_per_batch: expected >= 1"):
        arguments(tmp_path, tokens_per_batch=0)
    trainer = trainer_for(model_for("full"), arguments(tmp_path, tokens_per_batch=100))
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(UserError, match=r"tokens_per_batch: a streamed train_dataset"):
        trainer.train()


def test_a_loader_of_ours_has_the_trainers_options(tmp_path):
    options = {"dataloader_num_workers": 1, "dataloader_in_order": False, "dataloader_prefetch_factor": 3}
    args = arguments(
        tmp_path, dataloader_multiprocessing_context="spawn", dataloader_persistent_workers=True, **options
    )
    loader = undivided_loader(PAIRS, list, args, batch_size=2)
    assert (loader.num_workers, loader.in_order, loader.prefetch_factor) == (1, False, 3)
    assert loader.multiprocessing_context.get_start_method() == "spawn" and loader.persistent_workers


WORKERS = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}


@pytest.mark.parametrize("streamed", [False, True])
def test_another_dataset_is_evaluated_also_by_workers_that_stay(tmp_path, streamed):
    sets = [Dataset.from_list(PAIRS[:6]), Dataset.from_list(PAIRS[10:13])]
    sets = [x.to_iterable_dataset() for x in sets] if streamed else sets
    found = []
    for options in ({}, WORKERS):
        trainer = trainer_for(model_for("full"), arguments(tmp_path, **options), eval_dataset=sets[0])
        found.append([trainer.evaluate(x)["eval_loss"] for x in (None, sets[1])])
    assert found[0] == found[1] and found[0][0] != found[0][1]


@pytest.mark.parametrize("options", [{"train_sampling_strategy": "sequential"}, {"dataloader_drop_last": True}])
def test_evaluations_are_of_all_examples_in_the_order_of_their_dataset(tmp_path, options):
    args = arguments(tmp_path, per_device_eval_batch_size=5, **options)
    trainer = trainer_for(model_for("full"), args, eval_dataset=Dataset.from_list(PAIRS[:12]))
    trainer.evaluate()
    assert [x.example for x in trainer.last_evaluation] == list(range(12))


def test_an_evaluation_of_nothing_is_refused(tmp_path):
    trainer = trainer_for(model_for("full"), arguments(tmp_path))
    nothing = Dataset.from_list(PAIRS).to_iterable_dataset().filter(lambda _: False)
    with pytest.raises(UserError, match="eval_dataset: expected at least one example"):
        trainer.evaluate(nothing)


def evaluated(directory):
    """The loss of seven examples, and which of them this process has evaluated."""
    args = arguments(directory, per_device_eval_batch_size=2)
    trainer = trainer_for(model_for("full"), args, eval_dataset=Dataset.from_list(PAIRS[:7]))
    return trainer.evaluate()["eval_loss"], [x.example for x in trainer.last_evaluation]


if __name__ == "__main__":  # one rank
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    budget, stream = train(directory, ranks=2), train_stream(directory, directory / "rows.jsonl", ranks=2)
    finish_rank(directory, [budget, stream, evaluated(directory)])
