"""Runs a test module as several processes of one job, with gloo on the CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_ranks(module: str, ranks: int, directory: Path, *argv: str) -> Any:
    """`python -m MODULE DIRECTORY ARGV…` in every rank; what rank 0 hands to `finish_rank`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[1]
    common = {
        **os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(directory), *argv], cwd=root, stderr=subprocess.PIPE, text=True,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors[0][-3000:]
    return json.loads((directory / "result.json").read_text())


def finish_rank(directory: Path, result: Any) -> None:
    """The last call of a rank."""
    import torch

    if os.environ["RANK"] == "0":
        (directory / "result.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
