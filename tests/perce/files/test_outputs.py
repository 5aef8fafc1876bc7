"""Outputs: whole or as they were, never over files of others, and readable by those whom the umask lets read."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from perce.__main__ import main
from perce.files.outputs import in_one_move
from tests.helpers import ROOT
from tests.helpers.training import printed_by


@pytest.mark.parametrize(
    ("command", "argv", "name"),
    [
        ("score", "--output mine", "mine"), ("score", "--summary mine.json", "mine.json"),
        ("score", "--jsonl mine.jsonl", "mine.jsonl"), ("score", "--jsonl a.jsonl --export swift", "a.swift.jsonl"),
        ("evaluate", "--output mine.json", "mine.json"), ("evaluate", "--output mine.json", "mine.jsonl"),
        ("plan", "--json mine.json", "mine.json"),
    ],
)  # fmt: skip
def test_a_file_that_perce_did_not_write_is_not_replaced(here, capsys, command, argv, name):
    (here / name).write_text('{"mine": 1}\n')
    err = printed_by(main, capsys, command, "--model", "model")(*argv.split(), code=2).err
    assert f"error: {name}: exists already, and was not written by" in err
    assert (here / name).read_text() == '{"mine": 1}\n'


def test_what_perce_wrote_or_is_empty_is_replaced(scored, gemma, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("perce.planning.plans._command", lambda *_: (None, ""))  # a search over many steps
    monkeypatch.setattr("perce.planning.plans.variants", lambda *_: [])
    for name in ("s.html", "s.json", "s.swift.jsonl", "p.json", "e.json"):
        Path(name).touch()
    for _ in range(2):
        scored("--output", "s.html", "--summary", "s.json", "--jsonl", "s.jsonl", "--export", "swift")
        flags = ("--model", gemma, "--tflops", 1, "--context", 1000, "--json", "p.json")
        printed_by(main, capsys)("plan", *flags)
        flags = ("--model", gemma, "--limit", 2, "--generate", "false", "--output", "e.json")
        printed_by(main, capsys)("evaluate", *flags)
    for name in ("s.json", "p.json", "e.json"):
        assert Path(name).read_text().startswith("{") and "perce." in json.loads(Path(name).read_text())["kind"]


@pytest.mark.parametrize("umask", [0o022, 0o027])
@pytest.mark.parametrize(
    "options", [{"lora_r": 0, "estimate": "frozen"}, {"merge_adapter": "true", "estimate": "epoch"}], ids=str
)
def test_the_umask_decides_who_may_read_what_a_run_saves(train, tmp_path, umask, options):
    before = os.umask(umask)
    try:
        assert train(max_steps=1, save_steps=1, **options)[0] == 0
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    names = {path.name for path in modes}
    assert {"estimates.safetensors", "trainer_state.json"} <= names
    assert {"model.safetensors", "adapter_model.safetensors"} & names
    assert {path: mode for path, mode in modes.items() if mode != 0o666 & ~umask} == {}


WRITERS = {
    "score": "--limit 2 --terminal 0 --output out.html --summary out.json --jsonl out.jsonl",
    "evaluate": "--limit 2 --generate false --output out.json",
    "plan": "--context 96 --query 8 --response 16 --tflops 1 --device cpu --json out.json",
}


@pytest.mark.parametrize(
    ("command", "name"),
    [("score", "out.html"), ("score", "out.json"), ("score", "out.jsonl.run.json"), ("evaluate", "out.json"),
     pytest.param("plan", "out.json", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_result_is_whole_or_as_it_was(base, tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.chdir(tmp_path)
    run = printed_by(main, capsys, command, "--model", base, *WRITERS[command].split())
    run()
    before = (tmp_path / name).read_bytes()
    (tmp_path / "out.jsonl").unlink(missing_ok=True)  # begun anew
    replace = os.replace

    def killed(source, target):
        if os.path.basename(target) == name:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    run("--precision", "fp32", code=130)
    assert (tmp_path / name).read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if ".unfinished" in path.name]


def test_results_go_where_a_link_leads_with_the_mode_that_was_there(scored, tmp_path):
    (tmp_path / "real.json").write_text("")
    (tmp_path / "real.json").chmod(0o600)
    (tmp_path / "link.json").symlink_to("real.json")
    scored("--summary", tmp_path / "link.json", "--output", "/dev/null", "--terminal", 0)
    assert (tmp_path / "link.json").is_symlink() and "pir_mean" in (tmp_path / "real.json").read_text()
    assert (tmp_path / "real.json").stat().st_mode & 0o777 == 0o600


def test_a_command_that_fails_leaves_no_empty_result(scored, tmp_path):
    out = tmp_path / "new" / "s.html"
    scored("--output", out, "--data", "nowhere.jsonl", code=2)
    assert not list(out.parent.iterdir())
    out.mkdir()
    assert f"{out}: cannot be written to" in scored("--output", out, code=2).err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_to_is_found_before(scored, tmp_path):
    (tmp_path / "s.html").write_text("")
    tmp_path.chmod(0o500)
    assert "cannot be written to" in scored("--output", tmp_path / "s.html", code=2).err
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("command", "name"), [("score", "out.html"), ("score", "out.json"), ("evaluate", "out.json"),
     pytest.param("plan", "out.json", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_disk_that_is_full_at_the_end_is_one_paragraph(base, tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.chdir(tmp_path)
    replace = os.replace

    def full(source, target):
        if os.path.basename(target) == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    err = printed_by(main, capsys, command, "--model", base, *WRITERS[command].split())(code=2).err
    assert f"error: {name}: cannot be written to (No space left on device)" in err and "Traceback" not in err
    assert not (tmp_path / name).exists()


def test_a_page_for_a_device_that_takes_nothing_is_one_paragraph(scored):
    told = "error: /dev/full: cannot be written to (No space left on device)"
    assert told in scored("--output", "/dev/full", code=2).err


def test_a_name_is_as_long_as_the_file_system_has_it_or_is_refused_before(scored, here, tmp_path, monkeypatch):
    assert "File name too long" in scored("--summary", "s" * 256, "--data", "rows.jsonl", code=2).err
    assert not [path for path in here.iterdir() if path.name.startswith(("s", ".s"))]
    monkeypatch.undo()
    scored("--summary", tmp_path / ("s" * 255), "--output", tmp_path / ("ü" * 127))
    assert (tmp_path / ("s" * 255)).stat().st_size and (tmp_path / ("ü" * 127)).stat().st_size


def test_two_processes_do_not_write_the_same_unfinished_file(tmp_path, monkeypatch):
    target = tmp_path / "out.json"
    with in_one_move(target) as mine:
        mine.write_text("mine")
        monkeypatch.setattr(os, "getpid", lambda: 1)  # which runs, wherever this does
        with in_one_move(target) as other:
            other.write_text("other")
        assert mine.read_text() == "mine" and target.read_text() == "other"
    assert target.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_what_a_killed_process_left_unfinished_is_swept_up(tmp_path):
    code = "from perce.files.outputs import in_one_move; import os, pathlib, sys\nfor name in sys.argv[1:]:\n"
    code += "    with in_one_move(pathlib.Path(name)) as file:\n        file.write_text('half')\n        "
    for name in ("[a].json", "[a].json", "b.json"):
        subprocess.run([sys.executable, "-c", code + "os.kill(os.getpid(), 9)", str(tmp_path / name)], cwd=ROOT)
    with in_one_move(tmp_path / "[a].json") as file:
        file.write_text("whole")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2 and left[0].startswith(".b.json") and left[1] == "[a].json"
