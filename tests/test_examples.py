"""Every file in examples/ runs unchanged on a tiny model; README shows a part of one."""

import re
import runpy
import sys

import pytest

from perce import default_model_path
from tests.helpers import ROOT
from tests.helpers.tiny import CHATML, save_tiny_model

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(name, model, directory, monkeypatch, capsys):
    argv = [str(EXAMPLES / name)]
    if name == "trl_sft.py":
        pytest.importorskip("trl", reason="TRL is not installed: pip install 'perce[trl]' (Python 3.11 and newer)")
        argv += [
            "--config",
            "examples/trl_sft.yaml",
            "--model_name_or_path",
            str(model),
            "--output_dir",
            str(directory),
        ]
    elif name != "op.py":
        argv.append(str(model))
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.chdir(ROOT)
    runpy.run_path(argv[0], run_name="__main__")
    return [float(found) for found in re.findall(r"loss'?:? +'?([0-9.]+)", capsys.readouterr().out)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_trains(name, tmp_path, monkeypatch, capsys):
    model = save_tiny_model(tmp_path / "model", chat_template=CHATML)
    losses = run(name, model, tmp_path / "run", monkeypatch, capsys)
    assert len(losses) >= 3
    if name in ("op.py", "loop.py"):  # the steps of other examples have different rows
        assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file() == (name == "trl_sft.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_trains_the_default_model(name, tmp_path, monkeypatch, capsys):
    assert run(name, default_model_path(), tmp_path / "run", monkeypatch, capsys)


def test_the_loop_in_readme_is_the_one_that_runs():
    def lines(text):
        return [line.split("  #")[0].strip() for line in text.splitlines() if line.strip()]

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = next(
        block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "fused_perce_loss(" in block
    )
    known = lines((EXAMPLES / "loop.py").read_text(encoding="utf-8"))
    assert [line for line in lines(shown) if line not in known] == []
