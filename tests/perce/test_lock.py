"""A lock: taken once, names its holder, and ends with it."""

import os
import signal
import subprocess
import sys

import pytest

from perce import UserError
from perce.lock import locked
from tests.helpers import ROOT

HOLDS = """
import sys, time
from pathlib import Path
from perce.lock import locked
with locked(Path(sys.argv[1]), "here"):
    print("HERE", flush=True)
    time.sleep(600)
"""


def holder_of(path):
    child = subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "HERE\n"
    return child


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    child = holder_of(tmp_path / "lock")
    taken = rf"^out\.json: in use by process {child.pid} on \S+, since 20\S+\. Wait for it"
    for _ in range(2):  # asking does not change what is said of the holder
        with pytest.raises(UserError, match=taken), locked(tmp_path / "lock", "out.json"):
            pass
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with locked(tmp_path / "lock", "out.json"):
        assert f'"pid": {os.getpid()}' in (tmp_path / "lock").read_text()
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), locked(tmp_path / "lock", "out.json"):
            pass
    with locked(tmp_path / "lock", "out.json"):
        pass
