"""A run of `python -m perce.train` in a directory that is claimed: it is prepared, trained and finished."""

from dataclasses import dataclass, replace

from transformers import set_seed

from perce.config.commands import TrainOptions
from perce.config.prompt import STYLE
from perce.data.dataset import pairs_digest
from perce.data.splits import RunPairs, load_pairs
from perce.demo import default_model_path
from perce.files.runs import BASE_NAME, HELD_OUT_NAME
from perce.hub import base_facts, check_base, load_tokenizer
from perce.model.auxiliary import router_of
from perce.model.loading import load_model, merge_adapter
from perce.reading.formats import FORMATS
from perce.running.card import write_card
from perce.running.diagnosis import diagnose, outcome_of
from perce.running.directory import Claim, begin, check_facts, finish
from perce.running.fits import check_fits
from perce.running.interruption import train_interruptibly
from perce.running.summary import Progress, describe_run, describe_sharing, loss_labels, print_result, write_run_report
from perce.training.arguments import PerceArguments, fit_batch, options_that_fail_late, step_of_run
from perce.training.best import kept_weights
from perce.training.checkpoints import disk_errors
from perce.training.checks import try_options
from perce.training.shared import shared_by
from perce.training.trainer import PerceTrainer
from perce.visible import as_json, say

EVAL_EXAMPLES = 64
EVAL_TOKENS_ON_CPU = 20_000  # under a minute for SmolLM2-135M on two cores; every run evaluates twice


@dataclass(frozen=True)
class Prepared:
    """What a run is made of, with every option settled."""

    config: TrainOptions
    model_path: str
    pairs: RunPairs
    trainer: PerceTrainer
    progress: Progress


def train(config: TrainOptions, args: PerceArguments, claim: Claim) -> None:
    """The training run in a directory that is claimed."""
    prepared = prepare(config, args, claim)
    check_and_begin(prepared, claim)
    train_interruptibly(prepared.trainer, claim.checkpoint)
    finish_run(prepared, claim)


def prepare(config: TrainOptions, args: PerceArguments, claim: Claim) -> Prepared:
    """Load tokenizer, pairs and model, print what is about to be trained, and make the trainer."""
    model_path = config.model.model or str(default_model_path())
    if claim.checkpoint is not None:
        check_base(claim.output_dir, model_path, "--resume")
    set_seed(config.run.seed)  # before the adapters are drawn
    tokenizer = load_tokenizer(model_path)
    if (style := tokenizer.init_kwargs.get(STYLE)) and not config.data.prompt:  # saved by the run that made the model
        config = replace(config, data=replace(config.data, prompt=as_json(style)))
        args.data = config.data
    wanted, on_cpu = config.run.eval_examples, args.device.type == "cpu"
    pairs = load_pairs(
        config.data, tokenizer, loss=config.loss, seed=config.run.seed,
        validation_seed=config.run.validation_seed,
        eval_examples=EVAL_EXAMPLES if wanted is None else wanted,
        eval_tokens=EVAL_TOKENS_ON_CPU if wanted is None and on_cpu else None,
    )  # fmt: skip
    model = load_model(model_path, config.model, args.device.type)
    sharing, _ = shared_by(model, args, pairs.train)  # as far as that is known before the trainer exists
    config = fit_batch(config, args, pairs.train, sharing)
    router = router_of(model, config.loss.router_aux_loss_coef)  # on every process, because it runs the model
    if args.process_index == 0:
        describe_run(config, model, args, pairs, router, sharing)
    progress = Progress(claim.output_dir, loss_labels(pairs.format))
    with options_that_fail_late():
        trainer = PerceTrainer(
            model, args, train_dataset=pairs.train, eval_dataset=pairs.validation, processing_class=tokenizer,
            callbacks=[progress],
        )  # fmt: skip
    return Prepared(config, model_path, pairs, trainer, progress)


def check_and_begin(prepared: Prepared, claim: Claim) -> None:
    """UserError for what would fail later, or for a resume that would make it another run; then write what the run is
    known by in its directory."""
    config, pairs, trainer = prepared.config, prepared.pairs, prepared.trainer
    first_process = trainer.args.process_index == 0
    with options_that_fail_late((Exception,)):
        steps_an_epoch, steps = try_options(trainer)
    facts = {
        "training_pairs": pairs_digest(pairs.train, personal="personal" in config.loss.weighting.needs),
        "validation_pairs": pairs_digest(pairs.validation),
        "step": step_of_run(trainer.args, trainer.sharing),
        "steps_an_epoch": None if config.data.streaming else steps_an_epoch,
    }  # fmt: skip
    check_facts(claim, facts, steps)
    if (doubt := check_fits(config, trainer.args, trainer.model, pairs, trainer.sharing)) and first_process:
        say(f"memory {doubt}")
    if first_process:
        describe_sharing(trainer)
    prepared.progress.attach(trainer, resumed=claim.checkpoint is not None)
    if first_process:
        held_out = pairs.held_out.to_json() if pairs.held_out else None
        base = base_facts(prepared.model_path) if config.model.lora_r else None
        with disk_errors(claim.output_dir):
            begin(claim, config, facts, {HELD_OUT_NAME: held_out, BASE_NAME: base})


def finish_run(prepared: Prepared, claim: Claim) -> None:
    """Evaluate what is saved; write weights, log, report and card; upload them if asked to; print the result."""
    config, pairs, trainer, progress = prepared.config, prepared.pairs, prepared.trainer, prepared.progress
    output_dir, first_process = claim.output_dir, trainer.args.process_index == 0
    progress.evaluate_what_is_saved(trainer)
    computed = trainer.tokens_computed()
    findings: list[str] = []
    with disk_errors(output_dir):
        trainer.save_model()
        trainer.save_state()
        if first_process:
            findings = diagnose(outcome_of(trainer, pairs, progress.before, progress.after))
            write_run_report(output_dir, config, trainer, pairs, progress)
            served = None if pairs.format == "text" else trainer.processing_class
            trained = "; ".join(filter(None, (f"{trainer.state.global_step} steps", kept_weights(trainer))))
            write_card(
                output_dir, config, prepared.model_path, served, progress.before_and_after(), trained, findings,
                of_histories=FORMATS[pairs.format].history == "passages",
            )  # fmt: skip
            trainer.has_card = True
            if config.run.merge_adapter:
                merge_adapter(output_dir, prepared.model_path)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    if first_process:
        with disk_errors(output_dir):
            finish(output_dir)
        print_result(output_dir, trainer, pairs, progress, findings, computed, resumed=claim.checkpoint is not None)
