"""Seconds and memory from rows on disk to a first step, as JSON: `python -m benchmarks.data_scale ROWS [ROWS_A_USER]`.

`perce.train` runs up to its first step on made-up rows and a tiny model with the default model's tokenizer: a persona
of about 100 tokens, a query of 20 and a response of 30, no two texts alike. It runs in a process of its own; the memory
of that process and its children (proportional set size: shared memory is counted once) is sampled from outside.
"""

import contextlib
import functools
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from perce.demo import DATA_DIR

# The functions that are timed, by stage. A stage may have several calls and may lie within another stage.
STAGES = {
    "reading": [("perce.data.splits", "load_examples")],
    "dividing": [("perce.data.splits.HeldOut", "drawn"), ("perce.data.splits.HeldOut", "divide")],
    "fingerprint": [("perce.data.dataset", "_fingerprint")],
    "pairing": [("perce.data.splits", "pair_dataset")],  # fingerprint included
    "batch size": [("perce.training.arguments", "fit_batch")],
    "trainer": [("perce.training.trainer", "PerceTrainer")],
    "digests": [("perce.data.dataset", "pairs_digest")],
    "all": [("perce.running.run", "train")],  # up to the first step; the last, because it imports the others by name
}
SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe ri so tu va we xi yo za bra cle dri flo gru sta".split()
SAMPLED_EVERY = 1.0  # seconds


def rows(count: int, rows_a_user: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of sentences made of words of the built-in examples and of random names and numbers."""
    rng = random.Random(seed)
    corpus = (DATA_DIR / "train.jsonl").read_text(encoding="utf-8").split()
    words = [word.strip('"[]{},') for word in corpus]
    words = [word for word in words if word.isascii() and word.strip(".,!?':-") and ":" not in word]

    def sentence(least: int, most: int) -> str:
        said = rng.choices(words, k=rng.randint(least, most))
        if rng.random() < 0.5:
            said[rng.randrange(len(said))] = "".join(rng.choices(SYLLABLES, k=3)).capitalize()
        if rng.random() < 0.2:
            said[rng.randrange(len(said))] = str(rng.randrange(10_000))
        return f"{' '.join(said).capitalize()}."

    persona: list[str] = []
    for number in range(count):
        if number % rows_a_user == 0:
            persona = [sentence(8, 14) for _ in range(6)]
        yield {
            "user_id": f"user-{number // rows_a_user}", "persona": persona, "query": sentence(8, 20),
            "response": sentence(12, 30),
        }  # fmt: skip


class FirstStep(BaseException):
    """Ends a run when its first step begins."""


def run(data: Path, directory: Path) -> dict[str, Any]:
    """{"seconds", "cpu_seconds": per stage, "spans": when it ran, "pairs", "tokens"}. To be called once per process."""
    import perce.train
    from perce.config.commands import parse_args
    from perce.data.dataset import sequence_lengths
    from perce.training.resumable import ResumableTrainer

    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in STAGES}
    cpu = dict.fromkeys(STAGES, 0.0)
    found: dict[str, Any] = {}

    def timed(name: str, call: Any) -> Any:
        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            started, worked = time.time(), sum(os.times()[:4])
            try:
                return call(*args, **kwargs)
            finally:
                spans[name].append((started, time.time()))
                cpu[name] += sum(os.times()[:4]) - worked

        return run

    def first_step(trainer: Any, *_: Any, **__: Any) -> None:
        found["lengths"] = sequence_lengths(trainer.train_dataset)
        raise FirstStep

    for name, calls in STAGES.items():
        for place, function in calls:
            owner, of_class = place.rpartition(".")[::2] if place.endswith("HeldOut") else (place, "")
            holder = getattr(importlib.import_module(owner), of_class) if of_class else importlib.import_module(owner)
            call = timed(name, getattr(holder, function))
            setattr(holder, function, staticmethod(call) if function == "drawn" else call)
    ResumableTrainer.training_step = first_step  # type: ignore[method-assign]
    argv = ["--model", str(tiny_model(directory)), "--data", str(data), "--output_dir", str(directory / "run")]
    argv += ["--max_steps", "1", "--use_cpu", "true", "--eval_on_start", "false"]
    options, _ = parse_args(argv, str(perce.train.DEMO_RECIPE))
    with contextlib.suppress(FirstStep):
        perce.train.run(perce.train.resolve(options))
    lengths = found["lengths"]
    seconds = {name: round(sum(end - start for start, end in spans[name]), 2) for name in STAGES}
    cpu = {name: round(spent, 2) for name, spent in cpu.items()}
    return {"seconds": seconds, "cpu_seconds": cpu, "spans": spans, "pairs": len(lengths), "tokens": sum(lengths)}


def tiny_model(directory: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from perce.demo import default_model_path

    path = directory / "model"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    default = str(default_model_path())
    config = AutoConfig.from_pretrained(default, **sizes, num_key_value_heads=1, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(default).save_pretrained(path)
    return path


def memory_of(process: psutil.Process) -> int:
    """Bytes of a process and its children."""
    held = 0
    for one in (process, *process.children(recursive=True)):
        try:
            rollup = Path(f"/proc/{one.pid}/smaps_rollup").read_text(encoding="utf-8")
            held += 1024 * next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        except (OSError, StopIteration):
            pass
    return held


def measure(count: int, rows_a_user: int = 1, starts: int = 2) -> dict[str, Any]:
    """Runs a first start and later ones, which find the pairs in the cache; "starts" has what `run` returns for each,
    and "peak_bytes" per stage."""
    with tempfile.TemporaryDirectory(prefix="perce-scale-") as temporary:
        directory = Path(temporary)
        data = directory / "train.jsonl"
        with data.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(count, rows_a_user))
        found = {"rows": count, "rows_a_user": rows_a_user, "file_bytes": data.stat().st_size}
        return found | {"starts": [_start(data, directory / str(number), directory) for number in range(starts)]}


def _start(data: Path, directory: Path, cache: Path) -> dict[str, Any]:
    directory.mkdir()
    command = [sys.executable, "-m", "benchmarks.data_scale", "--child", str(data), str(directory)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache / "cache")}
    held: list[tuple[float, int]] = []
    with (directory / "out").open("w") as out:
        child = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=out, env=environment)
        watched, done = psutil.Process(child.pid), threading.Event()

        def watch() -> None:
            while not done.wait(SAMPLED_EVERY):
                held.append((time.time(), memory_of(watched)))

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = child.wait()
        done.set()
        watcher.join()
    if code:
        raise RuntimeError(f"the run ended with {code}")
    found = json.loads((directory / "out").read_text().splitlines()[-1])
    spans = found.pop("spans")
    begun = spans["all"][0][0]
    before = max((size for at, size in held if at <= begun), default=0)
    peaks = {
        name: max((size - before for at, size in held for start, end in spans[name] if start <= at <= end), default=0)
        for name in STAGES
    }
    return found | {"peak_bytes": peaks}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(run(Path(sys.argv[2]), Path(sys.argv[3]))))
    elif len(sys.argv) in (2, 3):
        print(json.dumps(measure(*map(int, sys.argv[1:])), indent=1))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
