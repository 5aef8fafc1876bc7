"""PerceArguments: what needs a GPU, and what is always off."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.llama import modeling_llama

from perce import MemoryConfig, UserError
from perce.config.commands import parse_args
from perce.model.memory import CHECKPOINTING
from perce.train import resolve
from perce.training.arguments import settle_device, training_arguments
from tests.helpers import ROOT
from tests.helpers.trainers import arguments, model_for, trainer_for


def test_offload_needs_a_gpu_and_checkpointing(tmp_path):
    with pytest.raises(UserError, match="on a CPU, whose activations are in host memory"):
        arguments(tmp_path, memory=MemoryConfig(activation_offload=True))
    args = SimpleNamespace(
        device=torch.device("cuda"), use_liger_kernel=False,
        **{CHECKPOINTING: False, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
    )  # fmt: skip
    with pytest.raises(UserError, match="Add --activation_checkpointing"):
        settle_device(args, MemoryConfig(activation_offload=True))
    setattr(args, CHECKPOINTING, True)
    settle_device(args, MemoryConfig(activation_offload=True))
    assert getattr(args, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False, "offload": True}


def test_ligers_kernels_are_refused_on_a_cpu(tmp_path):
    with pytest.raises(UserError, match="use_liger_kernel"):
        arguments(tmp_path, use_liger_kernel=True)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_ligers_kernels_leave_our_forwards_in_place(tmp_path, monkeypatch, lora):
    """The Trainer patches them into the model when training begins, after ours."""
    pytest.importorskip("liger_kernel")
    for name in ("LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb"):  # Liger replaces them for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    model = model_for("lora" if lora else "full")
    base = model.get_base_model() if lora else model
    trainer = trainer_for(model, arguments(tmp_path, memory=MemoryConfig(mlp_tile=32)))
    layer = base.model.layers[0]
    before = [module.forward.__func__ for module in (base, base.lm_head, layer.mlp)]
    apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    assert [module.forward.__func__ for module in (base, base.lm_head, layer.mlp)] == before
    assert "Liger" in layer.input_layernorm.forward.__func__.__qualname__, "its other kernels are in use"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_options_that_the_trainer_takes(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("perce.training.arguments.check_parallelism", lambda _: None)  # FSDP is refused without a GPU
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the Trainer sets it: put back afterwards
    config = resolve(parse_args(["--config", str(recipe), "--output_dir", str(tmp_path), "--precision", "fp32"], {})[0])
    args = training_arguments(config)
    if args.fsdp:
        plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
        assert plugin.fsdp_version == 2 and plugin.activation_checkpointing
        assert str(plugin.state_dict_type) == "StateDictType.FULL_STATE_DICT"
