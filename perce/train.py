"""python -m perce.train: rows → pairs → model → PerceTrainer → a run directory.

config.yaml          the resolved options            curves.png    loss, PIR and weights over the steps
trainer_state.json   everything that was logged      report.html   validation responses token by token
model or adapter, tokenizer, checkpoint-*/           what from_pretrained and --resume read
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perce.checkpoints import SaveError, disk_errors, resume_point, write_in_one_move
from perce.config import CONFIG_NAME, OPTIONS, TrainConfig, parse_args
from perce.errors import UserError
from perce.options import dump_yaml, read_yaml

if TYPE_CHECKING:
    from perce.trainer import PerceArguments, PerceTrainer

DEFAULT_LEARNING_RATE = {"full": 2e-5, "lora": 2e-4}
KEPT_CHECKPOINTS = 2
SEQUENCES_A_STEP = 8
# Longest sequence × sequences a forward, by default: activations of 135 M parameters then take 2 GiB, and batches of
# long, uneven sequences are not padded to the longest of eight. How a step is divided does not change its loss or
# gradient.
TOKENS_A_FORWARD = {"cpu": 4096, "cuda": 8192}
EVAL_EXAMPLES = 64
EVAL_TOKENS_ON_CPU = 20_000  # under a minute of SmolLM2-135M on two cores; every run evaluates twice
DEMO_RECIPE = Path(__file__).parent / "demo" / "recipe.yaml"
# TrainingArguments fields that an option of ours decides.
OURS = {"bf16": "precision", "fp16": "precision", "gradient_checkpointing": "activation_checkpointing"}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 after one paragraph on stderr when the user can put something right."""
    try:
        config, print_config = parse_args(sys.argv[1:] if argv is None else argv, read_yaml(str(DEMO_RECIPE)))
        if print_config:
            resolved = resolve(config)
            if config.extra:
                training_arguments(resolved)  # finds what is misspelt
            print(dump_yaml(resolved.to_dict()), end="")
        else:
            run(resolve(config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def resolve(config: TrainConfig) -> TrainConfig:
    """The config with every default that depends on others filled in."""
    run, processes = config.run, int(os.environ.get("WORLD_SIZE", 1))
    rate = run.learning_rate or DEFAULT_LEARNING_RATE["lora" if config.model.lora_r else "full"]
    if run.resume and not run.output_dir:
        raise UserError("--resume: name the run to continue with --output_dir.")
    if processes > 1 and not run.output_dir:
        raise UserError(f"--output_dir: needed when {processes} processes share a run.")
    if config.data.streaming and run.max_steps < 1:
        raise UserError("--streaming: the number of rows is not known beforehand, so --max_steps is needed.")
    if config.data.streaming and run.tokens_per_batch:
        raise UserError(
            "--streaming, --tokens_per_batch: rows are grouped by length, which a stream cannot tell beforehand. Use "
            "--per_device_train_batch_size, or read the data whole."
        )
    name = Path(config.data.data).expanduser().resolve().stem if config.data.data else "demo"
    output_dir = str(Path(run.output_dir).expanduser()) if run.output_dir else str(_free_directory(name))
    return replace(config, run=replace(run, learning_rate=rate, output_dir=output_dir))


def _free_directory(name: str) -> Path:
    """runs/NAME, or runs/NAME-2 … where runs are."""
    number, path = 1, Path("runs") / name
    while (path / CONFIG_NAME).exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path


def run(config: TrainConfig) -> None:
    """One training run, from checks to the final table."""
    args = training_arguments(config)  # finds options that are mistyped, before anything is written
    output_dir = claim_directory(config)
    from transformers import set_seed

    from perce.dataset import load_pairs
    from perce.fits import check_fits
    from perce.model import load_model, load_tokenizer
    from perce.summary import Progress, describe_run, loss_labels, print_result, write_run_report
    from perce.trainer import PerceTrainer

    checkpoint = last_checkpoint(config, output_dir) if config.run.resume else None
    model_path = config.model.model or _default_model()
    set_seed(config.run.seed)  # before the adapters are drawn
    tokenizer = load_tokenizer(model_path)
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
    with _options_that_fail_late():
        trainer = PerceTrainer(
            model, args, train_dataset=pairs.train, eval_dataset=pairs.validation, processing_class=tokenizer,
            callbacks=[progress],
        )  # fmt: skip
        trainer.get_optimizer_cls_and_kwargs(args, model)
    if (doubt := check_fits(config, args, model, pairs)) and main_process:
        print(f"memory {doubt}")
    progress.attach(trainer)
    if main_process and checkpoint is None:
        write_in_one_move(output_dir / CONFIG_NAME, dump_yaml(config.to_dict()))

    train(trainer, checkpoint)
    if progress.evaluated_at != trainer.state.global_step:
        trainer.evaluate()
    with disk_errors(output_dir):
        trainer.save_model()
        trainer.save_state()
        if main_process:
            write_run_report(output_dir, config, trainer, pairs, progress)
    if main_process:
        print_result(output_dir, trainer, pairs, progress)


def train(trainer: PerceTrainer, checkpoint: str | None) -> None:
    """Train; what stops it midway leaves a checkpoint of the last finished step behind, or the newest one standing."""
    from perce.interruption import Interrupted, Interruption

    interruption = Interruption(trainer)
    trainer.add_callback(interruption)
    with interruption.caught():
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except (UserError, KeyboardInterrupt) as stopped:
            print(file=sys.stderr)  # ends the line of the progress bar
            alone, step = trainer.accelerator.num_processes == 1, trainer.state.global_step
            between_steps = isinstance(stopped, Interrupted) or (isinstance(stopped, UserError) and alone)
            if step and between_steps and not isinstance(stopped, SaveError):
                if interruption.saved_step != step:
                    trainer._save_checkpoint(trainer.model, None)  # type: ignore[arg-type]
                if trainer.is_world_process_zero():
                    again = f"--resume --output_dir {trainer.args.output_dir}"
                    print(f"Stopped at step {step}; {again} continues.", file=sys.stderr)
            if isinstance(stopped, UserError):
                raise
            number = stopped.signal if isinstance(stopped, Interrupted) else interruption.received
            raise SystemExit(128 + (number or signal.SIGINT)) from None


@contextlib.contextmanager
def _options_that_fail_late() -> Iterator[None]:
    """What the Trainer finds out on construction: optimisers and loggers whose package is missing, bad combinations."""
    try:
        yield
    except UserError:
        raise
    except (ImportError, ValueError) as error:
        raise UserError(f"These options cannot be used here: {' '.join(str(error).split())}") from error


def claim_directory(config: TrainConfig) -> Path:
    """The run directory, made, writable and not another run's: found out before anything expensive happens."""
    path = Path(config.run.output_dir or "")
    holds_run = (path / CONFIG_NAME).exists()
    if int(os.environ.get("RANK", 0)) == 0 and not config.run.resume and holds_run:
        raise UserError(
            f"--output_dir {path}: holds a run already. Continue it with --resume, or choose another directory."
        )
    if config.run.resume and not holds_run:
        raise UserError(f"--resume: {path} holds no run ({CONFIG_NAME} is missing). Was --output_dir mistyped?")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"--output_dir {path}: cannot be written to ({error.strerror}). Choose a directory you can write to."
        ) from error
    return path


def last_checkpoint(config: TrainConfig, output_dir: Path) -> str:
    """The latest whole checkpoint; UserError if there is none, or it is of another model than is asked for now."""
    saved = read_yaml(str(output_dir / CONFIG_NAME))
    for name, now in vars(config.model).items():
        if saved.get(name, now) != now and name not in ("precision", "attn_implementation", "backend"):
            raise UserError(
                f"--resume: {name} is {now!r} now and was {saved[name]!r} when the run began. Leave it as it was, or "
                "start a new run."
            )
    return resume_point(output_dir)


def training_arguments(config: TrainConfig) -> PerceArguments:
    """PerceArguments from our options and the TrainingArguments fields in config.extra."""
    import dataclasses

    import torch

    from perce.environment import quiet_libraries
    from perce.memory import CHECKPOINTING
    from perce.model import resolve_precision
    from perce.trainer import PerceArguments

    quiet_libraries()
    fields = {field.name: field for field in dataclasses.fields(PerceArguments) if field.init}
    for name, value in config.extra.items():
        if name in OURS:
            raise UserError(f"{name}: use --{OURS[name]} instead.")
        if name not in fields:
            raise OPTIONS.unknown(name, list(fields))
        _check_kind(name, fields[name].default, value)
    run = config.run
    use_cpu = bool(config.extra.get("use_cpu", not torch.cuda.is_available()))
    precision = resolve_precision(config.model.precision, "cpu" if use_cpu else "cuda")
    values: dict[str, Any] = {
        "output_dir": run.output_dir,
        "num_train_epochs": run.num_train_epochs,
        "max_steps": run.max_steps,
        "learning_rate": run.learning_rate,
        "warmup_steps": run.warmup_steps,
        "tokens_per_batch": run.tokens_per_batch,
        "packing": run.packing,
        "backend": config.model.backend,
        "per_device_eval_batch_size": run.per_device_train_batch_size or SEQUENCES_A_STEP,
        "eval_on_start": not run.resume,
        "eval_strategy": "steps" if run.eval_steps else "epoch",
        "eval_steps": run.eval_steps,
        "save_strategy": "steps" if run.save_steps else "no",
        "save_steps": run.save_steps or 500,
        "save_total_limit": KEPT_CHECKPOINTS,
        "logging_steps": min(run.logging_steps, run.max_steps) if run.max_steps > 0 else run.logging_steps,
        "logging_first_step": True,
        "seed": run.seed,
        "data_seed": run.seed,
        "report_to": "none",
        "use_cpu": use_cpu,
        # Also for LoRA's bf16 base: its fp32 adapters would keep an fp32 copy of every activation.
        "bf16": precision == "bf16",
        "dataloader_pin_memory": not use_cpu,
        CHECKPOINTING: run.activation_checkpointing,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False} if run.activation_checkpointing else None,
        # Batches of ragged examples cannot be cut and sent around: every process reads its own from a stream.
        "accelerator_config": {"dispatch_batches": False},
    }
    try:
        return PerceArguments(loss=config.loss, data=config.data, memory=config.memory, **(values | config.extra))
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"These options do not go together: {' '.join(str(error).split())}") from error


