"""Several processes build the same pairs as one, in the same order, and report the same first error."""

import errno
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from perce import DataConfig, UserError
from perce.data import workers
from perce.data.dataset import FEATURES, pair_dataset
from perce.data.pairing import PairSource, make_builder
from perce.data.pairs import PairBuilder
from perce.data.retrieval import Retriever, recency_scores
from perce.data.rows import Document
from perce.data.workers import tables
from tests.helpers import ROOT
from tests.helpers.conversations import conversations
from tests.helpers.pairs import TOKENIZERS, builder, example

EXAMPLES = [replace(this, source=f"train.jsonl:{number}") for number, this in enumerate(conversations(60), start=1)]
LONG = [
    replace(this, response="word " * 600) if number in (23, 47) else this
    for number, this in enumerate(EXAMPLES, start=1)
]


@pytest.fixture(params=[1, 3])
def processes(request, monkeypatch):
    monkeypatch.setattr(workers, "CHUNK", 7)
    monkeypatch.setattr(workers, "WORTH_A_PROCESS", 20)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(request.param), raising=False)
    return request.param


def built(examples, own, skip=False):
    source = PairSource(examples, own, skip)
    schema = FEATURES[type(own)].arrow_schema
    return [row for table in tables(source, schema) for row in table.to_pylist()], source


def one_by_one(examples, own):
    rows = [vars(pair) | {"example": index} for index, this in enumerate(examples) for pair in own.pairs(this)]
    return [{**row, "persona_span": [*row["persona_span"]]} if "persona_span" in row else row for row in rows]


def test_pairs_are_those_that_are_built_one_by_one(processes):
    own = builder(max_length=600)
    source = PairSource(EXAMPLES, own, False)
    assert workers._processes(source, len(EXAMPLES)) == processes
    assert built(EXAMPLES, own)[0] == one_by_one(EXAMPLES, builder(max_length=600))


def test_pieces_of_documents_too(processes):
    own = make_builder(TOKENIZERS["chatml"], DataConfig(max_length=24), "text", _longce())
    documents = [Document(f"Bees are {'few ' * (i % 30)}.", None, f"t:{i}") for i in range(60)]
    expected = [
        {**row, "windows": [[*window] for window in row["windows"]]} for row in one_by_one(documents, own)
    ]  # fmt: skip
    assert built(documents, own)[0] == expected


def _longce():
    from perce import LossConfig

    return LossConfig(objective="longce", short_context=8, short_stride=4)


def test_the_first_that_does_not_fit_is_named(processes):
    with pytest.raises(UserError) as alone:
        builder(max_length=600).build(LONG[22])
    with pytest.raises(UserError) as refused:
        pair_dataset(LONG, builder(max_length=600))
    assert str(refused.value) == str(alone.value) and "train.jsonl:23: " in str(alone.value)


def test_what_is_skipped_is_the_same(processes):
    rows, source = built(LONG, builder(max_length=600), skip=True)
    assert [row["example"] for row in rows] == [n for n in range(60) if n not in (22, 46)]
    assert source.reason.startswith("train.jsonl:23: ")
    nothing = [example(response="word " * 600, source=f"x:{i}") for i in range(60)]
    with pytest.raises(UserError, match=r"No example is left.*x:0: "):
        built(nothing, builder(max_length=600), skip=True)


def test_a_mistake_of_ours_is_no_fault_of_the_data(processes, monkeypatch):
    monkeypatch.setattr(PairBuilder, "build", lambda self, example: {}["missing"])
    with pytest.raises(KeyError if processes == 1 else RuntimeError) as raised:
        built(EXAMPLES, builder())
    said = ["missing"] if processes == 1 else ["KeyError: 'missing'", 'lambda self, example: {}["missing"]']
    assert all(text in str(raised.value) for text in said)


class _TwoArguments(Exception):
    """An exception that can be pickled but not unpickled."""

    def __init__(self, one, two):
        super().__init__(one)


