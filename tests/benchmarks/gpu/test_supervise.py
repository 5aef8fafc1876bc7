"""Stages in processes that crash, hang or take too long; the file of results."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.results import NO_TIME, SCHEMA, Results, short
from benchmarks.gpu.supervise import Stage, environment, run, says_less
from tests.helpers import ROOT


def stage(name: str, *script: tuple[str, str], until: float = 30.0, **options) -> Stage:
    options = {"patience": 1.0, "grace": 0.2} | options
    return Stage(name, "tests.helpers.fake_stage", until, options={"script": script}, **options)


@pytest.fixture
def results(tmp_path):
    return Results("gpu_x", tmp_path, say=lambda _: None)


def saved(results: Results) -> dict:
    return json.loads(results.path.read_text())


def test_a_process_that_crashes_or_hangs_is_replaced_by_one_without_the_line(results):
    script = [("is", "a/1"), ("crashes", "a/2"), ("is", "a/3"), ("hangs", "a/4"), ("is", "a/5")]
    run([[stage("a", *script)]], results, "cpu")
    lines = saved(results)["lines"]
    assert lines["a/1"] == {"value": 0} and lines["a/3"] == {"value": 1} and lines["a/5"] == {"value": 2}
    assert lines["a/2"] == {"reason": "the process ended with 7: CUDA error: an illegal memory access"}
    assert lines["a/4"] == {"reason": "nothing heard for 1 s"}
    assert lines["stages/a"]["seconds"] > 0
    assert saved(results)["machine"]["device"] == "NVIDIA H100" and saved(results)["schema"] == SCHEMA
    assert "illegal memory access" in results.log.read_text(), "what processes said is kept"
    assert not list(results.path.parent.glob("*.partial"))


def test_a_partial_line_is_written_and_measured_again(results):
    run([[stage("a", ("partial", "a/race"), ("crashes", "a/peer"))]], results, "cpu")
    assert saved(results)["lines"]["a/race"] == {"value": 1}, "by the second process, which knew of the lost peer"


@pytest.mark.slow
def test_the_end_of_the_time_keeps_what_there_is(results):
    stages = [
        [stage("a", ("is", "a/1"), ("hangs", "a/2"), until=2.5, patience=60)],
        [stage("b", ("is", "b/1"), until=0.1)],
    ]
    run(stages, results, "cpu")
    lines = saved(results)["lines"]
    assert lines["a/1"] == {"value": 0} and lines["a/2"] == {"reason": NO_TIME} and "b/1" not in lines
    assert lines["b/process"] == {"reason": NO_TIME} and "stages/b" in lines


def test_time_that_runs_out_in_a_later_round_takes_nothing_away(results):
    run([[stage("a", ("partial", "a/1"), ("hangs", "a/1"), until=2.0, patience=60)]], results, "cpu")
    assert saved(results)["lines"]["a/1"] == {"value": 0}


def test_a_stage_that_does_not_start_is_a_line_and_the_others_go_on(results):
    broken = Stage("a", "tests.helpers.fake_stage", 30, options={"does not start": True})
    missing = Stage("c", "tests.no_such_stage", 30)
    run([[broken, stage("b", ("is", "b/1"))], [missing]], results, "cpu")
    lines = saved(results)["lines"]
    assert lines["a/process"] == {"reason": "the process ended with 1: no torch here"}
    assert "No module named tests.no_such_stage" in lines["c/process"]["reason"]
    assert lines["b/1"] == {"value": 0}


def test_the_next_rows_processes_wait_for_their_turn(results):
    rows = [[stage("a", *(("sleeps", f"a/{index}") for index in range(3)))], [stage("b", ("is", "b/1"))]]
    run(rows, results, "cpu")
    keys = list(saved(results)["lines"])
    assert keys == ["a/0", "a/1", "a/2", "stages/a", "b/1", "stages/b"]
    assert saved(results)["lines"]["stages/b"]["seconds"] < saved(results)["lines"]["stages/a"]["seconds"]


def test_no_measurement_is_replaced_by_less():
    rounds = {"rounds": [1, 2]}
    assert says_less({"reason": NO_TIME}, {"seconds": 1.0}) and says_less({"rounds": [1]}, rounds)
    assert not says_less({"reason": "it crashed"}, {"seconds": 1.0}) and not says_less({"rounds": [1, 2, 3]}, rounds)
    assert not says_less({"reason": NO_TIME}, None) and not says_less({"seconds": 1.0}, {"reason": NO_TIME})


def test_a_line_that_was_seen_is_in_the_file(tmp_path):
    seen: list[tuple[str, dict]] = []
    results = Results("gpu_x", tmp_path, say=lambda text: seen.append((text, saved(results)["lines"])))
    results.put("a/1", seconds=1.5)
    results.put("a/2", reason="it is not installed")
    assert [sorted(lines) for _, lines in seen] == [["a/1"], ["a/1", "a/2"]]
    assert seen[0][0].endswith("a/1: seconds 1.5") and seen[1][0].endswith("a/2: it is not installed")
    assert short({"errors": {"pir": 1e-7}, "rounds": [1, 2], "names": ["one"]}) == (
        "errors {pir 1e-07}, rounds 2 of them, names ['one']"
    )


CUT_OFF = """
import signal, sys
from pathlib import Path
from benchmarks.gpu.results import Results
from benchmarks.gpu.supervise import Stage, run
script = [("sleeps", f"a/{index}") for index in range(40)]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
stage = Stage("a", "tests.helpers.fake_stage", 60, options={"script": script})
run([[stage]], Results("gpu_x", Path(sys.argv[1])), "cpu")
"""


@pytest.mark.parametrize("how", [
    pytest.param(signal.SIGINT, marks=pytest.mark.slow), pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    signal.SIGKILL,
])  # fmt: skip
def test_a_command_that_is_cut_off_loses_no_line_and_leaves_no_process(tmp_path, how):
    command = subprocess.Popen(
        [sys.executable, "-u", "-c", CUT_OFF, str(tmp_path)], cwd=ROOT, text=True, env=environment("cpu"),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert command.stdout is not None
    printed = [command.stdout.readline() for _ in range(3)]
    command.send_signal(how)
    printed += command.stdout.read().splitlines()
    command.wait()
    lines = json.loads((tmp_path / "gpu_x.json").read_text())["lines"]
    keys = [match[1] for line in printed if (match := re.search(r"s  (\S+): ", line))]
    assert len(keys) >= 3 and set(keys) <= set(lines) and len(lines) < 40
    deadline = time.monotonic() + 60
    while (left := of_this_test(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def of_this_test(directory: Path) -> list[str]:
    """Processes of a stage whose parent was the command of this test, by their parents' end: none may be left."""
    found = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = status.read_bytes().split(b"\0")
        except OSError:  # it ended
            continue
        if (
            b"tests.helpers.fake_stage" in words
            and Path(f"{status.parent}/stat").read_text().split(") ")[1].split()[1] == "1"
        ):
            found.append(status.parent.name)
    return found


def test_the_interpreter_is_for_a_cpu_alone(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in environment("cuda") and environment("cpu")["TRITON_INTERPRET"] == "1"
