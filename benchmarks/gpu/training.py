"""`python -m perce.train` itself: does it run on this device, with the same results as on a CPU? A tiny model is
trained for a few steps and scored.

train    all weights and LoRA in bf16 on the device, all weights in fp32 on the CPU; perce doctor's findings
flash    sdpa, and flash-attn-4 with padded and with packed sequences
flex     packed sequences, and requests of one persona, under flex attention; alone, because its compilation takes long.
         Compilations that were repeated are counted
options  options that must not change the first loss: memory, Liger's kernels, DDP, requests one by one; and
         other objectives

All runs of a stage start together, each in a process of its own. Their first loss and PIR belong to the same weights
and rows, so they may differ only by the error of bf16. A run that has not ended in time says where it was.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu import child as children
from benchmarks.gpu.child import Child, Unable, die_with_parent
from benchmarks.gpu.results import NO_TIME
from benchmarks.gpu.wheels import save_model

STEPS = 6
COMMON = ("--max_steps", str(STEPS), "--logging_steps", "1", "--per_device_train_batch_size", "4",
          "--gradient_accumulation_steps", "1", "--eval_examples", "4", "--report_to", "none")  # fmt: skip
CPU = ("--use_cpu", "true")
FULL = ("--lora_r", "0")
FLASH = (*FULL, "--attn_implementation", "flash_attention_4")
FLEX = (*FULL, "--attn_implementation", "flex_attention")
SHARED = ("--share_persona", "4")
FP32 = ("--precision", "fp32", *CPU)
OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (), "checkpointing": ("--activation_checkpointing", "true"), "persona_grad": ("--persona_grad", "none"),
    "mlp_tile": ("--mlp_tile", "32"),
    "torch": ("--backend", "torch"), "liger": ("--use_liger_kernel", "true"), "ddp": (),
}  # fmt: skip
REQUESTS = {
    "shared persona": (), "one by one": ("--branches_per_forward", "1"), "detached": ("--persona_grad", "none"),
}  # fmt: skip
"""Options of runs whose batches are four requests of one persona."""
RUNS = {
    "train": {"full": FULL, "lora": ("--lora_r", "8"), "cpu": (*FULL, *FP32)},
    "flash": {"sdpa": FULL, "flash": FLASH, "packed": (*FLASH, "--packing", "true")},
    "flex": {
        "sdpa": FULL,
        "packed": (*FLEX, "--packing", "true"),
        "shared": (*FULL, *SHARED),
        "flex": (*FLEX, *SHARED),
    },
    "options": {name: (*FULL, *options) for name, options in OPTIONS.items()}
    | {name: (*FULL, *SHARED, *options) for name, options in REQUESTS.items()}
    | {
        f"{objective}{where}": (*FULL, "--objective", objective, *options)
        for objective in ("entce", "nextquill")
        for where, options in (("", ()), (" on a CPU", FP32))
    },
}
ALIKE = {"train": {"as on a CPU": ("full", "cpu")},
         "flash": {"flash as sdpa": ("flash", "sdpa"), "packed as sdpa": ("packed", "sdpa")},
         "flex": {"packed as sdpa": ("packed", "sdpa"), "flex as shared": ("flex", "shared")},
         "options": {f"{name} as plain": (name, "plain") for name in OPTIONS if name != "plain"}
         | {f"{name} as shared persona": (name, "shared persona") for name in REQUESTS if name != "shared persona"}
         | {f"{name} as on a CPU": (name, f"{name} on a CPU") for name in ("entce", "nextquill")}}  # fmt: skip
LAUNCHER = {"ddp": ("torch.distributed.run", "--nproc_per_node", "1", "--master_port", "29555", "-m")}
"""By run: the launcher of its command. Even one process forms a process group, by NCCL on a GPU."""
MODEL = "PERCE_TINY_MODEL"
"""Environment variable: directory of the model that came with the wheels; without it, one is made here."""
THREADS = str(min(4, max(1, (os.cpu_count() or 1) // 4)))  # of each run: several share the cores
ABORTION = 2.0  # seconds that runs get to print their stacks
LOSS_DIFFERENCE, PIR_DIFFERENCE = 0.005, 0.003
"""Allowed differences in the first step: relative, and in nats. The model's mean PIR is 0.018, so losing it shows."""


