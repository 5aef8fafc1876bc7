"""`python -m perce.train` itself: does it run on this device, and as on a CPU? A tiny model, a few steps, and a score.

All runs at once, each a process: all weights and LoRA in bf16 on the device, all weights in fp32 on the CPU. Their
first loss and PIR are those of the same weights and rows: the device's may differ by what bf16 explains.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import child as children
from benchmarks.gpu.child import Child, Unable
from benchmarks.gpu.wheels import save_model

STEPS = 6
COMMON = ("--max_steps", str(STEPS), "--logging_steps", "1", "--per_device_train_batch_size", "4",
          "--gradient_accumulation_steps", "1", "--eval_examples", "4", "--report_to", "none")  # fmt: skip
CPU = ("--use_cpu", "true")
RUNS = {
    "full": ("--lora_r", "0"),
    "lora": ("--lora_r", "8"),
    "cpu": ("--lora_r", "0", "--precision", "fp32", *CPU),
}
MODEL = "PERCE_TINY_MODEL"
"""Environment variable: directory of the model that came with the wheels; without it one is made here."""
LOSS_DIFFERENCE, PIR_DIFFERENCE = 0.02, 0.02
"""Of the first step's: relative, and in nats."""


def start(module: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen) -> None:
    """Wait; Unable with its last words if it failed."""
    _, stderr = process.communicate()
    if process.returncode:
        print(stderr, file=sys.stderr)
        words = [line for line in stderr.splitlines() if line.strip()]
        raise Unable(f"ended with {process.returncode}: {words[-1][:300] if words else 'without a word'}")


def logged(directory: Path) -> dict[str, Any]:
    """What a run logged of its first and last step."""
    history = json.loads((directory / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    return {
        "loss": steps[0]["loss"], "pir_mean": steps[0]["pir_mean"], "last_loss": steps[-1]["loss"],
        "steps": len(steps),
    }  # fmt: skip


def stage(child: Child) -> None:
    name, started = child.request.stage, time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        child.begin(f"{name}/model")
        model = os.environ.get(MODEL) or str(save_model(root / "model"))
        common = ("--model", model, *COMMON)
        device = CPU if child.request.device == "cpu" else ()
        child.begin(f"{name}/start")
        processes = {
            run: start("perce.train", *common, *options, *device, "--output_dir", str(root / run))
            for run, options in RUNS.items()
        }  # fmt: skip
        scoring = start("perce.score", "--model", model, "--limit", "8", "--jsonl", str(root / "s.jsonl"))
        found: dict[str, dict[str, Any]] = {}
        for run, process in processes.items():

            def ended(run: str = run, process: subprocess.Popen = process) -> dict[str, Any]:
                outcome(process)
                return logged(root / run) | {"seconds": round(time.monotonic() - started, 1)}

            line = child.measured(f"{name}/{run}", ended)
            if line is not None:
                found[run] = line
        child.measured(f"{name}/score", lambda: scored(scoring, root / "s.jsonl", started))
        if {"full", "cpu"} <= found.keys():
            child.measured(f"{name}/as on a CPU", lambda: compared(found["full"], found["cpu"]))


def compared(ours: dict[str, Any], cpu: dict[str, Any]) -> dict[str, Any]:
    loss, pir = abs(ours["loss"] / cpu["loss"] - 1), abs(ours["pir_mean"] - cpu["pir_mean"])
    alike = loss <= LOSS_DIFFERENCE and pir <= PIR_DIFFERENCE
    return {"alike": alike, "loss_difference": loss, "pir_difference": pir}


def scored(process: subprocess.Popen, report: Path, started: float) -> dict[str, Any]:
    """perce.score on the same model."""
    outcome(process)
    return {"records": len(report.read_text(encoding="utf-8").splitlines()), "seconds": time.monotonic() - started}


if __name__ == "__main__":
    children.main(stage, __doc__)
