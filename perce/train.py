"""python -m perce.train: rows → pairs → model → PerceTrainer → a run directory.

README.md            the model card                  merged/       with --merge_adapter, the whole model
config.yaml          the resolved options            curves.png    loss, PIR and weights over the steps
trainer_state.json   everything that was logged      report.html   validation responses token by token
held_out.json        the held-out users, if the data has no validation split
base.json            the model that an adapter was trained on: on another one it is neither evaluated nor resumed
model or adapter, tokenizer                          files that from_pretrained reads
run.json, checkpoint-*/, complete.json               files that --resume reads
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from perce.config.commands import TrainOptions, is_secret, parse_args
from perce.config.yaml_file import dump_yaml
from perce.errors import UserError
from perce.files.paths import check_outputs
from perce.hub import from_anywhere
from perce.process import end_with_launcher, guarded
from perce.running.directory import claimed, free_directory
from perce.visible import as_json, say

DEFAULT_LEARNING_RATE = {"full": 2e-5, "lora": 2e-4}
DEMO_RECIPE = Path(__file__).parent / "demo" / "recipe.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or print the options; see guarded for the exit code."""

    def parse_and_run() -> None:
        config, print_config = parse_args(sys.argv[1:] if argv is None else argv, str(DEMO_RECIPE))
        if not print_config:
            return run(resolve(config), None if config.run.output_dir else run_name(config))
        resolved = resolve(config)
        if config.extra:
            from perce.training.arguments import training_arguments

            training_arguments(resolved)  # an error if an option is misspelt
            for name in filter(is_secret, config.extra):
                say(f"{name}: given, but neither printed here nor saved in a run's config.yaml.", error=True)
        say(*dump_yaml(resolved.to_dict()).splitlines())

    return guarded(parse_and_run)


def resolve(config: TrainOptions) -> TrainOptions:
    """The config, with every default filled in that depends on other options."""
    run, processes = config.run, int(os.environ.get("WORLD_SIZE", 1))
    rate = run.learning_rate or DEFAULT_LEARNING_RATE["lora" if config.model.lora_r else "full"]
    if run.resume and not run.output_dir:
        raise UserError("--resume: give the directory of the run to continue as --output_dir.")
    if processes > 1 and not run.output_dir:
        raise UserError(f"--output_dir: needed when {processes} processes share a run.")
    if run.merge_adapter and not config.model.lora_r:
        raise UserError("--merge_adapter: with --lora_r 0 all weights are trained, so there is no adapter to merge.")
    if config.data.streaming and run.max_steps < 1:
        raise UserError("--streaming: the number of rows is not known beforehand, so --max_steps is needed.")
    if config.data.streaming and run.tokens_per_batch:
        raise UserError(
            "--streaming, --tokens_per_batch: rows are grouped by their lengths, which are not known beforehand in a "
            "stream. Use --per_device_train_batch_size, or leave out --streaming to read the data whole."
        )
    # Without --output_dir this directory is only shown (--print_config) and checked: run() claims one by its name.
    output_dir = str(Path(run.output_dir).expanduser() if run.output_dir else free_directory(run_name(config)))
    # The saved options must stand alone: their paths are valid from any directory, and the content of a --prompt file
    # is saved among them.
    prompt = as_json(config.data.prompt_style()) if config.data.prompt else None
    rows, encoder, base = (
        path and from_anywhere(path) for path in (config.data.data, config.data.retriever_model, config.model.model)
    )
    resolved = replace(
        config, run=replace(run, learning_rate=rate, output_dir=output_dir), model=replace(config.model, model=base),
        data=replace(config.data, data=rows, retriever_model=encoder, prompt=prompt),
    )  # fmt: skip
    check_outputs(resolved.outputs, resolved.inputs)
    return resolved


def run_name(config: TrainOptions) -> str:
    """The name of the run directory if none is given."""
    return Path(config.data.data).expanduser().resolve().stem.strip(". ") or "data" if config.data.data else "demo"


def run(config: TrainOptions, name: str | None = None) -> None:
    """One training run, from checks to the final table; a stopped run is continued, a finished one is left alone.

    name: use the first free directory of this name instead of config.run.output_dir.
    """
    end_with_launcher()
    from perce.training.arguments import training_arguments

    args = training_arguments(config)  # an error if an option is mistyped, before anything is written
    with claimed(config, name) as claim:
        if claim.note and args.process_index == 0:
            say(claim.note)
        if not claim.finished:
            from perce.running.run import train

            args.output_dir = str(claim.output_dir)
            train(replace(config, run=replace(config.run, output_dir=args.output_dir)), args, claim)


if __name__ == "__main__":
    sys.exit(main())
