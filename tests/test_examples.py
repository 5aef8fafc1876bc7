"""Every file in examples/ runs unchanged on a tiny model; README shows a part of one."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from perce import default_model_path
from tests.helpers import ROOT
from tests.helpers.ranks import end_rank, run_ranks
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


@pytest.mark.slow
def test_the_loop_trains_alike_on_two_processes(tmp_path):
    """Under DDP, whose gradients are means over the processes; without it each would have its own."""
    run_ranks("tests.test_examples", str(save_tiny_model(tmp_path / "model", chat_template=CHATML)), str(tmp_path))
    first, second, expected = (torch.load(tmp_path / f"{name}.pt") for name in ("0", "1", "expected"))
    for name, gradient in expected.items():
        torch.testing.assert_close(first[name], gradient, atol=1e-6, rtol=1e-4)
        assert torch.equal(first[name], second[name])


if __name__ == "__main__":  # one rank of two, each with one of the two replies
    model, directory = sys.argv[1:]
    sys.argv = ["loop.py", model]
    loop = runpy.run_path(str(EXAMPLES / "loop.py"))
    torch.distributed.init_process_group("gloo")

    def gradients(step, row):
        step.zero_grad()
        one, other = (
            (loop[f"ids_{which}"][row : row + 1], loop[mask][row : row + 1])
            for which, mask in (("with_persona", "is_response"), ("without_persona", "is_response_without_persona"))
        )
        step(one, other)[0].backward()
        return {name.removeprefix("module."): x.grad.clone() for name, x in step.named_parameters()}

    rank = torch.distributed.get_rank()
    alone = [gradients(loop["step_of"], row) for row in range(2)]
    found = gradients(torch.nn.parallel.DistributedDataParallel(loop["step_of"]), rank)
    torch.save(found, Path(directory, f"{rank}.pt"))
    if rank == 0:
        torch.save({name: (alone[0][name] + alone[1][name]) / 2 for name in found}, Path(directory, "expected.pt"))
    end_rank()
