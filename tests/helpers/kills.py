"""Kills training runs by SIGKILL at chosen moments; each run is restarted by one command until it is done.

    python -m tests.helpers.kills DIRECTORY [--log FILE] [--only NAME …]

Every attempt is a fork of this process, which has imported everything and computed nothing, so it takes a second. Three
runs of each configuration are stopped: one is killed at every moment of MOMENTS, in their order, one gets SIGTERM at
those of SIGNALS, one is killed at random times. All must end with the weights, steps and logged numbers of a run that
was not stopped, bit by bit.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.commit import commit
from perce import PerceTrainer
from perce.running import directory as run_directory
from perce.running import summary
from perce.train import main as train
from perce.training import checkpoints
from tests.helpers.tiny import save_tiny_model, write_jsonl
from tests.helpers.training import ROWS

LAST = 5  # steps per run, which ends within its third epoch; checkpoints after every second step and after the last
TIMEOUT = 120.0
TIMED = ("tokens_per_second", "peak_memory_mib", "runtime", "per_second", "total_flos")

DEFAULTS = {
    "max_steps": LAST, "save_steps": 2, "logging_steps": 1, "precision": "fp32", "lora_r": 4, "report_examples": 1,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant",
    "learning_rate": 1e-2, "clip_min": 0.05, "use_cpu": "true",
}  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    name: str
    options: dict[str, Any]
    ranks: int = 1


CONFIGURATIONS = [
    Configuration("LoRA with dropout", {"lora_dropout": 0.3}),
    Configuration("all weights", {"lora_r": 0}),
    Configuration("weights estimated each epoch", {"estimate": "epoch", "lora_r": 0}),
    Configuration("weights estimated once", {"estimate": "frozen", "lora_dropout": 0.3}),
    Configuration("a stream", {"streaming": "true", "lora_dropout": 0.3}),
    Configuration("a token budget", {"tokens_per_batch": 400, "per_device_train_batch_size": None}),
    Configuration("weights of mean 1 over a step", {"normalize": "batch"}),
    Configuration("two processes", {"lora_dropout": 0.3, "gradient_accumulation_steps": 1}, 2),
    Configuration("two processes, weights estimated each epoch", {"estimate": "epoch", "lora_r": 0}, 2),
    Configuration("one checkpoint kept", {"save_steps": 1, "save_total_limit": 1, "lora_dropout": 0.3}),
    Configuration("the best weights kept", {"load_best_model_at_end": "true", "eval_steps": 2, "lora_dropout": 0.3}),
    Configuration(
        "the best weights and no other checkpoint",
        {"load_best_model_at_end": "true", "eval_steps": 1, "save_steps": 1, "save_total_limit": 1},
    ),
    Configuration(
        "early stopping",  # the first evaluation is the best; the fourth after it is at LAST
        {"early_stopping": 4, "max_steps": 20, "eval_steps": 1, "save_steps": 1, "learning_rate": 0.3},
    ),
    Configuration("weights dealt at random, a clip that rises", {"objective": "random", "clip_schedule": "rising"}),
    Configuration(
        "the persona without a gradient, checkpointed activations",
        {"persona_grad": "none", "activation_checkpointing": "true", "lora_dropout": 0.3},
    ),
]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, when: Callable[..., bool] = lambda *_, **__: True) -> None:
    """Die instead of the first call of owner.name for which `when` holds."""
    own = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            die()
        return own(*args, **kwargs)

    setattr(owner, name, dying)


def in_step(number: int) -> None:
    """Die after the first forward and backward pass of a step, before its update."""
    own = PerceTrainer.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = own(self, *args, **kwargs)
        if self.state.global_step == number - 1:
            die()
        return loss

    PerceTrainer.training_step = step  # type: ignore[method-assign]


def half_a_file(number: int) -> None:
    """Die after half of the optimiser's state is written."""
    save = torch.save

    def half(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(content, path, *args, **kwargs)
        if f"checkpoint-{number}" in str(path) and "optimizer" in str(path):
            os.truncate(path, Path(path).stat().st_size // 2)
            die()

    torch.save = half


def half_deleted() -> None:
    """Die after a part of an older checkpoint is deleted; the rest must not be taken for a complete checkpoint."""

    def dying(path: Path, **_: Any) -> None:
        for file in sorted(Path(path).iterdir())[:3]:
            file.unlink()
        die()

    own = checkpoints._rotate

    def rotate(*args: Any) -> None:
        checkpoints.shutil.rmtree = dying
        own(*args)

    checkpoints._rotate = rotate


MOMENTS: dict[str, Callable[[], None]] = {
    "loading, nothing written": lambda: before(run_directory, "begin"),
    "before the first step": lambda: in_step(1),
    "in the second step": lambda: in_step(2),
    "half of the first checkpoint written": lambda: half_a_file(2),
    "after the first checkpoint": lambda: in_step(3),
    "the second checkpoint written, and not its list": lambda: before(
        checkpoints, "seal", lambda path, *_: path.name.startswith("checkpoint-") and path.name > "checkpoint-2"
    ),
    "in the last step": lambda: in_step(LAST),
    "an old checkpoint half deleted": half_deleted,
    "after the last checkpoint": lambda: before(PerceTrainer, "_finalize_training"),
    "before the weights are saved": lambda: before(
        PerceTrainer, "save_model", lambda *_, _internal_call=False: not _internal_call
    ),
    "in the final report": lambda: before(summary, "write_curves"),
    "before the run is declared finished": lambda: before(run_directory, "finish"),
}


def signal_when(owner: Any, name: str, when: Callable[..., bool]) -> None:
    """Send SIGTERM before the first call of owner.name for which `when` holds; the call is still made."""
    own, done = getattr(owner, name), []

    def signalled(*args: Any, **kwargs: Any) -> Any:
        if not done and when(*args, **kwargs):
            done.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return own(*args, **kwargs)

    setattr(owner, name, signalled)


SIGNALS: dict[str, Callable[[], None]] = {
    "signalled in the first step": lambda: signal_when(PerceTrainer, "training_step", lambda *_, **__: True),
    "signalled in an evaluation": lambda: signal_when(
        PerceTrainer, "evaluation_loop", lambda self, *_, **__: self.state.global_step >= 2
    ),
    "signalled while a checkpoint is saved": lambda: signal_when(
        PerceTrainer, "_save_checkpoint", lambda self, *_: self.state.global_step >= 4
    ),
    "signalled in the last step": lambda: signal_when(
        PerceTrainer, "training_step", lambda self, *_: self.state.global_step == LAST - 1
    ),
    "signalled after the last checkpoint": lambda: signal_when(
        PerceTrainer, "_finalize_training", lambda *_: True
    ),
}  # fmt: skip


def attempt(
    call: Sequence[str], ranks: int, output: Path, moment: str | None = None, after: float | None = None
) -> int:
    """One run of the command, killed at a moment or after so many seconds; its exit code, −9 if it was killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(ranks):
        if (pid := os.fork()) == 0:
            child(call, rank, ranks, port, output, moment)
        children.append(pid)
    codes: dict[int, int] = {}
    started = time.monotonic()
    while len(codes) < ranks:
        for pid in [x for x in children if x not in codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        elapsed = time.monotonic() - started
        ended = any(code != 0 for code in codes.values())  # as torchrun does
        if ended or elapsed > TIMEOUT or (after is not None and elapsed > after):
            for pid in [x for x in children if x not in codes]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return next((code for code in codes.values() if code), 0)


def child(call: Sequence[str], rank: int, ranks: int, port: str, output: Path, moment: str | None) -> None:
    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }  # fmt: skip
    if moment is not None:
        (MOMENTS | SIGNALS)[moment]()
    code = 1
    try:
        code = train(call)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def result(run: Path) -> dict[str, Any]:
    """What must be equal in two runs: weights, steps, and every logged number except times and memory."""
    weights = sorted(path for path in run.glob("*.safetensors"))
    state = json.loads((run / "trainer_state.json").read_text())
    history = [
        {name: value for name, value in line.items() if not any(part in name for part in TIMED)}
        for line in state["log_history"]
        if "train_loss" not in line  # it is about the last attempt only
    ]
    return {
        "weights": {path.name: path.read_bytes().hex() for path in weights},
        "steps": state["global_step"],
        "history": history,
    }


def campaign(configuration: Configuration, directory: Path, draw: random.Random) -> dict[str, Any]:
    """The attempts of a configuration, and whether their results are equal."""
    place = directory / configuration.name.replace(" ", "-").replace(",", "")
    place.mkdir(parents=True)
    options = DEFAULTS | {"data": str(directory / "rows"), "model": str(directory / "model")} | configuration.options
    flags = [x for name, value in options.items() if value is not None for x in (f"--{name}", str(value))]

    def run(name: str, **death: Any) -> int:
        call = [*flags, "--resume", "--output_dir", str(place / name)]
        return attempt(call, configuration.ranks, place / f"{name}.log", **death)

    started = time.monotonic()
    code = run("straight")
    lasted = time.monotonic() - started
    assert code == 0, (place / "straight.log").read_text()[-3000:]
    expected = result(place / "straight")
    moments = {moment: run("moments", moment=moment) for moment in MOMENTS}
    signals = {moment: run("signals", moment=moment) for moment in SIGNALS}
    times = [round(draw.uniform(0.2, lasted), 2) for _ in range(4)]
    at_times = [{"seconds": after, "code": run("times", after=after)} for after in times]
    ends = {name: run(name) for name in ("moments", "signals", "times")}
    again = {name: run(name) for name in ends}
    same = {
        name: {part: result(place / name)[part] == expected[part] for part in expected}
        if ends[name] == 0
        else (place / f"{name}.log").read_text()[-2000:]
        for name in ends
    }
    says = {name: (place / f"{name}.log").read_text().rstrip().splitlines()[-1] for name in again}
    return {
        "configuration": configuration.name, "options": configuration.options, "processes": configuration.ranks,
        "steps": expected["steps"], "seconds_of_a_run": round(lasted, 2), "exit_codes_at_moments": moments,
        "exit_codes_when_signalled": signals,
        "at_random_times": at_times, "exit_codes_of_the_last_attempts": ends, "same": same,
        "finished": all("is finished" in line for line in says.values()) and not any(again.values()),
        "kills": sum(code == -9 for code in [*moments.values(), *(x["code"] for x in at_times)]),
    }  # fmt: skip


def prepare(directory: Path) -> None:
    save_tiny_model(directory / "model")
    write_jsonl(directory / "rows" / "train.jsonl", ROWS[:9])
    write_jsonl(directory / "rows" / "validation.jsonl", ROWS[9:])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args(argv)
    prepare(options.directory)
    os.environ["HF_DATASETS_CACHE"] = str(options.directory / "cache")
    chosen = [x for x in CONFIGURATIONS if not options.only or x.name in options.only]
    draw = random.Random(0)
    found = []
    for configuration in chosen:
        found.append(campaign(configuration, options.directory, draw))
        print(json.dumps(found[-1]), flush=True)
    if options.log:
        facts = {"commit": commit(), "torch": torch.__version__, "transformers": transformers.__version__}
        kills = sum(x["kills"] for x in found)
        options.log.write_text(json.dumps({**facts, "kills": kills, "configurations": found}, indent=1) + "\n")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    main()
