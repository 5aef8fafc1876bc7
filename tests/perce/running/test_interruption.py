"""A run that is stopped in any way continues from its newest whole checkpoint, to the same weights bit by bit."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from perce import LossConfig, PerceTrainer
from perce.running.interruption import SIGNALS, Interrupted, Interruption
from perce.running.summary import Progress
from perce.train import main
from perce.training import checkpoints
from perce.training.checkpoints import LIST, damage, flaw, newest_whole, seal
from tests.helpers import ROOT
from tests.helpers.device import DEVICE, no_host_sync
from tests.helpers.ranks import run_ranks, start_ranks
from tests.helpers.tiny import save_tiny_model, write_jsonl
from tests.helpers.training import ROWS

STEPS, STOP = 6, 3  # three steps per epoch: the stop is at the end of the first epoch
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    options = {
        "model": save_tiny_model(directory / "model"), "data": write_jsonl(directory / "rows.jsonl", ROWS),
        "max_steps": STEPS, "save_steps": 2, "precision": "fp32", "lora_r": 4, "lora_dropout": 0.3,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "report_examples": 1,
    }  # fmt: skip
    return [x for name, value in options.items() for x in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """The adapter of a run that nothing stopped."""
    directory = tmp_path_factory.mktemp("straight")
    assert main([*flags, "--output_dir", str(directory)]) == 0
    return (directory / ADAPTER).read_bytes()


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def names(run):
    return sorted(path.name for path in run.glob("checkpoint-*"))


def resume(run):
    return main(["--resume", "--output_dir", str(run)])


def at_step(monkeypatch, number, action, method="training_step"):
    """Call `action` in the middle of the first forward of that step."""
    own = getattr(PerceTrainer, method)
    done = []

    def with_action(self, *args, **kwargs):
        result = own(self, *args, **kwargs)
        if self.state.global_step == number - 1 and not done:
            done.append(number)
            action(self)
        return result

    monkeypatch.setattr(PerceTrainer, method, with_action)


# ---- signals


def test_ctrl_c_finishes_the_step_and_saves_it(flags, straight, run, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)  # ignored if the tests run in the background
    with monkeypatch.context() as patch:
        at_step(patch, STOP, lambda _: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(SystemExit, match="130"):
            main([*flags, "--output_dir", str(run)])
    assert names(run) == ["checkpoint-2", "checkpoint-3"]
    assert "Stopped at step 3; --resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) == before
    assert resume(run) == 0 and (run / ADAPTER).read_bytes() == straight


def test_a_signal_in_an_evaluation_stops_it(flags, straight, run, monkeypatch):
    evaluated = []

    def kill(trainer, *args, **kwargs):
        evaluated.append(trainer.state.global_step)
        if trainer.state.global_step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare(trainer, *args, **kwargs)

    prepare = PerceTrainer._prepare_inputs
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr("perce.training.trainer.PerceTrainer._prepare_inputs", kill)
        patch.setattr("perce.training.arguments.REPLIES_A_STEP", 1)  # more than one batch per evaluation
        main([*flags, "--output_dir", str(run), "--save_steps", "0", "--eval_steps", str(STOP)])
    assert names(run) == ["checkpoint-3"] and evaluated.count(STOP) == 1
    assert resume(run) == 0 and (run / ADAPTER).read_bytes() == straight


@pytest.mark.parametrize(
    ("seconds", "left"), [(3.0, ["checkpoint-2", "checkpoint-3"]), (0.0, ["checkpoint-2"])], ids=["forwarded", "later"]
)
def test_a_second_signal_stops_at_once_unless_it_is_the_first_one_again(flags, run, monkeypatch, seconds, left):
    def twice(_):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("perce.running.interruption.FORWARDED_SECONDS", seconds)
    at_step(monkeypatch, STOP, twice)
    with pytest.raises(SystemExit, match="143"):
        main([*flags, "--output_dir", str(run)])
    assert names(run) == left


def test_a_stdout_that_is_closed_stops_the_run_with_a_checkpoint(flags, straight, run, monkeypatch):
    own = Progress.on_log

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == STOP:
            raise BrokenPipeError
        own(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_log", on_log)
        with pytest.raises(BrokenPipeError):
            main([*flags, "--output_dir", str(run), "--logging_steps", "1"])
    assert flaw(run / "checkpoint-3") is None
    assert resume(run) == 0 and (run / ADAPTER).read_bytes() == straight


def test_a_signal_after_the_last_step_leaves_the_rest_to_a_resume(flags, straight, run, monkeypatch, capsys):
    own = PerceTrainer._finalize_training

    def signalled(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return own(self, *args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(PerceTrainer, "_finalize_training", signalled)
        main([*flags, "--output_dir", str(run)])
    assert "Stopped at step 6; --resume" in capsys.readouterr().err and not (run / ADAPTER).exists()
    assert resume(run) == 0 and (run / ADAPTER).read_bytes() == straight


def test_a_signal_after_the_last_step_without_a_checkpoint_lets_the_run_end(flags, straight, run, monkeypatch):
    """Nothing would be left of the run."""
    own = PerceTrainer._finalize_training

    def signalled(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return own(self, *args)

    monkeypatch.setattr(PerceTrainer, "_finalize_training", signalled)
    assert main([*flags, "--output_dir", str(run), "--save_steps", "0"]) == 0
    assert (run / ADAPTER).read_bytes() == straight


@pytest.mark.slow
def test_sigterm_to_a_process(flags, straight, run):
    child = start("waits", flags, run)
    child.terminate()
    assert "Stopped at step 3" in child.communicate(timeout=120)[1]
    assert child.returncode == 143 and flaw(run / "checkpoint-3") is None
    assert resume(run) == 0 and (run / ADAPTER).read_bytes() == straight


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_step(flags, run, tmp_path):
    module = "tests.perce.running.test_interruption"
    call = [sys.executable, "-m", module, "waits on rank 1", *flags, "--save_steps", "0", "--output_dir", str(run)]
    processes = start_ranks(call)
    wait_for_line(processes[1])
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], errors
    assert names(run) == ["checkpoint-4"]  # the step after: no step waits for a device, so that they could agree sooner
    assert flaw(run / "checkpoint-4") is None and (run / "checkpoint-4" / "rng_state_1.pth").exists()
    run_ranks("perce.train", "--resume", "--output_dir", str(run))
    run_ranks("perce.train", *flags, "--output_dir", str(tmp_path / "straight"))
    assert (run / ADAPTER).read_bytes() == (tmp_path / "straight" / ADAPTER).read_bytes()


def test_several_processes_agree_a_step_later():
    """The other process receives SIGTERM in the second step. On a GPU, no step waits for it."""
    others = iter([0.0, 1.0, 1.0, 1.0])

    def reduce(own, reduction):
        assert reduction == "sum"
        own[SIGNALS.index(signal.SIGTERM)].add_(next(others))
        return own

    accelerator = SimpleNamespace(num_processes=2, device=DEVICE, reduce=reduce)
    interruption, control = Interruption(SimpleNamespace(accelerator=accelerator)), TrainerControl()
    asked = []
    with no_host_sync():
        for step in (1, 2, 3):
            interruption.on_step_end(None, TrainerState(global_step=step), control)
            asked.append(control.should_save)
    assert asked == [False, False, True]
    with pytest.raises(Interrupted) as stopped:
        interruption.on_save(SimpleNamespace(save_only_model=False), TrainerState(global_step=3), control)
    assert stopped.value.signal == signal.SIGTERM and interruption.saved_step == 3


# ---- killed while saving


@pytest.mark.parametrize("mode", ["writing", pytest.param("before the list", marks=pytest.mark.slow)])
def test_kill_9_in_the_middle_of_a_save(flags, straight, run, capsys, mode):
    assert killed(mode, flags, run) == -signal.SIGKILL
    assert names(run) == ["checkpoint-2", "checkpoint-4"] and flaw(run / "checkpoint-4")
    assert resume(run) == 0
    assert "checkpoint-4 is not whole and is skipped: it has no complete.json" in capsys.readouterr().err
    assert (run / ADAPTER).read_bytes() == straight
    assert names(run) == ["checkpoint-4", "checkpoint-6"] and flaw(run / "checkpoint-4") is None


def test_a_damaged_checkpoint_is_passed_over_and_named(flags, straight, run, capsys):
    assert main([*flags, "--output_dir", str(run)]) == 0
    (run / LIST).unlink()  # a finished run would not be resumed
    (run / "checkpoint-6" / "optimizer.pt").unlink()  # half deleted
    assert resume(run) == 0
    assert "checkpoint-6 is not whole and is skipped: optimizer.pt is missing" in capsys.readouterr().err
    assert (run / ADAPTER).read_bytes() == straight
    for checkpoint in (4, 6):
        path = run / f"checkpoint-{checkpoint}" / ADAPTER
        path.write_bytes(path.read_bytes()[:100])
    (run / LIST).unlink()
    assert resume(run) == 2
    error = capsys.readouterr().err
    assert f"{ADAPTER} has 100 of" in error and "holds no whole checkpoint-N" in error


def test_a_checkpoint_is_on_the_disk_before_its_list_and_that_before_anything_goes(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint-2"
    for name in ("model.safetensors", "part/state.pt"):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(b"weights")
        (checkpoint / name).chmod(0o444)
    flushed = []

    def fsync(handle):
        flushed.append((os.fstat(handle).st_ino, (checkpoint / LIST).exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    seal(checkpoint)
    before = [
        checkpoint / "model.safetensors",
        checkpoint / "part" / "state.pt",
        checkpoint / "part",
        checkpoint / LIST,
    ]
    after = [checkpoint, tmp_path]
    assert flushed == [(x.stat().st_ino, False) for x in before] + [(x.stat().st_ino, True) for x in after]
    assert damage(checkpoint) is None


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.EIO, False), (errno.ENOSPC, False)])
def test_a_flush_that_fails_is_a_failed_save_and_one_that_cannot_be_done_is_not(tmp_path, monkeypatch, number, passes):
    def fsync(handle):
        raise OSError(number, os.strerror(number))

    path = checkpoint(tmp_path, 1, whole=False)
    monkeypatch.setattr(os, "fsync", fsync)
    with contextlib.nullcontext() if passes else pytest.raises(OSError, match=re.escape(os.strerror(number))):
        seal(path)
    assert (flaw(path) is None) == passes


def test_resume_true_takes_the_newest_whole_checkpoint(run, monkeypatch):
    checkpoint(run, 4)
    checkpoint(run, 10)
    checkpoint(run, 12, whole=False)
    resumed = []
    monkeypatch.setattr("transformers.Trainer.train", lambda self, point, *args, **kwargs: resumed.append(point))
    trainer = PerceTrainer.__new__(PerceTrainer)
    trainer.args = type("Args", (), {"output_dir": str(run), "loss": LossConfig(), "eval_on_start": False})
    trainer.train(resume_from_checkpoint=True)
    trainer.train()
    assert resumed == [str(run / "checkpoint-10"), None]


# ---- a full disk


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "where",
    ["perce.training.checkpoints._flush", pytest.param("transformers.Trainer._save_rng_state", marks=pytest.mark.slow)],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(flags, straight, run, monkeypatch, capsys, where):
    with monkeypatch.context() as patch:
        at_step(patch, STOP, lambda _: patch.setattr(where, full_disk))
        assert main([*flags, "--output_dir", str(run)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == (
        f"error: {run}/checkpoint-4: could not be written ([Errno 28] No space left on device). checkpoint-2 is whole: "
        "make room, and --resume continues from it."
    )
    assert names(run) == ["checkpoint-2"]
    assert resume(run) == 0 and (run / ADAPTER).read_bytes() == straight


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "perce-test", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs the right to")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


# A part of a checkpoint can be written, or nothing.
@pytest.mark.parametrize("room", [40_000, pytest.param(0, marks=pytest.mark.slow)])
def test_a_disk_that_fills_up(flags, straight, small_disk, monkeypatch, capsys, room):
    run = small_disk / "run"
    filler = small_disk / "filler"

    def fill(_):
        filler.write_bytes(bytes(max(shutil.disk_usage(small_disk).free - room, 0)))

    with monkeypatch.context() as patch:
        at_step(patch, STOP, fill)
        assert main([*flags, "--output_dir", str(run)]) == 2
    error = capsys.readouterr().err
    assert (
        "checkpoint-4: could not be written" in error and "checkpoint-2 is whole" in error and "Traceback" not in error
    )
    filler.unlink()
    assert resume(run) == 0 and (run / ADAPTER).read_bytes() == straight


def test_a_disk_that_is_full_at_the_end(flags, run, monkeypatch, capsys):
    monkeypatch.setattr(PerceTrainer, "save_state", full_disk)
    assert main([*flags, "--output_dir", str(run)]) == 2
    assert f"error: {run}: could not be written" in capsys.readouterr().err
    monkeypatch.undo()
    assert resume(run) == 0 and (run / "report.html").exists()


def test_other_errors_in_a_save_are_no_disk_errors(flags, run, monkeypatch):
    def broken(*args):
        raise TypeError("a mistake of ours")

    monkeypatch.setattr("transformers.Trainer._save_rng_state", broken)
    with pytest.raises(TypeError, match="of ours"):
        main([*flags, "--output_dir", str(run)])


# ---- rotation


def checkpoint(run, step, *, whole=True, age=0):
    path = run / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"w" * step)
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (path / name).write_text("{}")
    if whole:
        seal(path)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_rotation_keeps_whole_checkpoints_the_best_and_the_newest(run):
    best = checkpoint(run, 1, age=9)
    for step, age in ((2, 6), (3, 7), (4, 8)):  # copied in any order
        checkpoint(run, step, age=age)
    checkpoint(run, 9, whole=False)  # left by a process that was killed, newer than all others
    newest = checkpoint(run, 5)
    checkpoints._rotate(newest, 3, str(best))
    assert names(run) == ["checkpoint-1", "checkpoint-4", "checkpoint-5"]
    checkpoints._rotate(newest, 1, None)
    assert names(run) == ["checkpoint-5"]


def test_the_only_checkpoint_goes_when_its_successor_is_whole(flags, run, monkeypatch):
    standing = []

    def observed(path):
        standing.append(newest_whole(run))
        seal(path)
        assert "trainer_state.json" in json.loads((path / LIST).read_text())

    monkeypatch.setattr("perce.training.checkpoints.seal", observed)
    assert main([*flags, "--output_dir", str(run), "--save_total_limit", "1"]) == 0
    assert standing == [None, run / "checkpoint-2", run / "checkpoint-4"] and names(run) == ["checkpoint-6"]


# ---- the child processes


def start(mode, flags, run):
    """A run in its own process, when it has reached the point where `mode` stops it."""
    call = [sys.executable, "-m", "tests.perce.running.test_interruption", mode, *flags, "--output_dir", str(run)]
    child = subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_line(child)
    return child


def killed(mode, flags, run):
    """The exit code of a run that is killed where `mode` says, in a process that is forked, and so has imported what it
    needs."""
    if (pid := os.fork()) == 0:
        try:
            torch.set_num_threads(1)  # threads of the parent are not there
            child_main(mode, *flags, "--output_dir", str(run))
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for_line(child):
    for line in child.stdout:
        if line.strip().endswith("HERE"):
            return
    pytest.fail(child.stderr.read()[-3000:])


def wait_for_signal(trainer):
    print("HERE", flush=True)
    interruption = next(x for x in trainer.callback_handler.callbacks if isinstance(x, Interruption))
    while interruption.received is None:
        time.sleep(0.05)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def child_main(mode, *argv):
    with pytest.MonkeyPatch.context() as patch:
        if mode == "waits" or (mode == "waits on rank 1" and os.environ["RANK"] == "1"):
            at_step(patch, STOP, wait_for_signal)
        elif mode == "before the list":
            patch.setattr(checkpoints, "seal", lambda path: die() if path.name == "checkpoint-4" else seal(path))
        elif mode == "writing":
            save = torch.save

            def half(content, path, *args, **kwargs):
                save(content, path, *args, **kwargs)
                if "checkpoint-4" in str(path) and "optimizer" in str(path):
                    Path(path).write_bytes(Path(path).read_bytes()[:1000])
                    die()

            patch.setattr("torch.save", half)
        return main(argv)


if __name__ == "__main__":
    sys.exit(child_main(*sys.argv[1:]))
