"""Every option that is a path, of every command: what no path can be is one paragraph, before anything is loaded."""

from functools import partial

import pytest

from perce.__main__ import main as perce
from perce.config.commands import COMMANDS as WITH_OPTIONS

COMMANDS = {partial(lambda name, argv: perce([name, *argv]), command.name): command for command in WITH_OPTIONS}
PATHS = [
    (main, name)
    for main, command in COMMANDS.items()
    for name, item in command.fields.items()
    if item.metadata["metavar"] in ("DATA", "DIR", "FILE", "DIR|HUB_ID")
]
NOT_PATHS = {
    "": "expected a path",
    " ": "expected a path",
    "x" * 300: "File name too long",
    "d/" * 3000: "File name too long",
    "a\0b": "null byte",
    "~nobody-of-this-name/x": "no user of this name",
}


def test_there_are_paths():
    assert {name for _, name in PATHS} >= {"data", "model", "output_dir", "jsonl", "output", "compare_with", "json"}


@pytest.mark.parametrize(("main", "name"), [*PATHS, *((main, "config") for main in COMMANDS)])
def test_what_no_path_can_be(tmp_path, monkeypatch, capsys, main, name):
    monkeypatch.chdir(tmp_path)
    for path, reason in NOT_PATHS.items():
        assert main([f"--{name}={path}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: --{name}") and reason in said and said.count("\n") == 1 and len(said) < 300
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("main", "name"), [(m, n) for m, n in PATHS if n in ("output", "jsonl", "summary", "json")])
def test_a_directory_is_no_file_to_write_to(tmp_path, monkeypatch, capsys, main, name):
    monkeypatch.chdir(tmp_path)
    for path in ("/", ".", ".."):
        assert main([f"--{name}={path}"]) == 2
        assert f"--{name} {path}: expected the name of a file" in capsys.readouterr().err
