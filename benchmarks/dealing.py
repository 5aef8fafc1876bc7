"""What requests dealt together do to training: `python -m benchmarks.dealing DIR`, the directory personachat-convai2.

    runs       SmolLM2-135M-Instruct, LoRA, --share_persona 1, 2 and 8, three seeds: equal steps of 8 examples
    results    benchmarks/results/dealing.json: the logs of each run; what is in there is not run again
    table      printed: validation losses along a run, squared gradients (mean and noise), both against N = 1
    picture    docs/images/dealing.png

Every run of a seed is evaluated on the same examples. A persona has about 8 replies there, mostly of one conversation.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.study_report import save

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "dealing.json"
TOGETHER, SEEDS = (1, 2, 8), (0, 1, 2)
OPTIONS = {
    "max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 4e-4, "lora_r": 16, "eval_examples": 32,
    "eval_steps": 10, "logging_steps": 1, "save_steps": 0, "report_examples": 0,
}  # fmt: skip
LOSSES = {
    "with persona": "eval_loss_with_persona",
    "personal tokens": "eval_loss_personal_tokens",
    "without persona": "eval_loss_without_persona",
}
Run = Mapping[str, Any]


def trained(data: Path, together: int, seed: int) -> Run:
    output = ROOT / "runs" / "dealing" / f"{together}-{seed}"
    options = OPTIONS | {"data": data, "share_persona": together, "seed": seed, "output_dir": output}
    flags = [f"--{name}={value}" for name, value in options.items()]
    shutil.rmtree(output, ignore_errors=True)  # of a run that was interrupted
    subprocess.run([sys.executable, "-m", "perce.train", *flags], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    kept = ("step", "loss", "ce", "grad_norm", *LOSSES.values(), "train_runtime")
    log = [{name: entry[name] for name in kept if name in entry} for entry in history]
    return {"together": together, "seed": seed, "log": log}


def evaluations(run: Run, name: str) -> list[float]:
    return [entry[LOSSES[name]] for entry in run["log"] if LOSSES[name] in entry]


def squared_norm(run: Run) -> float:
    """Mean over the steps: the square of the mean gradient, and the noise of a step."""
    return mean(entry["grad_norm"] ** 2 for entry in run["log"] if "grad_norm" in entry)


def table(runs: Mapping[str, Run]) -> Iterator[str]:
    yield "| N | seed | " + " | ".join(f"{name}: step 0, …" for name in LOSSES) + " | mean square of the gradient | s |"
    yield "| --- " * (4 + len(LOSSES)) + "|"
    for run in runs.values():
        curves = (" ".join(f"{loss:.3f}" for loss in evaluations(run, name)) for name in LOSSES)
        seconds = next(entry["train_runtime"] for entry in run["log"] if "train_runtime" in entry)
        yield f"| {run['together']} | {run['seed']} | {' | '.join(curves)} | {squared_norm(run):.3f} | {seconds:.0f} |"
    for together in TOGETHER[1:]:
        pairs = [(runs.get(f"{together}-{seed}"), runs.get(f"1-{seed}")) for seed in SEEDS]
        both = [(mine, alone) for mine, alone in pairs if mine and alone]
        if both:
            changes = (
                f"{name} " + " ".join(f"{evaluations(a, name)[-1] - evaluations(b, name)[-1]:+.3f}" for a, b in both)
                for name in LOSSES
            )
            sizes = " ".join(f"{squared_norm(a) / squared_norm(b):.2f}" for a, b in both)
            yield f"\nN = {together} minus N = 1 at the end, by seed: {'; '.join(changes)}; squared norm × {sizes}."


def draw(runs: Mapping[str, Run]) -> None:
    """Means over the seeds, and each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.8, 3.2), dpi=150, facecolor="white", layout="constrained")
    panels = {
        f"validation, {name}: nats per token": LOSSES[name] for name in ("with persona", "personal tokens")
    } | {"norm of a step's gradient": "grad_norm"}  # fmt: skip
    for ax, (title, key) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for together, colour in zip(TOGETHER, ("#2d69e1", "#d9822b", "#2f8f63"), strict=True):
            curves = [
                [(entry["step"], entry[key]) for entry in run["log"] if key in entry]
                for run in runs.values() if run["together"] == together
            ]  # fmt: skip
            steps = [step for step, _ in curves[0]]
            values = [[value for _, value in curve] for curve in curves]
            for of_seed in values:
                ax.plot(steps, of_seed, color=colour, alpha=0.3, linewidth=0.8)
            ax.plot(steps, [mean(at) for at in zip(*values, strict=True)], color=colour, label=f"N = {together}")
        ax.set_title(title, loc="left", fontsize=9)
        ax.set_xlabel("step of 8 examples")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    save(figure, "dealing")


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    data = Path(sys.argv[1]).resolve()
    found = {"options": OPTIONS, "runs": {}}
    if RESULTS.is_file():
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
        if found["options"] != OPTIONS:
            sys.exit(f"{RESULTS}: its runs had {found['options']}; delete it to run with {OPTIONS}.")
    for seed in SEEDS:
        for together in TOGETHER:
            name = f"{together}-{seed}"
            if name not in found["runs"]:
                found["runs"][name] = trained(data, together, seed)
                RESULTS.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
                print(name, flush=True)
    print("\n".join(table(found["runs"])))
    draw(found["runs"])


if __name__ == "__main__":
    main()