def fit_batch(config: TrainConfig, args: PerceArguments, pairs: Any) -> TrainConfig:
    """The config with batch size and accumulation filled in, where they were not given; set in args too."""
    run = config.run
    batch, accumulation = run.per_device_train_batch_size, run.gradient_accumulation_steps
    longest = config.data.max_length if config.data.streaming else max(map(len, pairs["input_ids"]))
    fitting = (run.tokens_per_batch or TOKENS_A_FORWARD[args.device.type]) // longest
    fitting = max(size for size in (1, 2, 4, SEQUENCES_A_STEP) if size <= max(fitting, 1))
    if "per_device_eval_batch_size" not in config.extra:  # from what is saved: a resumed run evaluates as before
        args.per_device_eval_batch_size = fitting if run.tokens_per_batch else batch or fitting
    if run.tokens_per_batch is not None:
        args.gradient_accumulation_steps = accumulation or 1
        return replace(config, run=replace(run, gradient_accumulation_steps=accumulation or 1))
    batch = batch or fitting
    accumulation = accumulation or max(SEQUENCES_A_STEP // batch, 1)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = batch, accumulation
    return replace(
        config, run=replace(run, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    )


def _check_kind(name: str, default: Any, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool):
        expected, fits = "true or false", isinstance(value, bool)
    elif isinstance(default, int | float):
        expected, fits = "a number", number
    else:
        return
    if not fits:
        raise UserError(f"{name}: expected {expected}, got {value!r}.")


def _default_model() -> str:
    from perce.demo import default_model_path

    return str(default_model_path())


if __name__ == "__main__":
    sys.exit(main())