class _Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("no pickle")


class _Panic(BaseException):
    """Like the exception that pyo3 raises when a tokenizer panics."""


@pytest.mark.parametrize("error", [_TwoArguments("own words", 2), _Unpicklable("own words"), _Panic("own words")])
def test_an_error_that_does_not_go_through_a_pipe_is_told(processes, monkeypatch, error):
    if processes == 1:
        pytest.skip("there is no pipe")

    def build(self, example):
        raise error

    monkeypatch.setattr(PairBuilder, "build", build)
    with pytest.raises(RuntimeError, match=f"{type(error).__name__}: own words"):
        built(EXAMPLES, builder())


@pytest.mark.parametrize(("call", "room"), [("fork", 0), ("fork", 2), ("pipe", 0), ("pipe", 3), ("pipe", 4)])
def test_where_no_more_processes_can_be_started_those_that_are_there_build(processes, monkeypatch, call, room):
    if processes == 1:
        pytest.skip("none is started")
    real, calls = getattr(os, call), []

    def refused(*args):
        calls.append(args)
        if len(calls) > room:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        return real(*args)

    monkeypatch.setattr(os, call, refused)
    own = builder(max_length=600)
    assert built(EXAMPLES, own)[0] == one_by_one(EXAMPLES, builder(max_length=600)) and len(calls) > room
    calls.clear()
    with pytest.raises(UserError, match=r"train\.jsonl:23: "):
        built(LONG, own)


def test_a_process_that_is_killed_ends_the_pairing(processes, monkeypatch):
    if processes == 1:
        pytest.skip("there is no other process")
    plain = PairBuilder.build

    def build(self, this):
        if this is EXAMPLES[30]:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, this)

    monkeypatch.setattr(PairBuilder, "build", build)
    with pytest.raises(UserError, match="killed from outside"):
        built(EXAMPLES, builder())


def test_a_process_that_is_killed_while_it_sends_ends_the_pairing_too():
    import multiprocessing

    ours, theirs = multiprocessing.Pipe(duplex=False)
    os.write(theirs.fileno(), struct.pack("!i", 100) + b"half")
    theirs.close()
    with pytest.raises(UserError, match="killed from outside"):
        next(workers._received(ours))


def test_few_examples_and_encoders_stay_in_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    own = builder()
    count = workers.WORTH_A_PROCESS * 3
    assert [workers._processes(PairSource([], own, False), n) for n in (0, count // 3, count)] == [1, 1, 3]
    dense = builder(retriever=Retriever(recency_scores, 1, "", "", may_fork=False))
    assert workers._processes(PairSource([], dense, False), count) == 1


def test_no_process_is_left_when_the_reader_stops(processes):
    import multiprocessing

    rest = tables(PairSource(EXAMPLES, builder(), False), FEATURES[PairBuilder].arrow_schema)
    next(rest)
    rest.close()
    assert not multiprocessing.active_children()


KILLED = """
import os, signal, sys
from perce.data import workers
from perce.data.dataset import FEATURES
from perce.data.pairing import PairSource
from perce.data.pairs import PairBuilder
from tests.helpers.conversations import conversations
from tests.helpers.pairs import builder
import multiprocessing
workers.CHUNK, workers.WORTH_A_PROCESS, os.sched_getaffinity = 1, 20, lambda _: range(3)
rest = workers.tables(PairSource(conversations(60) * 100, builder(), False), FEATURES[PairBuilder].arrow_schema)
next(rest)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_no_process_is_left_when_the_one_that_reads_is_killed(tmp_path):
    with (tmp_path / "out").open("w") as out:  # not a pipe: children that are left would keep it open
        subprocess.run([sys.executable, "-c", KILLED], stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
    children = [int(pid) for pid in (tmp_path / "out").read_text().split()]
    assert len(children) == 3
    until = time.monotonic() + 30
    while any(map(psutil.pid_exists, children)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, children))