class Run:
    """`python -m MODULE ARGUMENTS`, in the background."""

    def __init__(self, module: str, *arguments: str):
        self.started = time.monotonic()
        kept = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)]  # noqa: SIM115  as long as the process
        self.stdout, self.stderr = kept
        command = [sys.executable, "-W", "ignore", "-X", "faulthandler", "-m", module, *arguments]
        self.popen = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.stdout, stderr=self.stderr,
            preexec_fn=_begin,
            env=os.environ | {"OMP_NUM_THREADS": THREADS, "TORCH_LOGS": "recompiles"},
        )  # fmt: skip

    @property
    def has_ended(self) -> bool:
        return self.popen.poll() is not None

    def check(self) -> float:
        """Seconds that it took. Unable with its last line of standard error if it failed."""
        if self.popen.wait():
            text = _text_of(self.stderr)
            print(*self.said(), text, sep="\n", file=sys.stderr)
            words = [line for line in text.splitlines() if line.strip()]
            raise Unable(f"ended with {self.popen.returncode}: {words[-1][:300] if words else 'without a word'}")
        return round(time.monotonic() - self.started, 1)

    def aborted(self, until: float) -> str:
        """Where its main thread was when it was told to abort, if it says so until then. The stacks of all threads go
        to standard error."""
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(max(0.1, until - time.monotonic()))
        self.popen.kill()
        text = _text_of(self.stderr)
        print(*self.said(), text, sep="\n", file=sys.stderr)
        _, stack, main = text.rpartition("(most recent call first):\n")
        return main.split("\n", 1)[0].strip() if stack else "a place that it did not tell"

    def compiled_again(self) -> dict[str, Any]:
        """How often torch.compile has compiled a function again, and whether it gave one up; nothing if neither."""
        text = _text_of(self.stderr)
        again, given_up = text.count("Recompiling function"), "recompile_limit" in text
        return {"recompilations": again, "gave_up": given_up} if again or given_up else {}

    def said(self) -> list[str]:
        """The lines of its standard output."""
        return _text_of(self.stdout).splitlines()


def _begin() -> None:
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # of a process that is aborted


def _text_of(file: Any) -> str:
    file.seek(0)
    return file.read()


def logged(directory: Path) -> dict[str, Any]:
    """What a run logged about its first and last step."""
    history = json.loads((directory / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    return {
        "loss": steps[0]["loss"], "pir_mean": steps[0].get("pir_mean", 0.0), "last_loss": steps[-1]["loss"],
        "steps": len(steps),
    }  # fmt: skip


def stage(child: Child) -> None:
    name = child.request.stage
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        child.begin(f"{name}/start")
        model = os.environ.get(MODEL) or str(save_model(root / "model"))
        device = CPU if child.request.device == "cpu" else ()
        train = ("perce.train", "--model", model, *COMMON)
        runs = {
            run: Run(*LAUNCHER.get(run, ()), *train, *options, *device, "--output_dir", str(root / run))
            for run, options in RUNS[name].items()
        }
        report = root / "tokens.jsonl"
        if name == "train":
            runs["score"] = Run("perce.score", "--model", model, "--limit", "8", "--jsonl", str(report))
            runs["doctor"] = Run("perce", "doctor")
        found: dict[str, dict[str, Any]] = {}
        while runs and not child.out_of_time:
            for run in [run for run, process in runs.items() if process.has_ended]:
                process = runs.pop(run)

                def outcome(run: str = run, process: Run = process) -> dict[str, Any]:
                    seconds = process.check()
                    if run == "doctor":
                        return {"said": process.said(), "seconds": seconds}
                    if run == "score":
                        return {"records": len(report.read_text(encoding="utf-8").splitlines()), "seconds": seconds}
                    return logged(root / run) | {"seconds": seconds} | process.compiled_again()

                found[run] = child.measured(f"{name}/{run}", outcome) or {}
            time.sleep(0.1)
        for process in runs.values():
            process.popen.send_signal(signal.SIGABRT)
        until = time.monotonic() + ABORTION
        for run, process in runs.items():
            child.line(f"{name}/{run}", reason=f"{NO_TIME}; it was at {process.aborted(until)}")
        for what, (ours, other) in ALIKE[name].items():
            if found.get(ours) and found.get(other):
                child.measured(f"{name}/{what}", lambda ours=ours, other=other: compared(found[ours], found[other]))


def compared(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    loss, pir = abs(ours["loss"] / other["loss"] - 1), abs(ours["pir_mean"] - other["pir_mean"])
    alike = loss <= LOSS_DIFFERENCE and pir <= PIR_DIFFERENCE
    return {"alike": alike, "loss_difference": loss, "pir_difference": pir}


if __name__ == "__main__":
    children.main(stage, __doc__)
