"""PerceArguments, and how the options of a run become it."""

import contextlib
import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils.logging import log_levels

from perce.config.commands import TRAIN, TrainOptions
from perce.config.options import convert, require, require_finite
from perce.config.schema import DataConfig, LossConfig, MemoryConfig, RunConfig, require_at_least
from perce.data.sharing import Sharing
from perce.errors import UserError, in_one_line
from perce.model.loading import check_backend, resolve_precision
from perce.model.memory import CHECKPOINTING
from perce.process import silence_libraries
from perce.training.best import check_schedule, settle_metric
from perce.training.idle import NOT_READ, OURS, changed, check_optimizer, check_run, idle_beside, refuse_fields
from perce.training.parallel import check_gradients_in_reach, check_one_gpu, check_parallelism
from perce.training.shared import largest_batch

# Limits that nothing else checks: beyond them something fails, or does something else, later.
AT_LEAST = {
    0: ("weight_decay", "max_grad_norm", "eval_delay", "save_total_limit", "neftune_noise_alpha"),
    1: ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
        "dataloader_prefetch_factor", "ddp_timeout", "ddp_bucket_cap_mb", "tokens_per_batch"),
}  # fmt: skip
ONE_OF = {
    "train_sampling_strategy": ("random", "sequential"),  # the order of the others does not follow the seed
    "include_num_input_tokens_seen": ("no", "all", True, False),  # "non_padding" takes ends of turns for padding
    "log_level": ("passive", *log_levels),
    "log_level_replica": ("passive", *log_levels),
}
REPLIES_A_STEP = 8
# Default limit of a forward pass: of longest sequence × sequences, or of the tokens computed for conversations. With
# it, activations of 135 M parameters take 2 GiB, and long, uneven sequences are not padded to the longest of eight. How
# a step is divided does not change its loss or gradient.
TOKENS_A_FORWARD = {"cpu": 4096, "gpu": 8192}
KEPT_CHECKPOINTS = 2

TAKE_TRUE = ("fsdp", "include_num_input_tokens_seen", "trackio_static_space_id")
"""Fields of texts that may be true or false as well, whatever their type says."""


