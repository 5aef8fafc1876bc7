"""python -m perce.preview, the command."""

import subprocess
import sys

from perce.preview import main
from tests.helpers.tiny import save_tiny_model


def test_the_built_in_examples(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    assert main(["--model", str(model), "--rows", "1"]) == 0
    printed = capsys.readouterr().out
    assert "without the persona" in printed and printed.count("⟦persona: ") == 1


def test_mistakes_are_told_in_a_line(tmp_path, capsys):
    assert main(["--data", str(tmp_path / "none.jsonl")]) == 2
    assert "error: No such file or directory" in capsys.readouterr().err
    assert main(["--rows", "-1"]) == 2
    assert "rows: expected >= 0, got -1" in capsys.readouterr().err


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "perce.preview", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--sample" in done.stdout and "--persona_markers" in done.stdout
