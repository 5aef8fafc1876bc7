"""python -m perce.train: rows → pairs → model → PerceTrainer → a run directory.

README.md            the model card                  merged/       with --merge_adapter, the whole model
config.yaml          the resolved options            curves.png    loss, PIR and weights over the steps
trainer_state.json   everything that was logged      report.html   validation responses token by token
model or adapter, tokenizer, checkpoint-*/           what from_pretrained and --resume read
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from perce.config.commands import TrainOptions, parse_args
from perce.config.options import dump_yaml, guarded, read_yaml
from perce.config.schema import CONFIG_NAME
from perce.errors import UserError
from perce.training.checkpoints import disk_errors, write_in_one_move
from perce.training.run_directory import claim_directory, free_directory, last_checkpoint

DEFAULT_LEARNING_RATE = {"full": 2e-5, "lora": 2e-4}
EVAL_EXAMPLES = 64
EVAL_TOKENS_ON_CPU = 20_000  # under a minute of SmolLM2-135M on two cores; every run evaluates twice
DEMO_RECIPE = Path(__file__).parent / "demo" / "recipe.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or print the options; see guarded for the exit code."""

    def parse_and_run() -> None:
        config, print_config = parse_args(sys.argv[1:] if argv is None else argv, read_yaml(str(DEMO_RECIPE)))
        if not print_config:
            return run(resolve(config))
        resolved = resolve(config)
        if config.extra:
            from perce.training.arguments import training_arguments

            training_arguments(resolved)  # finds what is misspelt
        print(dump_yaml(resolved.to_dict()), end="")

    return guarded(parse_and_run)


def resolve(config: TrainOptions) -> TrainOptions:
    """The config with every default that depends on others filled in."""
    run, processes = config.run, int(os.environ.get("WORLD_SIZE", 1))
    rate = run.learning_rate or DEFAULT_LEARNING_RATE["lora" if config.model.lora_r else "full"]
    if run.resume and not run.output_dir:
        raise UserError("--resume: name the run to continue with --output_dir.")
    if processes > 1 and not run.output_dir:
        raise UserError(f"--output_dir: needed when {processes} processes share a run.")
    if run.merge_adapter and not config.model.lora_r:
        raise UserError("--merge_adapter: there is no adapter to merge with --lora_r 0, which trains all weights.")
    if config.data.streaming and run.max_steps < 1:
        raise UserError("--streaming: the number of rows is not known beforehand, so --max_steps is needed.")
    if config.data.streaming and run.tokens_per_batch:
        raise UserError(
            "--streaming, --tokens_per_batch: rows are grouped by length, which a stream cannot tell beforehand. Use "
            "--per_device_train_batch_size, or read the data whole."
        )
    name = Path(config.data.data).expanduser().resolve().stem if config.data.data else "demo"
    output_dir = str(Path(run.output_dir).expanduser()) if run.output_dir else str(free_directory(name))
    # The run directory stands for itself: what a file says of the prompt is among its options.
    prompt = json.dumps(config.data.prompt_style(), ensure_ascii=False) if config.data.prompt else None
    data = replace(config.data, prompt=prompt)
    return replace(config, run=replace(run, learning_rate=rate, output_dir=output_dir), data=data)


def run(config: TrainOptions) -> None:
    """One training run, from checks to the final table."""
    from perce.training.arguments import fit_batch, options_that_fail_late, training_arguments

    args = training_arguments(config)  # finds options that are mistyped, before anything is written
    output_dir = claim_directory(config)
    from transformers import set_seed

    from perce.data.prompt import STYLE
    from perce.data.splits import load_pairs
    from perce.demo import default_model_path
    from perce.hub import load_tokenizer
    from perce.model.loading import load_model, merge_adapter
    from perce.training.best import kept_weights
    from perce.training.card import write_card
    from perce.training.checks import try_options
    from perce.training.fits import check_fits
    from perce.training.interruption import train_interruptibly
    from perce.training.summary import Progress, describe_run, loss_labels, print_result, write_run_report
    from perce.training.trainer import PerceTrainer

    checkpoint = last_checkpoint(config, output_dir) if config.run.resume else None
    model_path = config.model.model or str(default_model_path())
    set_seed(config.run.seed)  # before the adapters are drawn
    tokenizer = load_tokenizer(model_path)
    if (style := tokenizer.init_kwargs.get(STYLE)) and not config.data.prompt:  # of the run that the model comes from
        config = replace(config, data=replace(config.data, prompt=json.dumps(style, ensure_ascii=False)))
        args.data = config.data
    wanted, on_cpu = config.run.eval_examples, args.device.type == "cpu"
    pairs = load_pairs(
        config.data, tokenizer, loss=config.loss, seed=config.run.seed,
        eval_examples=EVAL_EXAMPLES if wanted is None else wanted,
        eval_tokens=EVAL_TOKENS_ON_CPU if wanted is None and on_cpu else None,
    )  # fmt: skip
    config = fit_batch(config, args, pairs.train)
    model = load_model(model_path, config.model, args.device.type)

    main_process = args.process_index == 0
    if main_process:
        describe_run(config, model, args, pairs)
    progress = Progress(output_dir, loss_labels(pairs.format))
    with options_that_fail_late():
        trainer = PerceTrainer(
            model, args, train_dataset=pairs.train, eval_dataset=pairs.validation, processing_class=tokenizer,
            callbacks=[progress],
        )  # fmt: skip
    with options_that_fail_late((Exception,)):
        try_options(trainer)
    if (doubt := check_fits(config, args, model, pairs)) and main_process:
        print(f"memory {doubt}")
    progress.attach(trainer)
    if main_process and checkpoint is None:
        write_in_one_move(output_dir / CONFIG_NAME, dump_yaml(config.to_dict()))

    train_interruptibly(trainer, checkpoint)
    progress.evaluate_what_is_saved(trainer)
    with disk_errors(output_dir):
        trainer.save_model()
        trainer.save_state()
        if main_process:
            write_run_report(output_dir, config, trainer, pairs, progress)
            served = None if pairs.format == "text" else trainer.processing_class
            trained = "; ".join(filter(None, (f"{trainer.state.global_step} steps", kept_weights(trainer))))
            write_card(output_dir, config, model_path, served, progress.before_and_after(), trained)
    if config.run.merge_adapter and main_process:
        with disk_errors(output_dir):
            merge_adapter(output_dir, model_path)
    if main_process:
        print_result(output_dir, trainer, pairs, progress)


if __name__ == "__main__":
    sys.exit(main())