@dataclass
class PerceArguments(TrainingArguments):
    """TrainingArguments, the loss, and how raw rows become token pairs (the path in `data` is not used here)."""

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "liger_kernel_config"]  # noqa: RUF012  may be JSON
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
    tokens_per_batch: int | None = None
    """Tokens per forward pass, instead of per_device_train_batch_size replies; see training/sampler.py."""
    packing: bool = False
    """Sequences one after the other in a single row, for flash or flex attention on a GPU."""
    backend: str = "auto"
    """The backend of fused_perce_loss; "auto" becomes the one that PERCE_BACKEND names, if any."""
    early_stopping: int = 0
    """Training stops after so many evaluations in a row without a better metric_for_best_model; 0: it never does."""
    # Decided here; see NOT_READ.
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    label_names: list[str] | None = dataclasses.field(default_factory=list)
    ddp_find_unused_parameters: bool | None = False
    """True if a step may leave a trained weight without a gradient, such as an expert that no token was sent to."""

    def __post_init__(self) -> None:
        for name, kind in (("loss", LossConfig), ("data", DataConfig), ("memory", MemoryConfig)):
            require(isinstance(getattr(self, name), kind), name, f"a perce.{kind.__name__}", getattr(self, name))
        check_gradients_in_reach(self)
        check_parallelism(self)
        _check_values(self)
        if self.early_stopping:
            self.load_best_model_at_end = self.restore_callback_states_from_checkpoint = True
        settle_metric(self)
        refuse_fields(changed(self), NOT_READ | idle_beside(self))
        _check_together(self)
        super().__post_init__()
        check_schedule(self)
        # Liger is patched in when training begins. Its loss would replace the forward that holds ours, and its MLPs
        # would replace our tiles; its other kernels are allowed.
        off = ["fused_linear_cross_entropy", "cross_entropy"] + ["swiglu", "geglu"] * bool(self.memory.mlp_tile)
        self.liger_kernel_config = (self.liger_kernel_config or {}) | dict.fromkeys(off, False)
        settle_checkpointing(self)
        check_optimizer(self)
        _settle_loaders(self)
        require(self.deepspeed != {}, "deepspeed", "a configuration of DeepSpeed", self.deepspeed)
        settle_device(self)
        self.backend = check_backend(self.backend, self.device)
        check_one_gpu(self)

    @property
    def device(self) -> torch.device:
        """The device, without the index that a CPU has if there are several processes: transformers before 5.18 loads
        the optimiser's state onto it, and torch accepts no "cpu:0" there."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def __getstate__(self) -> dict[str, Any]:
        """The fields that are copied, and pickled as each checkpoint's training_args.bin: without the Hub's token."""
        return vars(self) | {"hub_token": None}

    def to_dict(self) -> dict[str, Any]:
        ours = {name: dataclasses.asdict(getattr(self, name)) for name in ("loss", "data", "memory")}
        return super().to_dict() | ours


def _check_values(args: PerceArguments) -> None:
    """UserError for wrong numbers and names that would otherwise be noticed late, or never."""
    if args.ignore_data_skip:
        raise UserError(
            "ignore_data_skip: a run that is resumed would begin its epoch again, and train on some examples twice and "
            "on others not at all. Leave it out."
        )
    refuse_other_weights("optim", str(getattr(args.optim, "value", args.optim)))
    for field in dataclasses.fields(args):
        require_finite(field.name, getattr(args, field.name))
    for least, names in AT_LEAST.items():
        require_at_least(args, least, *names)
    for name, choices in ONE_OF.items():
        require(getattr(args, name) in choices, name, f"one of {', '.join(map(str, choices))}", getattr(args, name))
    for name in (f"{CHECKPOINTING}_kwargs", "lr_scheduler_kwargs", "liger_kernel_config"):
        value = getattr(args, name)
        as_json = isinstance(value, str) and value.startswith("{")
        require(value is None or as_json or isinstance(value, Mapping), name, "a mapping, or one as JSON", value)
    config: Any = args.accelerator_config
    require(not isinstance(config, int), "accelerator_config", "a mapping, or a JSON file", config)
    require(args.hub_token != "<HUB_TOKEN>", "hub_token", "a token", "<HUB_TOKEN>, a placeholder")
    require("tpu_metrics_debug" not in str(args.debug), "debug", "no metrics of a TPU", args.debug)


def refuse_other_weights(option: str, optimizer: Any) -> None:
    """UserError for an optimiser, its class or its name, that is to be switched to other weights than it trains, as
    schedule-free ones are. Besides, transformers hands these a --warmup_steps below 1 as it is: with 0.1 the first step
    is ten times as long."""
    named = isinstance(optimizer, str)
    if "schedule_free" in optimizer if named else callable(getattr(optimizer, "eval", None)):
        kind = optimizer if isinstance(optimizer, type) else type(optimizer)
        raise UserError(
            f"{option}: {optimizer if named else kind.__name__} is to be evaluated and saved with other weights than "
            "it trains, and PerceTrainer does not switch to them. Use another, such as AdamW, with --lr_scheduler_type "
            "constant_with_warmup."
        )


def _check_together(args: PerceArguments) -> None:
    """UserError for options that do not go together."""
    memory, streaming = args.memory, args.data.streaming
    if args.packing and memory.on_trunks:
        raise UserError(
            f"packing with {memory.by_itself}: if a persona is run by itself there is no padding, so there is "
            "nothing to pack. Leave one of them out."
        )
    if memory.share_persona > 1 and (args.data.share == "none" or streaming):
        why = "a stream is not batched by persona" if streaming else "--share none lets none share"
        raise UserError(
            f"share_persona: {memory.share_persona} requests are to share their persona, but {why}. Leave one "
            "of the two options out."
        )
    if args.neftune_noise_alpha and args.loss.estimate == "online" and args.loss.entry.contrasts:
        raise UserError(
            "neftune_noise_alpha: noise in the embeddings acts in the factual pass and not in the counterfactual "
            "one, and would bias every PIR. Leave it out, or use --estimate epoch or frozen, whose weights are "
            "estimated without noise."
        )
    if args.neftune_noise_alpha and memory.on_trunks:
        raise UserError(
            "neftune_noise_alpha: the noise depends on the length of a row, and with persona_grad=none or "
            "branches_per_forward a sequence is run in parts. Leave one of them out."
        )


def settle_checkpointing(args: Any) -> None:
    """Use checkpointing without reentrant backward passes. With them, what a layer returns besides its hidden states
    has no gradient, and neither has a layer whose inputs have none, such as one behind frozen embeddings."""
    if not getattr(args, CHECKPOINTING):
        return
    options = {"use_reentrant": False} | dict(getattr(args, f"{CHECKPOINTING}_kwargs") or {})
    name, layers = f"{CHECKPOINTING}_kwargs", options.get("every_n_layers", 1)
    require(options["use_reentrant"] is False, name, "use_reentrant: false", options)
    require(layers >= 1, name, "every_n_layers >= 1", layers)
    setattr(args, name, options)


def _settle_loaders(args: PerceArguments) -> None:
    """Every process reads its own batches from a stream: batches of ragged examples cannot be divided and sent."""
    given: Any = args.accelerator_config
    if given.dispatch_batches or (given.gradient_accumulation_kwargs or {}).get("num_steps"):
        raise UserError(
            "accelerator_config: expected no dispatch_batches, because batches of ragged examples cannot be divided "
            "and sent, and no num_steps, which is --gradient_accumulation_steps. Leave them out."
        )
    if not given.even_batches:
        raise UserError(
            "accelerator_config: expected no even_batches: false. A process with fewer batches than the others would "
            "leave them waiting. Leave it out."
        )
    given.dispatch_batches = False


def settle_device(args: Any) -> None:
    """Refuse options that need a GPU if training is on a CPU; otherwise pass them to transformers."""
    # The host does not wait for the copies, and launches a step while the GPU is at work on the one before.
    args.accelerator_config.non_blocking |= args.dataloader_pin_memory and args.device.type == "cuda"
    if args.device.type == "cpu" and args.use_liger_kernel:
        raise UserError("use_liger_kernel: Liger's kernels are written in Triton and need a GPU. Leave it out here.")
    if not args.memory.activation_offload:
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
    if CHECKPOINTING == "gradient_checkpointing":
        raise UserError(
            f"activation_offload: needs transformers 5.23 or newer, and {transformers.__version__} is installed."
        )
    getattr(args, f"{CHECKPOINTING}_kwargs")["offload"] = True


def _given_fields(config: TrainOptions) -> dict[str, Any]:
    """The TrainingArguments fields in config.extra, converted. UserError for one that is unknown, that nothing reads,
    that an option of perce's decides, or that leaves one of them without an effect."""
    hints = typing.get_type_hints(PerceArguments)  # transformers' argument parser overwrites the types of the fields
    fields = [field.name for field in dataclasses.fields(PerceArguments) if field.init]
    extra: dict[str, Any] = {}
    refuse_fields(config.extra, NOT_READ, but=())
    for name, value in config.extra.items():
        if name in OURS:
            raise UserError(f"{name}: use --{OURS[name]} instead.")
        if name not in fields:
            raise TRAIN.unknown(name, fields)
        handed_on = f"{CHECKPOINTING}_kwargs" if name == "gradient_checkpointing_kwargs" else name
        extra[handed_on] = _converted(name, hints[name], value)
    check_run(config.run, extra)
    return extra


