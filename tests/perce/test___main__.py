"""The console command `perce`."""

import subprocess
import sys

import pytest

from perce.__main__ import COMMANDS, main
from perce.config.commands import COMMANDS as WITH_OPTIONS


def test_it_lists_its_commands(capsys):
    for asked in ([], ["--help"], ["help"]):
        assert main(asked) == 0
        printed = capsys.readouterr().out
        assert all(f"\n  {name:<10}" in printed for name in COMMANDS)
    assert {command.name for command in WITH_OPTIONS} == {*COMMANDS} - {"doctor"}


def test_it_knows_its_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("perce ")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_subcommand_is_the_module_of_its_name(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/perce", name])
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"perce {name}" in capsys.readouterr().out
    assert main([name, "--no_such_option"]) == 2
    assert "no_such_option" in capsys.readouterr().err


def test_an_error_names_the_command_as_it_was_called(capsys, monkeypatch):
    for called, name in (("/usr/bin/perce", "perce score"), ("/x/perce/__main__.py", "python -m perce.score")):
        monkeypatch.setattr(sys, "argv", [called])
        assert main(["train", "--jsonl", "a.jsonl"]) == 2
        assert f"It is an option of {name}." in capsys.readouterr().err


def test_what_is_no_command_is_refused(capsys):
    assert main(["scroe"]) == 2
    assert "'scroe': expected a command, one of train, score, " in (error := capsys.readouterr().err)
    assert error.endswith("Did you mean score?\n")
    assert main([""]) == 2
    assert "'': expected a command" in capsys.readouterr().err
    assert main(["--version", "extra"]) == 2
    assert "--version: expected nothing behind it, got 'extra'" in capsys.readouterr().err


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "perce", "plan", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--gpu_memory" in done.stdout
