"""Both GPU commands from end to end on CPU doubles: tiny sizes, Triton's interpreter, peers that fail in every way."""

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT

pytest.importorskip("triton")
from benchmarks.gpu import compare, decide, schedule
from benchmarks.gpu.results import NO_TIME
from benchmarks.gpu.roofline import HEADS
from benchmarks.gpu.sizes import TINY

FAKES = ("fake_right", "fake_inaccurate", "fake_wrong", "fake_absent", "fake_crashes", "fake_hangs")
COMMANDS = {"gpu_a": "decide", "gpu_b": "compare"}
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is measured, not doubled")


def started(command: str, directory: Path, *options: str) -> subprocess.Popen:
    arguments = ["--device", "cpu", "--results", str(directory), "--fakes", *FAKES, *options]
    return subprocess.Popen(
        [sys.executable, "-u", "-m", f"benchmarks.gpu.{COMMANDS[command]}", *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def lines_in(directory: Path, command: str) -> dict[str, dict]:
    return json.loads((directory / f"{command}.json").read_text())["lines"]


def printed(text: str) -> list[str]:
    """Keys of the lines that went by."""
    return [match[1] for line in text.splitlines() if (match := re.match(r" *[\d.]+ s  (.+?): ", line))]


def assert_fakes_are_told_apart(lines: dict[str, dict], stage: str, ours: tuple[str, ...]) -> None:
    for head in HEADS:
        for size in TINY:
            found = {name: lines[f"{stage}/{head}/{size}/{name}"] for name in (*ours, *FAKES)}
            for name in (*ours, "fake_right"):
                assert found[name]["correct"] is True and found[name]["errors"]["pir"] < 1e-4
            assert found["fake_inaccurate"]["correct"] is False
            assert "wrong result" in found["fake_wrong"]["reason"]
            assert found["fake_absent"]["reason"] == "it is not installed"
            assert found["fake_crashes"]["reason"].endswith(
                "the process ended with 7: CUDA error: an illegal memory access"
            )
            assert "nothing heard for" in found["fake_hangs"]["reason"]
            for seconds in lines[f"{stage}/{head}/{size}/race"]["rounds"][1:]:
                timed = {name for name, line in found.items() if "reason" not in line}
                assert seconds.keys() & found.keys() == timed and {"matmul", "copy"} <= seconds.keys()


def finished(command, directory):
    """Its lines, which it has printed too, and what it printed."""
    process = started(command, directory)
    try:
        text, _ = process.communicate()
    finally:
        process.kill()  # where pytest's time limit ended the wait
    assert process.returncode == 0, text[-3000:]
    lines = lines_in(directory, command)
    assert set(printed(text)) == set(lines)
    return lines, text


@on_cpu
@pytest.mark.slow
@pytest.mark.timeout(1800)  # all runs of a stage at once, on as few cores as there are
def test_the_first_command(tmp_path):
    lines, text = finished("gpu_a", tmp_path)
    assert {key.removeprefix("stages/") for key in lines if key.startswith("stages/")} == {
        stage.name for row in decide.stages("cpu") for stage in row
    }
    for size in TINY:
        assert lines[f"check/{size}/fused"]["errors"]["pir"] < 1e-4
        assert lines[f"parts/{size}/row_loss"]["predicted"] > 0
    assert_fakes_are_told_apart(lines, "ways", ("perce_fused", "perce_stored"))
    assert not any(line.get("reason") == NO_TIME for line in lines.values())
    assert "GPU tests: " in text and not lines["tests/summary"]["failures"]


@on_cpu
@pytest.mark.slow
@pytest.mark.timeout(1800)  # all runs of a stage at once, on as few cores as there are
def test_the_second_command(tmp_path):
    lines, _ = finished("gpu_b", tmp_path)
    assert_fakes_are_told_apart(lines, "peers", ("perce",))
    for peer in ("quack", "quack_exact", "liger_cutedsl"):
        stage = next(name for name, peers in compare.CUTE.items() if peer in peers)
        assert "reason" in lines[f"{stage}/trainable/{TINY[0]}/{peer}"], "no CuTe DSL on a CPU"
        assert lines[f"{stage}/trainable/{TINY[0]}/perce"]["correct"] is True
    assert lines["tests/summary"]["failures"] == [] and lines["tests/summary"]["passed"] > 50


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_cut_off_at_a_random_second_every_finished_line_is_in_the_file(tmp_path, seed):
    command = list(COMMANDS)[seed % 2]
    process = started(command, tmp_path)
    text = process.stdout.readline()
    while not printed(text):
        text += process.stdout.readline()
    time.sleep(random.Random(seed).uniform(0, 15))
    process.kill()
    text += process.stdout.read()
    process.wait()
    keys, lines = set(printed(text)), lines_in(tmp_path, command)
    assert keys and keys <= set(lines), "and the file is whole"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_that_is_launched_compiles_ahead_of_time():
    """In a process of its own: the interpreter must be off there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.compile", "--jobs", "2"]
    text = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.search(r"^\d+ jobs, 0 failed: ", text, re.M), text


def test_the_schedule_holds_every_stage_to_its_time(tmp_path, capsys):
    files = []
    for command, module in (("gpu_a", decide), ("gpu_b", compare)):
        lines = {f"stages/{stage.name}": {"until_first_line": 1.0} for row in module.stages("cpu") for stage in row}
        files.append(tmp_path / f"{command}.json")
        files[-1].write_text(json.dumps({"command": command, "lines": lines}))
    schedule.main([*map(str, files), "--compile", "24"])
    text = capsys.readouterr().out
    assert "| train + compile | 4 | 2 | 65 |" in text and "**sum**, limit 290" in text
    assert "| tests + memcheck + racecheck + options + flash | 0 | 142 | 142 |" in text, "bounded by its end"
    with pytest.raises(SystemExit, match=r"more time is needed than there is: gpu_a, train \+ compile"):
        schedule.main([*map(str, files), "--compile", "900"])