def training_arguments(config: TrainOptions) -> PerceArguments:
    """PerceArguments from perce's options and the TrainingArguments fields in config.extra."""
    silence_libraries()
    run, extra = config.run, _given_fields(config)
    use_cpu = bool(extra.get("use_cpu", not torch.cuda.is_available()))
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
        "eval_on_start": True,
        "eval_strategy": "steps" if run.eval_steps else "epoch",
        "eval_steps": run.eval_steps,
        "save_strategy": "steps" if run.save_steps else "no",
        "save_steps": run.save_steps or 500,
        "save_total_limit": KEPT_CHECKPOINTS,
        "early_stopping": run.early_stopping,
        "logging_steps": min(run.logging_steps, run.max_steps) if run.max_steps > 0 else run.logging_steps,
        "logging_first_step": True,
        "seed": run.seed,
        "data_seed": None if config.data.streaming else run.seed,
        "report_to": "none",
        "disable_tqdm": False,  # by default the bars are off when transformers' log is, as it is here
        "use_cpu": use_cpu,
        # Also for LoRA's bf16 base: without autocast its fp32 adapters would keep an fp32 copy of every activation.
        "bf16": precision == "bf16",
        "dataloader_pin_memory": not use_cpu,
        CHECKPOINTING: run.activation_checkpointing,
    }
    values |= extra
    _settle_saving(run, values, "save_strategy" in extra)
    with options_that_fail_late((ImportError, ValueError, TypeError, AttributeError, OSError, RuntimeError)):
        args = PerceArguments(loss=config.loss, data=config.data, memory=config.memory, **values)
        refuse_fields(config.extra, idle_beside(args), but=())
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()  # fails if its package is missing
    return args


