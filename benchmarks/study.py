"""Runs the paper's comparison, resumably: `python -m benchmarks.study --config FILE --data_root DIR`.

    cells     objective × learning rate × seed × data set, each trained and evaluated in child processes
    stages    base → rates (one seed, the tuned objectives) → main (all seeds at each objective's best rate) → the
              other rates, whose losses show how much the rate matters → variants (one seed)
    results   benchmarks/results/study_NAME.json: every cell that ran, with its evaluation example by example
    report    `python -m benchmarks.study_report` writes docs/reference/study.md and its pictures from that file

Cells in the results are not run again; a training run that was interrupted begins anew. No test set influences a
choice: a learning rate is chosen by the validation loss with persona at the end of the runs of stage "rates", which are
not evaluated on test data before.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study_results import best_rate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KEPT = (
    "key", "user_id", "source", "tokens", "personal_tokens", "loss", "loss_without", "loss_personal", "loss_other",
    "loss_swapped", "loss_other_swapped", "rouge1", "rougeL", "meteor", "meteor_exact_stem", "uses_persona",
    "reference_uses_persona",
)  # fmt: skip
"""The fields of an evaluated example that are kept: all but the texts, which belong to the data."""


@dataclass(frozen=True)
class Cell:
    """One training run; `objective` "base" is the untrained model."""

    stage: str
    data: str
    objective: str
    learning_rate: float | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of perce.train, such as a clip or a normalisation."""

    @property
    def name(self) -> str:
        extra = "".join(f"-{name}={value}" for name, value in sorted(self.options.items()))
        rate = "" if self.learning_rate is None else f"-{self.learning_rate:g}-seed{self.seed}"
        return f"{self.data}-{self.objective}{extra}{rate}"


