"""Several processes on one CPU, joined by gloo: how tests start ranks."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.helpers import ROOT


def run_ranks(module: str, *argv: str, ranks: int = 2) -> list[str]:
    """Runs `python -m module argv…` once per rank, as torchrun does; stderr of each. Fails if a rank fails."""
    processes = start_ranks([sys.executable, "-m", module, *argv], ranks)
    errors = [process.communicate(timeout=240)[1] for process in processes]
    failed = [error[-3000:] for process, error in zip(processes, errors, strict=True) if process.returncode]
    assert not failed, "\n\n".join(failed)
    return errors


def start_ranks(call: Sequence[str], ranks: int = 2, **environment: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment,
    }  # fmt: skip
    return [
        subprocess.Popen(
            call, cwd=ROOT, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]  # fmt: skip


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
