"""What both GPU commands share: options, wheels, the run of the stages, the tables at the end."""

import argparse
import os
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path

from benchmarks.gpu import STARTED, training, wheels
from benchmarks.gpu.results import Results
from benchmarks.gpu.supervise import ROOT, Stage, run
from benchmarks.gpu.tables import RACES, report

RESULTS = ROOT / "benchmarks/results/gpu"
SITE = ROOT / "build/site-packages"
START_UP = 30.0
"""Seconds that the first stage of a command has for imports, wheels and its own start; later stages start early."""
CPU_TIME = 4  # stages get this many times as long with tiny sizes on two slow cores
Stages = Callable[[str, tuple[str, ...]], list[list[Stage]]]


def command(name: str, doc: str, stages: Stages, arguments: list[str] | None, *, at_least: str) -> Results:
    """Runs all stages of one command, or those of --only; `doc` is its --help. Exits with an error if one of --only, or
    without it the stage `at_least`, has measured nothing of perce."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results (default %(default)s)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to test the harness"
    )
    parser.add_argument("--fakes", nargs="*", default=(), metavar="PEER", help="fakes of tests/helpers/fake_peers.py")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="only these stages, each with its own time")
    parser.add_argument("--seconds", type=float, default=inf, help="end all stages by then (default: as planned)")
    parser.add_argument("--wheels", nargs="+", type=Path, default=[], metavar="DIR", help="parts made by `make wheels`")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit(f"{name}: expected a CUDA GPU, found none; nothing was measured")
    rows = stages(options.device, tuple(options.fakes))
    known = [stage.name for row in rows for stage in row]
    if options.only and (unknown := set(options.only) - set(known)):
        parser.error(f"--only: expected stages of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exit runs the clean-up that stops all processes
    results = Results(name, options.results, started=STARTED)
    if options.device == "cuda" and (missing := compiler_missing()):
        results.put("compiler", reason=missing)
    rows = in_turn(rows, options.only or known)
    install(options.wheels, results)
    if options.device == "cpu":
        rows = [[replace(stage, until=CPU_TIME * stage.until) for stage in row] for row in rows]
    rows = [[replace(stage, until=min(stage.until, options.seconds)) for stage in row] for row in rows]
    run(rows, results, options.device)
    print(report([results.tree]))
    print(f"\nwritten to {results.path}")
    if missed := unmeasured(results, options.only or [at_least]):
        sys.exit(f"{name}: perce was not measured in {', '.join(missed)}: see the reasons above")
    return results


def in_turn(rows: list[list[Stage]], wanted: list[str]) -> list[list[Stage]]:
    """The wanted stages, one row after the other. Each row keeps the time that it was planned with; a row that was not
    planned as the first one, and now is, has START_UP in addition."""
    kept: list[list[Stage]] = []
    planned = end = 0.0
    for row in rows:
        if not kept and planned:
            end = START_UP
        own, planned = max(stage.until for stage in row) - planned, max(stage.until for stage in row)
        if row := [stage for stage in row if stage.name in wanted]:
            kept.append([replace(stage, until=stage.until + end + own - planned) for stage in row])
            end += own
    return kept


def unmeasured(results: Results, wanted: list[str]) -> list[str]:
    """The wanted stages in which nothing was measured, or in a race nothing of perce."""
    measured = set()
    for key, line in results.lines.items():
        stage = key.split("/")[0]
        if "reason" not in line and (stage not in RACES or ("/perce" in key and "seconds" in line)):
            measured.add(stage)
    return [stage for stage in wanted if stage not in measured]


def compiler_missing() -> str | None:
    """What Triton needs to build its launchers and does not find, if anything."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton builds its launchers with a C compiler: expected gcc, clang or $CC, found none"
    return None if header.exists() else f"Triton builds its launchers with Python's headers: expected {header}"


def install(parts: list[Path], results: Results) -> None:
    """Installs the parts that `make wheels` made, for the processes that follow; those of an earlier command stay. A
    damaged part is reported as a line."""
    if not parts and not SITE.exists():
        return
    for problem in wheels.unpack(SITE, parts):
        results.put(f"wheels/{problem.partition(': ')[0]}", reason=problem.partition(": ")[2])
    found = [SITE, SITE / "nvidia_cutlass_dsl/dsl_packages", *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, found))
    for model in (part / "model" for part in parts):
        if model.is_dir():
            os.environ[training.MODEL] = str(model.resolve())
    results.put("stages/wheels", seconds=round(time.monotonic() - results.started, 2))
