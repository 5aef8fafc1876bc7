"""There is one distribution: the op needs only torch, and other parts say what to install."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import perce
from perce.errors import OF_TRAINING, TRANSFORMERS, installed, what_to_install
from perce.process import guarded
from tests.helpers import ROOT

COMMANDS = ("train", "score", "evaluate", "compare", "plan", "preview")
ADVICE = "pip install 'perce[train]'"
OF_THE_OP = {"torch", "triton", "perce_kernels", "typing_extensions"}  # torch needs the last
BROUGHT_BY_TORCH = {"filelock", "jinja2"}
HIDDEN = OF_TRAINING - BROUGHT_BY_TORCH | {"nltk", "packaging", "pandas", "requests", "rouge_score", "trl"}
# Python runs a sitecustomize.py when it starts.
HIDING = f"""
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {sorted(HIDDEN)} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
TOY = """
import sys
import torch
import perce, perce_kernels
from perce_kernels import fused_perce_loss, ops

assert not set(sys.modules) & {"transformers", "datasets", "numpy", "yaml"}
torch.manual_seed(0)
hidden, hidden_cf, target = torch.randn(40, 16), torch.randn(40, 16), torch.randint(97, (40,))
head = torch.nn.Linear(16, 97, bias=False)
optimizer = torch.optim.Adam(head.parameters(), 0.05)
losses = []
for _ in range(20):
    loss, stats = fused_perce_loss(hidden, head.weight, target, hidden_cf, return_stats=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 2, losses
"""
OPCHECK = """
leaves = hidden.requires_grad_(), head.weight
torch.library.opcheck(
    ops.loss_op,
    (*leaves, target, hidden_cf, None, None, None, 0.8, 5.0, "log", -100, None, 1.0, True, True, True, False, "torch"),
)
"""


@pytest.fixture
def torch_alone(tmp_path):
    """A function that runs Python as if only torch were installed."""
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])

    def run(*arguments):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        environment = inherited | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    return run


def test_the_op_trains_with_torch_alone(torch_alone):
    done = torch_alone("-c", TOY)
    assert done.returncode == 0, done.stderr


def test_the_version_is_that_of_the_distribution():
    assert perce.__version__ == importlib.metadata.version("perce")


def test_the_front_door_says_what_to_install(torch_alone):
    done = torch_alone("-c", """
import perce

for name in perce.__all__:
    try:
        getattr(perce, name)
    except ImportError as error:
        print(name, error)
""")  # fmt: skip
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert done.returncode == 0
    assert {*told} == {*perce.__all__} - {"DataConfig", "LossConfig", "MemoryConfig", "UserError"}
    for name, message in told.items():
        assert re.fullmatch(rf"perce.{name}: \w+ is not installed. {re.escape(ADVICE)} installs .*", message)


@pytest.mark.parametrize("name", ["trainer", "trl"])
def test_trainers_of_others_say_what_to_install(torch_alone, name):
    done = torch_alone("-c", f"import perce.integrations.{name}")
    assert done.returncode == 1 and ADVICE in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_what_to_install_and_still_helps(torch_alone, command):
    needed = {"plan": ["--model", "m", "--context", "1000"], "compare": ["--results", "a", "--compare_with", "b"]}
    asked = needed.get(command, [])
    done = torch_alone("-m", f"perce.{command}", *asked)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(rf"error: \w+ is not installed. {re.escape(ADVICE)} installs .*\n", done.stderr)
    helped = torch_alone("-m", f"perce.{command}", "--help")
    assert helped.returncode == 0 and "--config" in helped.stdout and not helped.stderr


def test_the_doctor_needs_torch_alone(torch_alone):
    done = torch_alone("-m", "perce", "doctor")
    assert done.returncode == 0, done.stdout
    assert re.search(r"transformers +not installed; needed for training: pip install 'perce\[train\]'", done.stdout)
    assert re.search(r"cpu +torch, because .* differs from the reference by \de-\d\d in float32", done.stdout)
    assert f"the commands cannot start (transformers is not installed. {ADVICE}" in done.stdout


def test_a_library_that_is_too_old_is_named(torch_alone, tmp_path):
    (tmp_path / "transformers.py").write_text('__version__ = "4.57.1"')
    (tmp_path / "sitecustomize.py").unlink()
    done = torch_alone("-c", "import perce; perce.PerceTrainer")
    found = f"transformers 4.57.1 is installed, and perce needs {TRANSFORMERS} or newer. {ADVICE}"
    assert done.returncode == 1 and f"ImportError: perce.PerceTrainer: {found}" in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'transformers.gone'", name="transformers.gone"),
        ModuleNotFoundError("No module named 'torch'", name="torch"),
        ImportError("libfoo.so: cannot open shared object file", name="numpy"),
        ImportError("cannot import name 'gone' from 'transformers'", name="transformers"),
        ImportError("peft has a condition of its own"),
    ],
    ids=str,
)
def test_what_is_broken_stays_as_it_is(error, monkeypatch):
    def fail(*_):
        raise error

    assert what_to_install(error) is None
    with pytest.raises(ImportError) as raised:
        guarded(fail)
    assert raised.value is error
    monkeypatch.setattr(perce, "importlib", SimpleNamespace(import_module=fail, util=importlib.util))
    with pytest.raises(ImportError) as raised:
        _ = perce.PerceTrainer
    assert raised.value is error


