"""How --share_persona N affects training: `python -m benchmarks.dealing DIR`, the directory personachat-convai2.

    runs       SmolLM2-135M-Instruct, LoRA, N = 1, 2 and 8 requests of a persona per batch, three seeds: equally many
               steps of 8 examples
    results    benchmarks/results/dealing.json: the logs of each run; runs that it has are not repeated
    table      printed: validation losses along a run, squared gradients (mean and noise), both compared with N = 1
    picture    docs/images/dealing.png and dealing_dark.png

All runs with one seed are evaluated on the same examples. There, a persona has about 8 replies, mostly in one
conversation.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.pictures import MARKERS, Theme, label_at_the_right, title, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
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
    shutil.rmtree(output, ignore_errors=True)  # what an interrupted run left
    subprocess.run([sys.executable, "-m", "perce.train", *flags], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    kept = ("step", "loss", "ce", "grad_norm", *LOSSES.values(), "train_runtime")
    log = [{name: entry[name] for name in kept if name in entry} for entry in history]
    return {"together": together, "seed": seed, "log": log}


def evaluations(run: Run, name: str) -> list[float]:
    return [entry[LOSSES[name]] for entry in run["log"] if LOSSES[name] in entry]


def squared_norm(run: Run) -> float:
    """Mean over the steps of the gradient's squared norm: the square of the mean gradient plus the noise per step."""
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


def draw(runs: Mapping[str, Run], theme: Theme) -> "Figure":
    """The end of each run: a line per seed through N = 1, 2 and 8, and the means over the seeds."""
    from matplotlib.figure import Figure

    at_end = f"at step {OPTIONS['max_steps']}, nats per token"
    over_run = f"mean over {OPTIONS['max_steps']} steps, no unit"
    panels: tuple[tuple[str, str, str, Callable[[Run], float]], ...] = (
        ("Validation loss", "all tokens, with persona; lower is better", at_end,
         lambda run: evaluations(run, "with persona")[-1]),
        ("Validation loss", "personal tokens; lower is better", at_end,
         lambda run: evaluations(run, "personal tokens")[-1]),
        ("Squared gradient norm", "of the mean gradient and its noise", over_run, squared_norm),
    )  # fmt: skip
    figure = Figure(figsize=(10.2, 4), layout="constrained")
    places = range(len(TOGETHER))
    for ax, (first, second, unit, value) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        lines = {f"seed {seed}": [value(runs[f"{together}-{seed}"]) for together in TOGETHER] for seed in SEEDS}
        for values, colour, marker in zip(lines.values(), theme.colours, MARKERS, strict=False):
            ax.plot(places, values, linewidth=1, markersize=7, color=colour, marker=marker)
        lines["mean"] = [mean(at) for at in zip(*lines.values(), strict=True)]
        ax.plot(places, lines["mean"], linewidth=2.4, color=theme.ink, zorder=1)
        ax.set_xticks(places, [str(together) for together in TOGETHER])
        ax.set_xlabel("N, requests dealt together")
        ax.set_ylabel(unit)
        label_at_the_right(ax, [(name, places[-1], values[-1]) for name, values in lines.items()], theme, 0.065)
        title(ax, first, second, theme)
    figure.supxlabel(
        f"personachat-convai2, {OPTIONS['eval_examples']} validation replies per seed; "
        f"learning rate {OPTIONS['learning_rate']}; steps of {OPTIONS['per_device_train_batch_size']} examples",
        fontsize=9, color=theme.faint,
    )  # fmt: skip
    return figure


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    data = Path(sys.argv[1]).resolve()
    found = {"options": OPTIONS, "runs": {}}
    if RESULTS.is_file():
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
        if found["options"] != OPTIONS:
            sys.exit(f"{RESULTS}: its runs had the options {found['options']}. Delete it to run with {OPTIONS}.")
    for seed in SEEDS:
        for together in TOGETHER:
            name = f"{together}-{seed}"
            if name not in found["runs"]:
                found["runs"][name] = trained(data, together, seed)
                RESULTS.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
                print(name, flush=True)
    print("\n".join(table(found["runs"])))
    write(lambda theme: draw(found["runs"], theme), DOCS / "images" / "dealing.png")


if __name__ == "__main__":
    main()
