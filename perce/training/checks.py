"""What trainers refuse or warn of before the first step, because it would fail later, on a GPU, or silently."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import has_length

from perce.config.options import require
from perce.config.schema import LossConfig, MemoryConfig
from perce.data.marked import PersonaCollator, collate_pairs
from perce.errors import UserError
from perce.model.loading import adapters_unused
from perce.model.memory import CHECKPOINTING
from perce.model.noise import adapter_noise
from perce.model.probe import check_packing, check_sequences_apart
from perce.model.reach import without_gradient
from perce.model.trial import SHARED, Manner, check_step
from perce.objectives import in_one_pass
from perce.training.arguments import PerceArguments, settle_checkpointing
from perce.training.best import check_direction, check_schedule, metric_of
from perce.training.idle import OF_THE_TRAINERS_LOADER, changed, refuse_fields
from perce.training.parallel import check_one_gpu, check_parallelism
from perce.visible import in_short


def warn_of_dropout(model: nn.Module) -> None:
    """Adapters may have dropout, of any kind; a base model may not (see model/noise.py)."""
    dropout = max((value for *_, value in adapter_noise(model)), default=0.0)
    if dropout > 0:
        warnings.warn(
            f"Dropout of {dropout} in the adapter acts in the factual pass and not in the counterfactual one: every "
            "PIR is a little too low. Leave it at 0, or use --estimate epoch or frozen, which estimate without it.",
            stacklevel=3,
        )


def is_in_place(model: Any, device: torch.device) -> bool:
    """Whether the model can be tried before training. FSDP and DeepSpeed move it, and load or shard its weights,
    later."""
    weight = model.get_input_embeddings().weight
    elsewhere = weight.is_meta or weight.device.type != device.type
    return not (elsewhere or isinstance(weight, DTensor) or is_deepspeed_zero3_enabled())


def check_hooks(kwargs: Mapping[str, Any]) -> None:
    """UserError for hooks that the Trainer would call with logits, or for a loss or a model: they would be ignored."""
    if kwargs.get("model_init") is not None:
        raise UserError("model_init: one model is prepared, once. Give the model itself as model.")
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if kwargs.get(name) is not None:
            raise UserError(
                f"{name}: the PerCE loss is computed without logits, so this would not be called. Use "
                "trainer.evaluate(dataset), or perce evaluate for generated replies."
            )


def check_in_one_pass(objective: str) -> None:
    """UserError for an objective whose weights need more than one forward pass, which is all that other trainers
    give."""
    names = in_one_pass()
    expected = "one for personas whose weights come from the predictions of a single forward pass"
    require(objective in names, "objective", f"{expected} ({', '.join(names)})", objective)


def check_online(loss: LossConfig) -> None:
    """UserError for token weights that other trainers cannot have."""
    check_in_one_pass(loss.objective)
    for name, only in (("estimate", "online"), ("normalize", "none")):
        if getattr(loss, name) != only:
            raise UserError(f"{name}: expected {only}, got {getattr(loss, name)}. perce.PerceTrainer has the others.")


def check_trainer(trainer: Trainer, loss: LossConfig) -> None:
    """UserError for arguments of another library's trainer that would change or bias the loss; options that would
    replace the loss are switched off."""
    args, loaders = trainer.args, trainer.accelerator.dataloader_config
    check_parallelism(args)
    check_one_gpu(args)
    if loaders.dispatch_batches:
        raise UserError("dispatch_batches: expected false. Batches that are divided and sent lose their tokens.")
    loaders.dispatch_batches = False  # None would dispatch the batches of a stream
    if args.metric_for_best_model and (metric := metric_of(args)):
        check_direction(args, metric)
        check_schedule(args)
    if args.label_smoothing_factor:
        raise UserError("label_smoothing_factor: the PerCE loss has no label smoothing. Leave it at 0.")
    if args.neftune_noise_alpha and loss.entry.contrasts:
        raise UserError("neftune_noise_alpha: noise in the factual pass alone would bias every PIR. Leave it out.")
    settle_checkpointing(args)
    if args.use_liger_kernel:  # its loss, patched in when training begins, would replace the forward that holds ours
        off = dict.fromkeys(("fused_linear_cross_entropy", "cross_entropy"), False)
        args.liger_kernel_config = (args.liger_kernel_config or {}) | off


def check_arguments(args: Any, model: Any, train_dataset: Any, peft_config: Any) -> None:
    """UserError for arguments of the wrong type, and for a model without a trainable parameter if there is data to
    train on."""
    if not isinstance(args, PerceArguments):
        raise UserError(f"args: expected PerceArguments, got {type(args).__name__}.")
    if not isinstance(model, str) and not hasattr(model, "config"):
        raise UserError(
            f"model: expected a causal language model of transformers, alone or under PEFT, or its name, got "
            f"{type(model).__name__}. Give the model itself: the Trainer wraps it for several GPUs."
        )
    if train_dataset is None:
        return
    if isinstance(train_dataset, Mapping | str):
        remedy = "Read the rows with perce.load_examples or datasets."
        if isinstance(train_dataset, Mapping):
            remedy = f"Give one of them, such as train_dataset[{next(iter(train_dataset), 'train')!r}]."
        raise UserError(f"train_dataset: expected one dataset, got {type(train_dataset).__name__}. {remedy}")
    frozen = isinstance(model, nn.Module) and not any(parameter.requires_grad for parameter in model.parameters())
    if frozen and peft_config is None:
        raise UserError(
            "model: expected a parameter that is trained (requires_grad), got none. Give a peft_config for an adapter, "
            "or call model.requires_grad_(True)."
        )


def check_dealt(args: PerceArguments) -> None:
    """UserError for options that prevent putting the replies of a conversation, or of a persona, into one batch."""
    most, batch = args.memory.share_persona, args.per_device_train_batch_size
    if args.tokens_per_batch is None and most > batch:
        raise UserError(
            f"share_persona: {most} requests are to share a forward pass, and it has {batch}. Expected a "
            f"--per_device_train_batch_size of {most} or more; --branches_per_forward 1 runs them one at a time."
        )
    why = "the replies of a conversation are put into one batch. Leave it out, or give --share none"
    refuse_fields(changed(args), dict.fromkeys(OF_THE_TRAINERS_LOADER, why))


@torch.random.fork_rng(devices=())
def try_options(trainer: Trainer) -> tuple[int, int]:
    """Make loaders, optimiser, schedule and compiler once as training will, so that they fail now if they fail.

    Returns (steps per epoch, steps of the run).

    Raises:
        UserError: there are fewer examples than a batch, and incomplete ones are dropped.
        Exception: of any kind, from transformers, torch or accelerate.
    """
    args = trainer.args
    loader = trainer.get_train_dataloader()
    if trainer.eval_dataset is not None:
        trainer.get_eval_dataloader()
    if has_length(loader) and not len(loader):
        raise UserError(
            f"dataloader_drop_last: {len(trainer.train_dataset)} training examples do not fill a batch of "  # type: ignore[arg-type]
            f"{args.train_batch_size} on each process, and nothing would be left. Leave it out, or use smaller batches."
        )
    _, steps_an_epoch, *_, steps = trainer.set_initial_training_values(args, loader)
    kind, options = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)  # type: ignore[arg-type]
    parameter = nn.Parameter(torch.zeros(1, 1))
    optimizer: torch.optim.Optimizer = torch.optim.SGD([parameter], lr=args.learning_rate)
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and not {"params", "model"} & {*options}:
        optimizer = kind([parameter], **options)
    of_kind: Any = args.lr_scheduler_kwargs
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, of_kind)
    for rate in getattr(schedule, "lr_lambdas", ()):
        for step in (0, steps // 2, steps):
            rate(step)
    if getattr(args, CHECKPOINTING):  # Identity refuses unknown arguments; layers would take any
        options = dict(getattr(args, f"{CHECKPOINTING}_kwargs"))
        for apart in ("every_n_layers", "offload"):
            options.pop(apart, None)
        checkpoint(nn.Identity(), parameter, **options)
    if args.torch_compile:
        torch.compile(nn.Identity(), backend=args.torch_compile_backend, mode=args.torch_compile_mode)  # type: ignore[arg-type]
    return steps_an_epoch, steps


def check_sharding(trainer: Trainer, memory: MemoryConfig) -> None:
    """UserError if personas that run by themselves would leave processes waiting for each other for ever."""
    if memory.on_trunks and (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
        raise UserError(
            f"{memory.by_itself} with sharded weights (FSDP, ZeRO-3): personas take different numbers of forward "
            "passes, and each of these waits for all processes. Use data parallelism (DDP), or --persona_grad full "
            "without --branches_per_forward."
        )


def check_trunks(batch: Mapping[str, Any], memory: MemoryConfig) -> None:
    """UserError for a batch whose personas would not run by themselves although the options ask for it."""
    if memory.on_trunks and "trunks" not in batch:
        raise UserError(
            f'data_collator: expected one that calls perce.data.batch.collate with persona_grad="{memory.persona_grad}"'
            f" and branches_per_forward={memory.branches_per_forward}, got batches without trunks."
        )


def try_packing(model: Any, args: TrainingArguments) -> None:
    """UserError unless the model keeps packed sequences apart, on the device where it is now: weights that FSDP or
    DeepSpeed place later cannot be tried, and are refused."""
    device = next(model.parameters()).device.type
    # The Trainer autocasts only in the forward that it wraps later; flash attention takes no fp32.
    with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
        check_packing(model, device)


def try_step(trainer: Any, collate: Callable[..., Any]) -> None:
    """UserError for a model that would be trained wrongly in the manner of this run, if it can be tried; without
    training data, for one that would be evaluated wrongly behind a cached persona."""
    model, args = trainer.model, trainer.args
    memory, trains, shares = args.memory, trainer.train_dataset is not None, trainer.sharing != "none"
    if not (memory.on_trunks or trains) or not is_in_place(model, args.device):
        return
    if trains:
        check_gradients(trainer)
    shared = "share_persona" if memory.share_persona else SHARED
    of_batches = (
        ({shared: {"sharing": "none"}} if shares else {})
        | ({"branches_per_forward": {"branches_per_forward": 0}} if memory.branches_per_forward else {})
        | ({"persona_grad none": {"persona_grad": "full"}} if memory.persona_grad == "none" else {})
    )
    unit = memory.unit if shares else None
    manner = Manner(collate, _checkpointing(args) if trains else None, bool(memory.mlp_tile), of_batches, unit)
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):  # the Trainer adds it when it wraps later
        check_step(model, manner)


def _checkpointing(args: TrainingArguments) -> Mapping[str, Any] | None:
    """The arguments of activation checkpointing; None without it."""
    return (getattr(args, f"{CHECKPOINTING}_kwargs") or {}) if getattr(args, CHECKPOINTING) else None


def try_collated(trainer: Any, without: Mapping[str, PersonaCollator]) -> None:
    """Like try_step, for another library's trainer, with its own collator. without: options that decide how a batch is
    made, each with the collator that leaves it out, to name the option that is at fault."""
    model, args = trainer.model, trainer.args
    if not is_in_place(model, args.device):
        return
    of_batches = {name: {"collator": collator} for name, collator in without.items()}
    manner = Manner(partial(collate_pairs, collator=trainer.data_collator), _checkpointing(args), of_batches=of_batches)
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        check_step(model, manner)
        if "padding_free" in without:  # with the run's own attention too, which a trial step replaces
            check_sequences_apart(model)


def check_gradients(trainer: Trainer) -> None:
    """UserError for an adapter that a text does not train and, if processes wait for every gradient, for any other
    such weight. It is tried on a few tokens, on the device where the model is now."""
    model, args = trainer.model, trainer.args
    adapted = hasattr(model, "peft_config")
    waiting = args.world_size > 1 and not args.ddp_find_unused_parameters
    names = without_gradient(model) if adapted or waiting else []
    if adapted and names:
        layers = (name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names)
        raise UserError(adapters_unused(list(dict.fromkeys(layers))))
    if names:
        raise UserError(
            f"model: {in_short(names)} have no gradient after a text, and data parallelism would wait for it. Freeze "
            "them (requires_grad_(False)), or use --ddp_find_unused_parameters true."
        )