def _settle_saving(run: RunConfig, values: dict[str, Any], chosen: bool) -> None:
    """Save at the evaluations if only the best weights are kept. UserError for options that contradict that. `chosen`:
    whether a save_strategy is given."""
    if run.early_stopping and not values.setdefault("load_best_model_at_end", True):
        raise UserError("early_stopping: always keeps the best weights. Leave --load_best_model_at_end out.")
    follows = not chosen and run.save_steps == RunConfig.save_steps
    if values.get("load_best_model_at_end") and follows:  # only an evaluation shows whether weights are the best
        values["save_strategy"] = values["eval_strategy"]
        values["save_steps"] = values["eval_steps"] or values["logging_steps"]
    apart = values["save_strategy"] != values["eval_strategy"] or values["save_steps"] != values["eval_steps"]
    if run.early_stopping and apart and not follows:
        raise UserError(
            "early_stopping: weights have to be saved at the steps that evaluate them. Leave --save_steps out, or give "
            "--eval_steps the same value."
        )


def _converted(name: str, hint: Any, value: Any) -> Any:
    """A flag's or file's value, converted to the type of its field if that is one type, or one type and None."""
    kinds = set(typing.get_args(hint) or (hint,)) - {type(None)}
    if value is False and any("no" in getattr(kind, "__members__", {}).values() for kind in kinds):
        return "no"  # of eval_strategy and others, in YAML
    if str in kinds and name not in TAKE_TRUE:  # a flag without a value is true
        require(not isinstance(value, bool) and value != "", name, "a value", value)
    if type(None) in typing.get_args(hint) and str(value).lower() in ("none", "null"):
        return "none" if name == "report_to" else None  # for which its None is the name of a logger
    if kinds == {str}:
        return str(value) if type(value) in (int, float) else value
    return convert(name, hint, value) if kinds in ({bool}, {int}, {float}) else value


def fit_batch(config: TrainOptions, args: PerceArguments, pairs: Any, sharing: Sharing = "none") -> TrainOptions:
    """The config with batch size and accumulation filled in if they were not given; they are set in args too. A step
    gets the fewest forward passes whose largest batch is within the tokens of a forward pass."""
    run = config.run
    tokens = run.tokens_per_batch or TOKENS_A_FORWARD["cpu" if args.device.type == "cpu" else "gpu"]

    def fits(replies: int) -> bool:
        longest = config.data.max_length
        if config.data.streaming:
            return tokens >= replies * longest
        return tokens >= largest_batch(pairs, replies, sharing, config.memory)

    at_least = 1 if sharing == "none" else config.memory.share_persona or 1
    sizes = (replies for replies in (REPLIES_A_STEP, 4, 2) if fits(replies))
    fitting = run.per_device_train_batch_size or max(next(sizes, 1), at_least)
    if "per_device_eval_batch_size" not in config.extra:  # depends on saved options: a resumed run evaluates as before
        args.per_device_eval_batch_size = fitting
    chosen: dict[str, Any] = {} if run.tokens_per_batch else {"per_device_train_batch_size": fitting}
    passes = 1 if run.tokens_per_batch else max(REPLIES_A_STEP // fitting, 1)
    chosen["gradient_accumulation_steps"] = run.gradient_accumulation_steps or passes
    vars(args).update(chosen)
    return replace(config, run=replace(run, **chosen))


def step_of_run(args: PerceArguments, sharing: Sharing = "none") -> str:
    """What all processes together do in an optimiser step. It has to stay the same when a run is resumed."""
    forwards = args.gradient_accumulation_steps * args.world_size
    if args.tokens_per_batch is not None:
        shared = "" if sharing == "none" else f", {args.memory.unit}s shared ({sharing})"
        return f"{forwards} forward passes of {args.tokens_per_batch} tokens{shared}"
    if sharing != "none" and not args.data.streaming:  # a forward pass's size decides which replies are together in one
        shared = f"{args.memory.unit}s shared"
        return f"{forwards} forward passes of {args.per_device_train_batch_size} replies, {shared}"
    return f"{forwards * args.per_device_train_batch_size} sequences"


@contextlib.contextmanager
def options_that_fail_late(faults: tuple[type[Exception], ...] = (ImportError, ValueError)) -> Iterator[None]:
    """UserError for what arguments, Trainer and what it makes raise: bad combinations, an optimiser without its
    package."""
    try:
        yield
    except UserError:
        raise
    except faults as error:
        raise UserError(f"These options cannot be used here: {in_one_line(error)}") from error
