"""A lock: taken once, names its holder, and ends with it."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import filelock
import pytest

from perce import UserError
from perce.files.lock import InUse, locked
from tests.helpers import ROOT

HOLDS = """
import errno, fcntl, sys, time
from pathlib import Path
from perce.files.lock import locked
def missing(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")
if sys.argv[2] == "missing":
    fcntl.flock = missing
with locked(Path(sys.argv[1]), "here"):
    print("HERE", flush=True)
    time.sleep(600)
"""


def refusing(error):
    def refuse(*_, **__):
        raise error

    return refuse


def holder_of(path, flock):
    command = [sys.executable, "-c", HOLDS, str(path), flock]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "HERE\n"
    return child


@pytest.mark.parametrize("flock", ["there", "missing"])
def test_a_lock_names_its_holder_and_dies_with_it(tmp_path, monkeypatch, flock):
    if flock == "missing":  # filelock then makes do with a marker in the file, by which it knows a holder that died
        monkeypatch.setattr(fcntl, "flock", refusing(OSError(errno.ENOSYS, "Function not implemented")))
    child = holder_of(tmp_path / "lock", flock)
    taken = rf"^out\.json: in use by process {child.pid} on \S+, since 20\S+\. Wait for it"
    for _ in range(2):  # asking does not change what is said of the holder
        with pytest.raises(InUse, match=taken), locked(tmp_path / "lock", "out.json"):
            pass
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with (
        locked(tmp_path / "lock", "out.json"),
        pytest.raises(InUse, match=f"process {os.getpid()} on"),
        locked(tmp_path / "lock", "out.json"),
    ):
        pass
    with locked(tmp_path / "lock", "out.json"):
        pass


def test_the_lock_s_own_file_is_not_written_to(tmp_path):
    for _ in range(2):
        with locked(tmp_path / ".lock", "here"):
            assert (tmp_path / ".lock").read_text() == ""
            assert f'"pid": {os.getpid()}' in (tmp_path / ".lock.holder").read_text()
        assert [path.name for path in tmp_path.iterdir()] == [".lock"] and (tmp_path / ".lock").read_text() == ""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", refusing(OSError(number, os.strerror(number))))
    told = rf"^here: {tmp_path}/\.lock cannot be locked \({os.strerror(number)}\).*local disk"
    with pytest.raises(UserError, match=told) as caught, locked(tmp_path / ".lock", "here"):
        pass
    assert not isinstance(caught.value, InUse)


def test_a_system_without_locks_is_told_likewise(tmp_path, monkeypatch):
    monkeypatch.setattr(filelock.FileLock, "acquire", refusing(NotImplementedError("no flock here")))
    with pytest.raises(UserError, match=r"\.lock cannot be locked \(no flock here\)"), locked(tmp_path / ".lock", "x"):
        pass
