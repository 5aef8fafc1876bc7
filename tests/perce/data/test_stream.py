"""Streams: every example once per pass, dealt to the processes, and a stopped run that continues where it was."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from perce import UserError, load_examples
from perce.data import stream
from perce.data.dataset import pair_dataset
from perce.data.pairs import PairBuilder
from perce.running.summary import left_out_of_stream
from tests.helpers.streams import ROWS, TOKENIZER, pair_stream, run
from tests.helpers.tiny import write_jsonl
from tests.helpers.trainers import arguments


@pytest.fixture
def path(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 10)


def taken(stream, count):
    return [row["example"] for row in itertools.islice(stream, count)]


def test_a_pass_holds_every_pair_once_and_the_next_is_in_another_order(path):
    indices = taken(pair_stream(path), 3 * 23)
    passes = [indices[start : start + 23] for start in (0, 23, 46)]
    assert all(sorted(one) == list(range(23)) for one in passes)
    assert passes[0] != passes[1] != passes[2] and passes[0] != list(range(23))
    assert sorted(passes[0][:10]) == list(range(10)), "shuffled in blocks: a stream is not read to its end first"
    assert indices == taken(pair_stream(path), 3 * 23) != taken(pair_stream(path, seed=1), 3 * 23)
    rows = {row["example"]: row["input_ids"] for row in itertools.islice(pair_stream(path), 23)}
    whole = pair_dataset(load_examples(path, "train").all, PairBuilder(TOKENIZER, max_length=500))
    assert [rows[index] for index in range(23)] == whole["input_ids"][:]


@pytest.mark.parametrize("ranks", [2, 3, 23, 46])
def test_processes_take_turns(path, ranks):
    """Also if there are fewer examples than processes."""
    shares = [taken(pair_stream(path).of_process(rank, ranks), 3) for rank in range(ranks)]
    assert [index for turn in zip(*shares, strict=True) for index in turn] == taken(pair_stream(path), 3 * ranks)


def test_loader_workers_divide_the_share_again(path):
    loader = DataLoader(pair_stream(path).of_process(1, 2), batch_size=None, num_workers=2)
    drawn = [row["example"] for row in itertools.islice(loader, 10)]
    straight = taken(pair_stream(path), 20)
    assert drawn == [straight[place] for k in range(0, 20, 4) for place in (k + 2, k + 3)]


def test_what_does_not_fit_is_counted_once_or_named(tmp_path):
    long = [{**ROWS[0], "response": "word " * 200}, {**ROWS[0], "response": ""}]
    path = write_jsonl(tmp_path / "some.jsonl", [*ROWS, *long])
    some = pair_stream(path, skip=True)
    assert 23 not in taken(some, 3 * 23 + 1)
    assert next(note for note in some.source.notes() if "rows skipped" in note).startswith("1 rows skipped")
    assert next(note for note in some.source.notes() if "some.jsonl:24" in note).startswith("training: 1 examples")
    with pytest.raises(UserError, match=r"some.jsonl:2[45]"):
        taken(pair_stream(path), 26)
    none = pair_stream(write_jsonl(tmp_path / "none.jsonl", long[:1] * 3), skip=True)
    for share in (none, none.of_process(1, 2)):
        with pytest.raises(UserError, match=r"No example is left.*none.jsonl:"):
            taken(share, 1)


def test_what_a_stream_left_out_is_told_as_far_as_it_is_known(tmp_path):
    bad = [{**ROWS[0], "response": "word " * 200}, {**ROWS[0], "response": ""}]
    stream = pair_stream(write_jsonl(tmp_path / "some.jsonl", [*ROWS, *bad]), skip=True)
    taken(stream, 24)
    pairs = SimpleNamespace(train=stream)

    def told(world_size=1, dataloader_num_workers=0):
        return left_out_of_stream(
            pairs, SimpleNamespace(world_size=world_size, dataloader_num_workers=dataloader_num_workers)
        )

    (rows, examples), share, (workers,) = told(), told(world_size=2), told(dataloader_num_workers=1)
    assert rows.startswith("1 rows skipped") and examples.startswith("training: 1 examples skipped, the first: ")
    assert share == [rows, f"{examples} (in this process's share, one of 2)"], "every process reads all rows"
    assert workers.startswith("not counted")
    assert left_out_of_stream(SimpleNamespace(train=None), None) == []


def test_resume_in_the_second_pass_is_bitwise_equal(tmp_path, path):
    def arguments_of(name):
        return arguments(tmp_path / name, max_steps=9, save_strategy="steps", save_steps=7)  # 23 / 4: 6 steps per pass

    straight = run(arguments_of("a"), path, "lora")
    resumed = run(arguments_of("b"), path, "lora", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-7"))
    assert all(torch.equal(straight["weights"][name], resumed["weights"][name]) for name in straight["weights"])
    assert straight["steps"] == resumed["steps"]