class Study:
    """A config, its results file, and the child processes that produce the results."""

    def __init__(self, config: Mapping[str, Any], data_root: Path, jobs: int) -> None:
        self.config, self.data_root, self.jobs = config, data_root, jobs
        self.path = RESULTS / f"study_{config['name']}.json"
        self.work = ROOT / "runs" / "study" / config["name"]
        self.results: dict[str, Any] = {"config": dict(config), "cells": {}}
        if self.path.is_file():
            self.results = json.loads(self.path.read_text(encoding="utf-8"))
            changed = [
                k for k in ("model", "data", "train", "evaluate") if self.results["config"].get(k) != config.get(k)
            ]
            if changed:
                sys.exit(
                    f"{self.path}: its cells ran with different settings of {', '.join(changed)}. "
                    "Give the study another name."
                )
            self.results["config"] = dict(config)

    def run(self) -> None:
        for stage in (self.base_cells, self.rate_cells, self.main_cells, self.other_rate_cells, self.variant_cells):
            todo = [cell for cell in stage() if not self._is_done(cell)]
            with ThreadPoolExecutor(self.jobs) as pool:
                for cell, outcome in zip(todo, pool.map(self._run_cell, todo), strict=True):
                    self.results["cells"][cell.name] = outcome
                    self._save()

    def base_cells(self) -> Iterator[Cell]:
        for data in self.config["data"]:
            yield Cell("base", data, "base")

    def rate_cells(self) -> Iterator[Cell]:
        seed = self.config["seeds"][0]
        for data in self.config["data"]:
            for objective in self.config["tuned"]:
                for rate in self.config["learning_rates"]:
                    yield Cell("rates", data, objective, rate, seed)

    def main_cells(self) -> Iterator[Cell]:
        for seed in self.config["seeds"]:
            for objective in [*self.config["tuned"], *self.config["untuned"]]:
                for data in self.config["data"]:
                    yield Cell("main", data, objective, self.best_rate(data, objective), seed)

    def variant_cells(self) -> Iterator[Cell]:
        """PerCE with other clips, schedules and normalisations, at PerCE's own best rate, one seed."""
        for options in self.config.get("variants", []):
            for data in self.config["data"]:
                rate = self.best_rate(data, "perce")
                yield Cell("variants", data, "perce", rate, self.config["seeds"][0], options)

    def other_rate_cells(self) -> Iterator[Cell]:
        """The cells at learning rates that were not the best: "stability over learning rates"."""
        for cell in self.rate_cells():
            if cell.learning_rate != self.best_rate(cell.data, cell.objective):
                yield replace(cell, stage="other rates")

    def best_rate(self, data: str, objective: str) -> float:
        rate = best_rate(self.config, self.results["cells"].values(), data, objective)
        assert rate is not None, "stage rates comes first"
        return rate

    def _evaluated(self, cell: Cell) -> dict[str, bool]:
        """Datasets that a cell is evaluated on, and whether replies are generated there."""
        if cell.stage == "rates":
            return {}
        if cell.stage == "variants":
            return {cell.data: self.config.get("variant_replies", False)}
        if cell.stage not in ("base", "main"):
            return {cell.data: False}
        if (
            cell.stage == "main" and cell.seed != self.config["seeds"][0]
        ):  # losses only: replies and the other datasets would cost as much again
            return {cell.data: False}
        return {data: data == cell.data for data in self.config["data"]}

    def _is_done(self, cell: Cell) -> bool:
        known = self.results["cells"].get(cell.name)
        return known is not None and self._evaluated(cell).keys() <= known["evaluations"].keys()

    def _run_cell(self, cell: Cell) -> dict[str, Any]:
        directory = self.work / cell.name
        started = time.time()
        outcome: dict[str, Any] = {
            "stage": cell.stage, "data": cell.data, "objective": cell.objective, "learning_rate": cell.learning_rate,
            "seed": cell.seed, "options": dict(cell.options), "evaluations": {}, "seconds": 0.0,
        }  # fmt: skip
        outcome |= self.results["cells"].get(cell.name, {})
        if cell.objective != "base":
            outcome |= self._train(cell, directory)
        outcome["evaluations"] = dict(outcome["evaluations"])
        for data, generate in self._evaluated(cell).items():
            if data not in outcome["evaluations"]:
                outcome["evaluations"][data] = self._evaluate(cell, data, directory, generate)
        outcome["seconds"] = round(outcome["seconds"] + time.time() - started, 1)
        print(f"{cell.name}: {outcome['seconds']:.0f} s", flush=True)
        return outcome

    def _train(self, cell: Cell, directory: Path) -> dict[str, Any]:
        state = directory / "trainer_state.json"
        if not state.is_file():  # else only an evaluation was interrupted, and the trained model is kept
            shutil.rmtree(directory, ignore_errors=True)
            self._child("perce.train", {
                "data": str(self.data_root / cell.data), "output_dir": str(directory), "objective": cell.objective,
                "learning_rate": cell.learning_rate, "seed": cell.seed, "save_steps": 0, "report_examples": 0,
                **self._model(), **self.config["train"], **cell.options,
            }, directory)  # fmt: skip
        history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
        evaluations = [entry for entry in history if "eval_loss_with_persona" in entry]
        logs = [entry for entry in history if "ce" in entry]
        return {
            "validation_before": evaluations[0], "validation": evaluations[-1], "log": logs,
            "train_seconds": next((e["train_runtime"] for e in history if "train_runtime" in e), None),
        }  # fmt: skip

    def _evaluate(self, cell: Cell, data: str, directory: Path, generate: bool) -> dict[str, Any]:
        output = self.work / "evaluations" / f"{cell.name}-on-{data}.json"
        model = self._model() if cell.objective == "base" else {"model": str(directory)}
        options = {**self.config["evaluate"], **self.config["data"][data], "generate": generate}
        for of_replies in () if generate else ("temperature", "max_new_tokens"):
            options.pop(of_replies, None)
        self._child("perce.evaluate", {
            "data": str(self.data_root / data), "output": str(output), "split": "test", **model, **options,
        }, output.with_suffix(""))  # fmt: skip
        result = json.loads(output.read_text(encoding="utf-8"))
        records = [{name: record[name] for name in KEPT if name in record} for record in result["records"]]
        return {"metrics": result["metrics"], "notes": result["notes"], "records": records}

    def _model(self) -> dict[str, Any]:
        return {"model": self.config["model"]} if self.config.get("model") else {}

    def _child(self, module: str, options: Mapping[str, Any], log: Path) -> None:
        flags = [f"--{name}={value}" for name, value in options.items()]
        log = log.with_name(f"{log.name}.{module.partition('.')[2]}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(max((os.cpu_count() or 1) // self.jobs, 1))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w", encoding="utf-8") as file:
            child = subprocess.run(
                [sys.executable, "-m", module, *flags], cwd=ROOT, env=environment, stdout=file, stderr=file
            )  # fmt: skip
        if child.returncode:
            raise RuntimeError(f"{module} failed with code {child.returncode}; see {log}")

    def _save(self) -> None:
        """Replaces the file in one step, so that an interruption cannot lose results of hours."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, separators=(",", ":")) + "\n", encoding="utf-8")
        partial.replace(self.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="YAML, such as benchmarks/studies/cpu.yaml")
    parser.add_argument("--data_root", required=True, type=Path, help="directory that holds the data sets by name")
    parser.add_argument("--jobs", type=int, default=1, help="cells that run at the same time, sharing the cores")
    parser.add_argument("--dry_run", action="store_true", help="list the base and rate cells and which are done")
    arguments = parser.parse_args()
    config = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    missing = [name for name in config["data"] if not (arguments.data_root / name).is_dir()]
    if missing:
        sys.exit(f"--data_root {arguments.data_root}: expected a directory with {', '.join(missing)}, which it lacks.")
    study = Study(config, arguments.data_root.resolve(), arguments.jobs)
    if arguments.dry_run:
        for cell in (*study.base_cells(), *study.rate_cells()):
            print("done" if cell.name in study.results["cells"] else "to do", cell.name)
        return
    study.run()


if __name__ == "__main__":
    main()
