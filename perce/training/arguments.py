"""PerceArguments, and how the options of a run become it."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainingArguments

from perce.config.commands import TRAIN, TrainOptions
from perce.config.schema import DataConfig, LossConfig, MemoryConfig
from perce.environment import prepare
from perce.errors import UserError, in_one_line
from perce.model.loading import check_backend, resolve_precision
from perce.model.memory import CHECKPOINTING
from perce.training.parallel import check_parallelism

# TrainingArguments fields that an option of ours decides.
OURS = {"bf16": "precision", "fp16": "precision", "gradient_checkpointing": "activation_checkpointing"}
SEQUENCES_A_STEP = 8
# Longest sequence × sequences a forward, by default: activations of 135 M parameters then take 2 GiB, and batches of
# long, uneven sequences are not padded to the longest of eight. How a step is divided does not change its loss or
# gradient.
TOKENS_A_FORWARD = {"cpu": 4096, "cuda": 8192}
KEPT_CHECKPOINTS = 2


@dataclass
class PerceArguments(TrainingArguments):
    """TrainingArguments, the loss, and how raw rows become token pairs (its `data` path is not used here)."""

    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
    tokens_per_batch: int | None = None
    """Padded tokens of a forward, instead of per_device_train_batch_size sequences; see training/sampler.py."""
    packing: bool = False
    """Sequences one after the other in a single row, for flash or flex attention on a GPU."""
    backend: str = "auto"
    """Of fused_perce_loss; "auto" becomes the one that PERCE_BACKEND names, if any."""

    def __post_init__(self) -> None:
        check_parallelism(self)
        if self.tokens_per_batch is not None and self.tokens_per_batch < 1:
            raise UserError(f"tokens_per_batch: expected >= 1, or None, got {self.tokens_per_batch}.")
        if self.packing and self.memory.persona_grad == "none":
            raise UserError(
                "packing with persona_grad=none: behind a cached prefix each sequence runs by itself, so there is "
                "nothing to pack. Leave one of them out."
            )
        if self.label_smoothing_factor:
            raise UserError("label_smoothing_factor: the PerCE loss has no label smoothing. Leave it at 0.")
        # Patched in when training begins, Liger's own loss would replace the forward that holds ours, and its MLPs our
        # tiles; its other kernels are welcome.
        off = ["fused_linear_cross_entropy", "cross_entropy"] + ["swiglu", "geglu"] * bool(self.memory.mlp_tile)
        self.liger_kernel_config = (self.liger_kernel_config or {}) | dict.fromkeys(off, False)
        self.remove_unused_columns = False
        self.label_names = []
        self.ddp_find_unused_parameters = False
        self.logging_nan_inf_filter = False  # would log the mean of earlier steps in the place of a nan
        super().__post_init__()
        settle_device(self, self.memory)
        self.backend = check_backend(self.backend, self.device)
        if self.n_gpu > 1:
            raise UserError(
                f"{self.n_gpu} GPUs are visible to one process. Start one process a GPU (torchrun --nproc_per_node "
                f"{self.n_gpu} -m perce.train …), or show it one (CUDA_VISIBLE_DEVICES=0)."
            )

    def to_dict(self) -> dict[str, Any]:
        ours = {name: dataclasses.asdict(getattr(self, name)) for name in ("loss", "data", "memory")}
        return super().to_dict() | ours


def settle_device(args: Any, memory: MemoryConfig) -> None:
    """Options that need a GPU: refused on a CPU, and handed to transformers elsewhere."""
    if args.device.type == "cpu" and args.use_liger_kernel:
        raise UserError("use_liger_kernel: Liger's kernels are written in Triton and need a GPU. Leave it out here.")
    if not memory.activation_offload:
        return
    if args.device.type == "cpu":
        raise UserError(
            "activation_offload: training is on a CPU, whose activations are in host memory already. Leave it out."
        )
    if not getattr(args, CHECKPOINTING):
        raise UserError(
            "activation_offload: holds the inputs of checkpointed layers in host memory, and nothing is checkpointed. "
            "Add --activation_checkpointing."
        )
    given = getattr(args, f"{CHECKPOINTING}_kwargs") or {"use_reentrant": False}
    setattr(args, f"{CHECKPOINTING}_kwargs", {**given, "offload": True})


def training_arguments(config: TrainOptions) -> PerceArguments:
    """PerceArguments from our options and the TrainingArguments fields in config.extra."""
    prepare()
    fields = {field.name: field for field in dataclasses.fields(PerceArguments) if field.init}
    for name, value in config.extra.items():
        if name in OURS:
            raise UserError(f"{name}: use --{OURS[name]} instead.")
        if name not in fields:
            raise TRAIN.unknown(name, list(fields))
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
        "eval_on_start": True,
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
    with options_that_fail_late((ImportError, ValueError, TypeError)):
        return PerceArguments(loss=config.loss, data=config.data, memory=config.memory, **(values | config.extra))


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


def fit_batch(config: TrainOptions, args: PerceArguments, pairs: Any) -> TrainOptions:
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


def step_of_run(args: PerceArguments) -> str:
    """What an optimiser step is, of all processes together: it stays the same when a run is resumed."""
    forwards = args.gradient_accumulation_steps * args.world_size
    if args.tokens_per_batch is not None:
        return f"{forwards} forward passes of {args.tokens_per_batch} tokens"
    return f"{forwards * args.per_device_train_batch_size} sequences"


@contextlib.contextmanager
def options_that_fail_late(faults: tuple[type[Exception], ...] = (ImportError, ValueError)) -> Iterator[None]:
    """What arguments and Trainer find out on construction: bad combinations, optimisers whose package is missing."""
    try:
        yield
    except UserError:
        raise
    except faults as error:
        raise UserError(f"These options cannot be used here: {in_one_line(error)}") from error
