"""Several processes on one CPU, joined by gloo: how tests start ranks."""

import functools
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from tests.helpers import ROOT

IMPORTED_BY_MOST = [
    "perce.integrations.trl", "perce.training.trainer", "pytest", "transformers.models.llama.modeling_llama",
]  # fmt: skip
SECONDS = 240  # for all ranks; pytest ends a test after 300


def run_ranks(module: str, *argv: str, ranks: int = 2) -> list[str]:
    """Runs `module argv…` as a program once per rank, as torchrun does; stderr of each. Fails if a rank fails.

    On Linux the ranks are forked from a process that has imported what they need, which takes longer than their work.
    """
    with TemporaryDirectory() as directory:
        files = [Path(directory, str(rank)) for rank in range(ranks)]
        processes = [
            _context().Process(target=_rank, args=(module, argv, {**os.environ, **variables}, file), daemon=True)
            for variables, file in zip(variables_of_ranks(ranks), files, strict=True)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + SECONDS
        for process in processes:
            process.join(max(end - time.monotonic(), 0))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join(10)
        errors = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.exists()]
    assert codes == [0] * ranks, f"{codes}\n\n" + "\n\n".join(error[-3000:] for error in errors)
    return errors


@functools.cache
def _context() -> Any:
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    before, here = dict(os.environ), Path.cwd()
    os.environ.update({"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})  # torch reads the second when it is imported
    os.chdir(ROOT)  # from where, too, Python imports: it must be this checkout
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED_BY_MOST)
        forkserver.ensure_running()
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)
    return context


def _rank(module: str, argv: Sequence[str], environment: Mapping[str, str], stderr: Path) -> None:
    import perce

    assert Path(perce.__file__).is_relative_to(ROOT), perce.__file__
    os.environ.clear()
    os.environ.update(environment)
    with stderr.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start_ranks(call: Sequence[str], ranks: int = 2, **environment: str) -> list[subprocess.Popen[str]]:
    """Starts a command once per rank."""
    return [
        subprocess.Popen(
            call, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **variables, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for variables in variables_of_ranks(ranks)
    ]  # fmt: skip


def variables_of_ranks(ranks: int) -> list[dict[str, str]]:
    """What torchrun sets in the environment of each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def result_of_ranks(module: str, ranks: int, directory: Path, *argv: str) -> Any:
    """Runs `python -m module directory argv…` in every rank; what rank 0 passes to `finish_rank`."""
    run_ranks(module, str(directory), *argv, ranks=ranks)
    return json.loads((directory / "result.json").read_text())


def finish_rank(directory: Path, result: Any) -> None:
    """The last call of a rank."""
    if os.environ["RANK"] == "0":
        (directory / "result.json").write_text(json.dumps(result))
    end_rank()


def end_rank() -> NoReturn:
    """Ends all ranks together and without a teardown, because gloo's threads sometimes abort a finished process."""
    import torch

    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
