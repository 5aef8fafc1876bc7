"""Pairs of many examples as tables, in the order of the examples. If there are enough examples, one process per core
builds them.

    examples   0 …  499    500 …  999    1000 … 1499    …
    process         0             1              0          each sends its tables through a pipe of its own

The processes are forks: they share the examples without a copy, and wait while their pipe is full. The error of an
example is raised in place of its table, so that the first error is reported, as with a single process.
"""

import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from perce.data.pairing import PairSource
from perce.errors import UserError
from perce.visible import progress

CHUNK = 500  # examples per table
WORTH_A_PROCESS = 4000  # examples per process: fewer take less time than starting the process
MOST = 16  # processes: writing tables takes a tenth of the time of building them


def tables(source: PairSource, schema: pa.Schema) -> Iterator[pa.Table]:
    """The columns of all pairs. UserError for the first example that cannot be built and may not be skipped, or if no
    pair is left. `source.reason` is set to the reason why the first skipped example was skipped."""
    count, built = len(source.examples), 0  # type: ignore[arg-type]  # examples have a length unless they are streamed
    starts = range(0, count, CHUNK)
    processes = _processes(source, count)
    made = _from_processes(source, schema, starts, processes) if processes > 1 else _made(source, schema, starts)
    with progress("pairing", "example", total=count) as bar:
        for number, (table, reason) in enumerate(made):
            source.reason = source.reason or reason
            built += len(table)
            bar.update(min(CHUNK, count - number * CHUNK))
            yield table
    if not built:
        raise UserError(source.nothing_left())


def _made(source: PairSource, schema: pa.Schema, starts: range) -> Iterator[tuple[pa.Table, str]]:
    """The table of each chunk, and why the first of the examples skipped so far was skipped."""
    examples: Any = source.examples
    for start in starts:
        chunk = range(start, min(start + CHUNK, len(examples)))
        rows = [row for index in chunk for row in source.build(index, examples[index])]
        yield pa.Table.from_pydict({name: [row[name] for row in rows] for name in schema.names}, schema), source.reason


def _processes(source: PairSource, count: int) -> int:
    """The number of processes; 1 if this one must not fork: an encoder has threads, which do not survive a fork."""
    retriever = getattr(source.builder, "retriever", None)
    forks = sys.platform == "linux" and not multiprocessing.current_process().daemon
    if not forks or (retriever and not retriever.may_fork):
        return 1
    return max(min(len(os.sched_getaffinity(0)), count // WORTH_A_PROCESS, MOST), 1)


def _from_processes(
    source: PairSource, schema: pa.Schema, starts: range, count: int
) -> Iterator[tuple[pa.Table, str]]:  # fmt: skip
    context: Any = multiprocessing.get_context("fork")
    pipes: list[Any] = []
    workers, made = [], []
    told = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # otherwise tokenizers warns of each fork
    try:
        for number in range(count):
            share = starts[number::count]
            try:
                ours, theirs = context.Pipe(duplex=False)
                inherited = [*pipes, ours]
                worker = context.Process(target=_work, args=(source, schema, share, theirs, inherited), daemon=True)
                worker.start()
            except OSError:  # no process or memory is left for it: this process builds its share
                made.append(_made(source, schema, share))
                continue
            theirs.close()
            pipes.append(ours)
            workers.append(worker)
            made.append(_received(ours))
        for number in range(len(starts)):
            yield next(made[number % count])
    finally:
        if told is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = told
        for worker in workers:
            worker.terminate()
            worker.join()


def _received(pipe: Any) -> Iterator[tuple[pa.Table, str]]:
    while True:
        try:
            found = pipe.recv()
        except (EOFError, OSError):  # OSError: in the middle of a table
            raise UserError(
                "A process that built pairs was killed from outside, probably because memory ran out. Close other "
                "programs, or stream the data (--streaming)."
            ) from None
        if isinstance(found, Exception):
            raise found
        yield found


def _work(source: PairSource, schema: pa.Schema, starts: range, pipe: Any, inherited: list[Any]) -> None:
    """Builds the chunks at `starts` and sends their tables; ends when nobody reads the pipe any more."""
    for end in inherited:  # only the parent may hold the reading ends: if it is killed, a write must fail and not wait
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # a garbage collection would write to every object, and so copy its memory
    try:
        for found in _made(source, schema, starts):
            pipe.send(found)
    except BrokenPipeError:
        pass
    except UserError as error:
        pipe.send(error)
    except BaseException:  # a pipe may be unable to carry its class; a panic of tokenizers is no Exception
        pipe.send(RuntimeError(f"a process that built pairs failed:\n{traceback.format_exc()}"))
