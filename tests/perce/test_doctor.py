"""perce doctor: what it says is what the rest of perce does, and what is broken is named."""

import importlib
import importlib.metadata
import importlib.util
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch

import perce_kernels
from perce import doctor
from perce.doctor import main
from perce.model.loading import resolve_precision
from perce_kernels import backends


def rows(rows):
    return dict(rows)


def test_a_healthy_machine(capsys, monkeypatch):
    monkeypatch.delenv("PERCE_BACKEND", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert f"torch          {torch.__version__}" in printed and "HF_HUB_OFFLINE=1" in printed
    assert printed.endswith("No problem found.\n") and doctor.PROBLEM not in printed


def hide(monkeypatch, *names):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else real(name))


def test_a_package_without_metadata_has_its_own_version(monkeypatch):
    """As triton's in builds of torch for ROCm, whose distribution has another name."""
    real = importlib.metadata.version

    def version(name):
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert rows(doctor.packages())["triton"] == importlib.import_module("triton").__version__


def test_the_build_of_torch_is_told(monkeypatch):
    """PyPI's metadata have no build. A build for CUDA on a machine without a driver looks like one for CPUs."""
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0" if name == "torch" else real(name))
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert rows(doctor.packages())["torch"] == "2.11.0+cu130"
    assert rows(doctor.devices())["gpu"] == "none found by torch, which is built for CUDA 13.0"
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert rows(doctor.devices())["gpu"].endswith("whose build has no GPU support")


def test_what_training_lacks_is_a_problem_unless_nobody_trains(monkeypatch):
    hide(monkeypatch, "rich")
    assert rows(doctor.packages())["training"].startswith(f"{doctor.PROBLEM}rich is not installed. pip install")
    hide(monkeypatch, "rich", "transformers")
    assert "training" not in rows(doctor.packages())


def test_a_transformers_that_is_too_old_is_a_problem(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.2.0")
    assert "transformers 5.2.0 is installed, and perce needs" in rows(doctor.packages())["training"]


def test_without_torch_there_is_one_problem(capsys, monkeypatch):
    hide(monkeypatch, "torch")
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out.count(doctor.PROBLEM) == 1 and "a run would use" not in printed.out


def test_a_gpu_that_does_not_answer_is_a_problem(capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA driver initialization failed\nlong advice")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert f"stopped here   {doctor.PROBLEM}RuntimeError: CUDA driver initialization failed\n" in printed
    assert "\nenvironment\n" in printed, "the other sections follow"


@pytest.mark.parametrize(
    ("hip", "arch", "kind"),
    [(None, "NVIDIA H200", "compute capability 9.0"), ("7.0", "gfx942:sramecc+", "gfx942:sramecc+")],
)
def test_what_kind_of_gpu_it_is(monkeypatch, hip, arch, kind):
    """CUDA's builds of torch have gcnArchName too, and it is the name of the GPU there."""
    facts = SimpleNamespace(name="NVIDIA H200", gcnArchName=arch, major=9, minor=0)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (130 * 2**30, 139 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    assert list(doctor.devices())[-1] == ("cuda:0", f"NVIDIA H200, 139.0 GiB (130.0 GiB free), {kind}")


def test_a_package_that_cannot_be_imported_is_a_problem(capsys, monkeypatch):
    real = importlib.import_module

    def broken(name):
        if name == "peft":
            raise ImportError("undefined symbol: _ZN2at\nadvice for others")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    assert main([]) == 2
    printed = capsys.readouterr()
    line = next(line for line in printed.out.splitlines() if line.startswith("  peft"))
    assert doctor.PROBLEM in line and line.endswith("importing it fails (ImportError: undefined symbol: _ZN2at)")
    assert "error: 1 problem found, marked above." in printed.err and "No problem" not in printed.out


def test_the_backend_is_the_one_that_runs(monkeypatch):
    ran = []
    real = importlib.import_module
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: ran.append(name) or real(name))
    monkeypatch.delenv("PERCE_BACKEND", raising=False)
    told = rows(doctor.op_checks())["cpu"]
    assert told.startswith("torch, because the Triton kernels need an NVIDIA GPU; differs from the reference by ")
    assert backends.BACKENDS["torch"].module in ran
    monkeypatch.setenv("PERCE_BACKEND", "torch")
    assert rows(doctor.op_checks())["cpu"].startswith("torch, because PERCE_BACKEND says so; ")
    monkeypatch.setenv("PERCE_BACKEND", "reference")
    assert rows(doctor.op_checks())["cpu"].startswith("reference, because PERCE_BACKEND says so; ")


def test_a_backend_that_cannot_run_is_a_problem(monkeypatch):
    monkeypatch.setenv("PERCE_BACKEND", "tritn")
    told = rows(doctor._whatever_happens(doctor.op_checks()))["stopped here"]
    assert told.startswith(f"{doctor.PROBLEM}ValueError: PERCE_BACKEND: expected one of auto,")


def test_a_backend_that_computes_something_else_is_a_problem(monkeypatch):
    def wrong(hidden, *args, backend, **kwargs):
        return hidden.sum() + args[0].sum() * (1.01 if backend == "auto" else 1)

    monkeypatch.setattr(perce_kernels, "fused_perce_loss", wrong)
    told = rows(doctor.op_checks())["cpu"]
    assert told.startswith(doctor.PROBLEM) and "e-0" in told


def test_a_backend_that_computes_nan_is_a_problem(monkeypatch):
    def wrong(hidden, *args, backend, **kwargs):
        return hidden.sum() + args[0].sum() * (float("nan") if backend == "auto" else 1)

    monkeypatch.setattr(perce_kernels, "fused_perce_loss", wrong)
    assert rows(doctor.op_checks())["cpu"].startswith(doctor.PROBLEM)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_choices_are_those_of_a_run(monkeypatch, tmp_path):
    monkeypatch.setenv("PERCE_CACHE", str(tmp_path))
    told = rows(doctor.choices())
    assert told["device"] == "cpu, because torch finds no GPU"
    assert told["precision"].startswith(f"{resolve_precision('auto', 'cpu')}, because this CPU has")
    assert told["packing"].startswith("no, ") and f"not in {tmp_path} yet" in told["default model"]


def test_replies_cannot_be_scored_without_nltk(monkeypatch):
    assert rows(doctor.choices())["METEOR"].startswith("with")
    hide(monkeypatch, "nltk")
    assert rows(doctor.choices())["METEOR"] == "no, because nltk is not installed"


def test_it_takes_no_options(capsys):
    assert main(["--model", "x"]) == 2
    assert "error: Unrecognized arguments: --model x." in capsys.readouterr().err


def test_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor"])
    with pytest.warns(RuntimeWarning, match="perce.doctor"), pytest.raises(SystemExit) as end:  # it is imported already
        runpy.run_module("perce.doctor", run_name="__main__")
    assert end.value.code == 0 and "\na run would use\n" in capsys.readouterr().out
