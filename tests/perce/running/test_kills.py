"""Runs that are killed at any moment and restarted by one command come to the same end, and so do those of torchrun."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from perce.running.directory import LOCK
from perce.train import main
from perce.training.checkpoints import flaw
from tests.helpers import ROOT
from tests.helpers.kills import CONFIGURATIONS, DEFAULTS, MOMENTS, prepare


@pytest.mark.whole
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_campaign_of_kills(tmp_path):
    log = tmp_path / "kills.json"
    call = [sys.executable, "-m", "tests.helpers.kills", str(tmp_path / "runs"), "--log", str(log)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(log.read_text())
    assert len(found["configurations"]) == len(CONFIGURATIONS) >= 10 and found["kills"] >= 100
    for one in found["configurations"]:
        same = {"weights": True, "steps": True, "history": True}
        assert one["same"] == {"moments": same, "signals": same, "times": same} and one["finished"], one
        assert set(one["exit_codes_at_moments"]) == set(MOMENTS)
        assert set(one["exit_codes_at_moments"].values()) == {-signal.SIGKILL}, one
        assert set(one["exit_codes_when_signalled"].values()) <= {128 + signal.SIGTERM, 0}, one


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_their_step_and_end(tmp_path):
    prepare(tmp_path)
    options = DEFAULTS | {
        "model": tmp_path / "model", "data": tmp_path / "rows", "output_dir": tmp_path / "run", "max_steps": 100_000,
        "save_steps": 0, "eval_steps": 100_000,
    }  # fmt: skip
    flags = [x for name, value in options.items() for x in (f"--{name}", str(value))]
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    told = (tmp_path / "stdout").open("w+")
    launcher = subprocess.Popen(
        [*call, "perce.train", *flags], cwd=ROOT, stdout=told, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    wait_until(lambda: "step     5" in (tmp_path / "stdout").read_text(), 120)
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(x.is_running() and x.status() != psutil.STATUS_ZOMBIE for x in ranks), 60)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert flaw(checkpoint) is None and (tmp_path / "run" / LOCK).read_text() == ""
    step = int(checkpoint.name.partition("-")[2])
    again = ["--gradient_accumulation_steps", "4", "--max_steps", str(step + 1)]
    assert main(["--resume", "--output_dir", str(tmp_path / "run"), *again]) == 0


def wait_until(holds, seconds):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)
