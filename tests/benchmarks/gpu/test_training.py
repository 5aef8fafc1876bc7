"""Runs of perce.train as the GPU commands start them, on a CPU."""

import time

import pytest

pytest.importorskip("triton")
from benchmarks.gpu import training
from benchmarks.gpu.child import Unable
from benchmarks.gpu.results import NO_TIME
from tests.helpers.stages import lines_of


@pytest.mark.slow
def test_training_runs_as_on_a_cpu():
    found = lines_of(training.stage, "train", seconds=280.0)
    for run in ("full", "lora", "cpu"):
        assert found[run]["steps"] == training.STEPS and found[run]["loss"] > 0
    assert found["as on a CPU"]["alike"] is True and found["score"]["records"] == 8
    assert "devices" in found["doctor"]["said"] and found["doctor"]["said"][-1] == "No problem found."


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_options_change_how_and_not_what():
    found = lines_of(training.stage, "options", seconds=580.0)
    for name in ("checkpointing", "persona_grad", "mlp_tile", "torch", "ddp"):
        assert found[f"{name} as plain"]["alike"] is True
    assert found["one by one as shared persona"]["alike"] is found["detached as shared persona"]["alike"] is True
    assert found["entce as on a CPU"]["alike"] is True and found["entce"]["loss"] != found["plain"]["loss"]
    assert "need a GPU" in found["liger"]["reason"]


@pytest.mark.slow
def test_runs_under_flex_attention():
    found = lines_of(training.stage, "flex", seconds=280.0)
    assert [found[run].get("reason") for run in ("sdpa", "shared")] == [None, None]
    assert found["sdpa"]["steps"] == found["shared"]["steps"] == training.STEPS
    assert "got flex_attention on cpu" in found["packed"]["reason"]
    assert "does not support backward on CPU" in found["flex"]["reason"]


def test_a_run_that_differs_is_said_to():
    cpu = {"loss": 2.0, "pir_mean": 0.3}
    assert training.compared(cpu | {"loss": 2.008, "pir_mean": 0.302}, cpu)["alike"]
    assert not training.compared(cpu | {"loss": 2.012}, cpu)["alike"]
    assert not training.compared(cpu | {"pir_mean": 0.304}, cpu)["alike"]


def test_a_run_that_fails_gives_its_last_words():
    process = training.Run("tests.helpers.fake_stage")
    with pytest.raises(Unable, match=r"ended with 1: .*JSONDecodeError"):
        process.check()
    assert process.has_ended


def test_a_run_that_does_not_end_says_where_it_was(monkeypatch, capsys):
    """As if compilation took all of the time."""
    started = training.Run

    def hangs(module, *arguments):
        run = started("http.server", "0", "--bind", "127.0.0.1")
        while not any("Serving" in line for line in run.said()) and not run.has_ended:
            time.sleep(0.05)
        return run

    monkeypatch.setattr(training, "Run", hangs)
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    found = lines_of(training.stage, "flash", seconds=0.5)
    assert found.keys() == set(training.RUNS["flash"]), "and nothing is compared"
    for line in found.values():
        assert line["reason"].startswith(f'{NO_TIME}; it was at File "') and "selectors.py" in line["reason"]
    assert "(most recent call first)" in capsys.readouterr().err


def test_compilations_that_were_repeated_are_counted(monkeypatch):
    process = training.Run("tests.helpers.fake_stage")
    process.popen.wait()
    assert process.compiled_again() == {}
    process.stderr.write("[0/1] Recompiling function f\n[0/2] Recompiling function f\nhit config.recompile_limit (8)\n")
    assert process.compiled_again() == {"recompilations": 2, "gave_up": True}


def test_a_run_that_says_nothing_has_no_place(tmp_path):
    process = training.Run("tests.helpers.fake_stage")
    process.popen.wait()
    process.stderr.seek(0)
    process.stderr.truncate()
    assert process.aborted(0.0) == "a place that it did not tell"
