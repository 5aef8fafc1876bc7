"""Several devices: which of accelerate's ways to use them train PerCE, and which would silently do something else."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from perce.errors import UserError

Found = TypeVar("Found")


def found_by_first(find: Callable[[], Found]) -> Found:
    """What the first process finds, or the UserError that it raises, on every process: a disk may look different to the
    others, or have changed by the time they look."""
    found: Any = None
    if PartialState().is_main_process:
        try:
            found = find()
        except UserError as error:
            found = error
    (found,) = broadcast_object_list([found])
    if isinstance(found, UserError):
        raise found
    return found


def check_gradients_in_reach(args: Any) -> None:
    """UserError if PerceArguments ask for normalize=batch, and the gradients that it would scale are out of reach."""
    if args.loss.normalize == "batch" and (args.deepspeed or _environment("ACCELERATE_USE_DEEPSPEED")):
        raise UserError(
            "normalize=batch: scales the gradients at the end of a step, and DeepSpeed does not expose them. Use "
            "--normalize sequence or none, or FSDP."
        )
    if args.loss.normalize == "batch" and ("lomo" in str(args.optim) or "layerwise" in str(args.optim)):
        raise UserError(
            f"normalize=batch: scales the gradients at the end of a step, and the optimiser {args.optim} uses them "
            "earlier. Use --normalize sequence or none, or another --optim."
        )


def check_one_gpu(args: TrainingArguments) -> None:
    """UserError if the Trainer would divide each batch over several GPUs of one process."""
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process. Start one process per GPU (torchrun --nproc_per_node "
            f"{args.n_gpu} -m perce.train …), or make only one visible (CUDA_VISIBLE_DEVICES=0)."
        )


def check_parallelism(args: TrainingArguments) -> None:
    """UserError for FSDP without a GPU, and for sequences or layers that are divided over processes."""
    if (args.fsdp or _environment("ACCELERATE_USE_FSDP")) and (args.use_cpu or not torch.accelerator.is_available()):
        raise UserError(
            "fsdp on a CPU: the Trainer would silently run plain data parallelism instead. Leave --fsdp out to use "
            "that, or run on GPUs."
        )
    if getattr(args, "parallelism_config", None) or _environment("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UserError(
            "parallelism_config: context, sequence and tensor parallelism are not supported; the rows of a response "
            "are read from whole sequences, which every process must hold. What works: one process per GPU (torchrun "
            "--nproc_per_node 8 -m perce.train …), --fsdp true when the weights do not fit one GPU, and "
            "--activation_checkpointing for long sequences."
        )


def shards_weights(args: TrainingArguments) -> bool:
    """Whether FSDP or DeepSpeed holds the weights, by perce's options or by what `accelerate launch` set."""
    by_launcher = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return bool(args.fsdp or args.deepspeed) or any(map(_environment, by_launcher))


def keep_outputs_exact(fsdp_plugin: Any) -> None:
    """Let FSDP2's mixed precision cast parameters only.

    Its policy also rounds everything that enters or leaves a wrapper to bf16: given token weights, the loss (23.528
    became 23.5) and the log-probabilities whose difference is PIR. Autocast decides what is computed in bf16.
    """
    policy = getattr(fsdp_plugin, "mixed_precision_policy", None)
    if policy is not None and fsdp_plugin.fsdp_version == 2:
        fsdp_plugin.mixed_precision_policy = dataclasses.replace(
            policy, output_dtype=torch.float32, cast_forward_inputs=False
        )


def _environment(name: str) -> bool:
    """A switch that `accelerate launch` sets."""
    return os.environ.get(name, "false").lower() in ("true", "1")
