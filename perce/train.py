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
from typing import TYPE_CHECKING

from perce.config.commands import TrainOptions, is_secret, parse_args
from perce.config.options import dump_yaml
from perce.config.schema import HELD_OUT_NAME
from perce.environment import check_outputs
from perce.errors import UserError, guarded
from perce.hub import from_anywhere
from perce.launcher import end_with_launcher
from perce.training.run_directory import claimed, free_directory
from perce.visible import as_json, say

if TYPE_CHECKING:
    from perce.training.arguments import PerceArguments
    from perce.training.run_directory import Claim

DEFAULT_LEARNING_RATE = {"full": 2e-5, "lora": 2e-4}
EVAL_EXAMPLES = 64
EVAL_TOKENS_ON_CPU = 20_000  # under a minute for SmolLM2-135M on two cores; every run evaluates twice
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
            args.output_dir = str(claim.output_dir)
            train(replace(config, run=replace(config.run, output_dir=args.output_dir)), args, claim)


def train(config: TrainOptions, args: "PerceArguments", claim: "Claim") -> None:
    """The training run in a directory that is claimed."""
    from transformers import set_seed

    from perce.data.dataset import pairs_digest
    from perce.data.prompt import STYLE
    from perce.data.splits import load_pairs
    from perce.demo import default_model_path
    from perce.hub import BASE_NAME, base_facts, check_base, load_tokenizer
    from perce.model.auxiliary import router_of
    from perce.model.loading import load_model, merge_adapter
    from perce.training.arguments import fit_batch, options_that_fail_late, step_of_run
    from perce.training.best import kept_weights
    from perce.training.card import write_card
    from perce.training.checkpoints import disk_errors
    from perce.training.checks import try_options
    from perce.training.diagnosis import diagnose, facts_of_run
    from perce.training.fits import check_fits
    from perce.training.interruption import train_interruptibly
    from perce.training.run_directory import begin, check_facts, finish
    from perce.training.shared import shared_by
    from perce.training.summary import (
        Progress,
        describe_run,
        describe_sharing,
        loss_labels,
        print_result,
        write_run_report,
    )
    from perce.training.trainer import PerceTrainer

    output_dir = claim.output_dir
    model_path = config.model.model or str(default_model_path())
    if claim.checkpoint is not None:
        check_base(output_dir, model_path, "--resume")
    set_seed(config.run.seed)  # before the adapters are drawn
    tokenizer = load_tokenizer(model_path)
    if (style := tokenizer.init_kwargs.get(STYLE)) and not config.data.prompt:  # saved by the run that made the model
        config = replace(config, data=replace(config.data, prompt=as_json(style)))
        args.data = config.data
    wanted, on_cpu = config.run.eval_examples, args.device.type == "cpu"
    pairs = load_pairs(
        config.data, tokenizer, loss=config.loss, seed=config.run.seed,
        eval_examples=EVAL_EXAMPLES if wanted is None else wanted,
        eval_tokens=EVAL_TOKENS_ON_CPU if wanted is None and on_cpu else None,
    )  # fmt: skip
    model = load_model(model_path, config.model, args.device.type)
    sharing, _ = shared_by(model, args, pairs.train)  # as far as that is known before the trainer exists
    config = fit_batch(config, args, pairs.train, sharing)

    main_process = args.process_index == 0
    router = router_of(model, config.loss.router_aux_loss_coef)  # on every process, because it runs the model
    if main_process:
        describe_run(config, model, args, pairs, router, sharing)
    progress = Progress(output_dir, loss_labels(pairs.format))
    with options_that_fail_late():
        trainer = PerceTrainer(
            model, args, train_dataset=pairs.train, eval_dataset=pairs.validation, processing_class=tokenizer,
            callbacks=[progress],
        )  # fmt: skip
    with options_that_fail_late((Exception,)):
        steps_an_epoch, steps = try_options(trainer)
    facts = {
        "training_pairs": pairs_digest(pairs.train), "validation_pairs": pairs_digest(pairs.validation),
        "step": step_of_run(args, trainer.sharing), "steps_an_epoch": None if config.data.streaming else steps_an_epoch,
    }  # fmt: skip
    check_facts(claim, facts, steps)
    if (doubt := check_fits(config, args, model, pairs, trainer.sharing)) and main_process:
        say(f"memory {doubt}")
    if main_process:
        describe_sharing(trainer)
    progress.attach(trainer, resumed=claim.checkpoint is not None)
    if main_process:
        held_out = pairs.held_out.to_json() if pairs.held_out else None
        base = base_facts(model_path) if config.model.lora_r else None
        with disk_errors(output_dir):
            begin(claim, config, facts, {HELD_OUT_NAME: held_out, BASE_NAME: base})

    train_interruptibly(trainer, claim.checkpoint)
    progress.evaluate_what_is_saved(trainer)
    computed = trainer.tokens_computed()
    findings = diagnose(facts_of_run(trainer, pairs, progress.first_evaluation()[0], progress.after))
    with disk_errors(output_dir):
        trainer.save_model()
        trainer.save_state()
        if main_process:
            write_run_report(output_dir, config, trainer, pairs, progress)
            served = None if pairs.format == "text" else trainer.processing_class
            trained = "; ".join(filter(None, (f"{trainer.state.global_step} steps", kept_weights(trainer))))
            write_card(output_dir, config, model_path, served, progress.before_and_after(), trained, findings)
            trainer.has_card = True
    if config.run.merge_adapter and main_process:
        with disk_errors(output_dir):
            merge_adapter(output_dir, model_path)
    if args.push_to_hub:
        trainer.push_to_hub()
    if main_process:
        with disk_errors(output_dir):
            finish(output_dir)
        print_result(output_dir, trainer, pairs, progress, findings, computed, resumed=claim.checkpoint is not None)


if __name__ == "__main__":
    sys.exit(main())