def test_an_extra_that_is_too_old_is_named_and_what_is_broken_stays_as_it_is():
    with pytest.raises(ImportError, match=r"cannot import name 'new'. pip install 'perce\[trl\]'"), installed("trl"):
        raise ImportError("cannot import name 'new'", name="trl.trainer")
    with pytest.raises(ImportError, match=r"^libfoo.so$"), installed("trl"):
        raise ImportError("libfoo.so", name="flash_attn")


def test_every_library_has_its_advice():
    imported = set()
    for path in [*ROOT.glob("perce/**/*.py"), *ROOT.glob("perce_kernels/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            others = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
            assert "perce_kernels" not in path.parts or others <= OF_THE_OP
            imported |= others
    assert imported - OF_THE_OP - {"perce"} <= OF_TRAINING | {"nltk", "rouge_score", "trl"}


def test_torch_is_all_that_is_required():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [re.match(r"[\w-]+", name)[0] for name in project["dependencies"]] == ["torch", "triton"]
    assert f"transformers>={TRANSFORMERS}" in project["optional-dependencies"]["train"]


@pytest.fixture
def checkout(tmp_path):
    """A function that runs the Python of a new virtual environment, in a copy of this checkout."""
    directory, venv = tmp_path / "checkout", tmp_path / "venv"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs")
    shutil.copytree(ROOT, directory, ignore=ignored)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}

    def run(*arguments, cwd=directory):
        environment = inherited | {"OMP_NUM_THREADS": "1"}
        return subprocess.run([str(python), *arguments], capture_output=True, text=True, cwd=cwd, env=environment)

    if (done := install(run, "setuptools>=77", "--retries=1")).returncode:
        pytest.skip(f"there is no package index to install from: {done.stderr.strip().splitlines()[-1]}")
    yield run
    shutil.rmtree(venv)  # gigabytes


def install(run, *arguments):
    return run("-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_fresh_installation_trains_a_head_with_torch_alone(checkout, tmp_path):
    done = install(checkout, ".", "-c", "constraints.txt")
    assert done.returncode == 0, done.stderr
    listed = checkout("-m", "pip", "list", "--format=json", "--disable-pip-version-check").stdout
    names = {item["name"].lower().replace("-", "_") for item in json.loads(listed)}
    assert {"torch", "perce"} <= names and not names & (HIDDEN | {"pyyaml"})
    done = checkout("-c", TOY + OPCHECK + "print(perce.__file__)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "venv")
    done = checkout("-m", "perce.train", cwd=tmp_path)
    assert done.returncode == 2 and ADVICE in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_wheel_brings_the_console_command(checkout, tmp_path):
    """Without the repository: what the commands read must be in the wheel."""
    done = checkout("-m", "pip", "wheel", ".", "-q", "--no-deps", "-w", str(tmp_path), "--disable-pip-version-check")
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("perce-*.whl")
    done = install(checkout, f"{wheel}[train]", "-c", str(ROOT / "constraints.txt"))
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "checkout")
    perce_command = "import sys; from importlib.metadata import entry_points; sys.argv[0] = 'perce'; "
    perce_command += "[script] = entry_points(group='console_scripts', name='perce'); sys.exit(script.load()())"
    (directory := tmp_path / "empty").mkdir()

    def run(*arguments):
        done = checkout("-c", perce_command, *arguments, cwd=directory)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    assert (tmp_path / "venv" / "bin" / "perce").is_file() or os.name == "nt"
    assert re.fullmatch(r"perce \d+\.\d+\.\d+\n", run("--version"))
    assert "No problem found." in run("doctor") and "usage: perce train" in run("train", "--help")
    assert "without the persona" in run("preview", "--rows", "1")
    run("score", "--limit", "2", "--output", "page.html", "--terminal", "1")
    assert "Content-Security-Policy" in (directory / "page.html").read_text(encoding="utf-8")
    run("train", "--max_steps", "1", "--eval_examples", "2", "--output_dir", "run")
    assert (directory / "run" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", [f"{TRANSFORMERS}.1", "5.20.1", "newest"])
def test_training_passes_its_tests_under_transformers(checkout, version):
    pinned = [f"transformers=={version}"] if version != "newest" else []
    done = install(checkout, ".[test]", *pinned, "-c", "constraints.txt")
    assert done.returncode == 0, done.stderr
    rooms = [f"tests/perce/{name}" for name in ("training", "running", "model", "integrations")]
    done = checkout("-m", "pytest", *filter(lambda room: (ROOT / room).is_dir(), rooms), "-n2", "--dist=loadfile")
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-20_000:]
