"""Several processes on one CPU, joined by gloo: how tests start ranks."""

import functools
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from tests.helpers import ROOT

IMPORTED_BY_MOST = ["perce.integrations.trl", "perce.training.trainer"]


def run_ranks(module: str, *argv: str, ranks: int = 2) -> list[str]:
    """Runs `module argv…` as a program once per rank, as torchrun does; stderr of each. Fails if a rank fails.

    On Linux the ranks are forked from a process that has imported what they need, which takes longer than their work.
    """
    with TemporaryDirectory() as directory:
        files = [Path(directory, str(rank)) for rank in range(ranks)]
        processes = [
            _context().Process(target=_rank, args=(module, argv, variables, file), daemon=True)
            for variables, file in zip(variables_of_ranks(ranks), files, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
        errors = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, f"{codes}\n\n" + "\n\n".join(error[-3000:] for error in errors)
    return errors


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(IMPORTED_BY_MOST)
    return context


def _rank(module: str, argv: Sequence[str], variables: Mapping[str, str], stderr: Path) -> None:
    os.environ.update(variables)
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
