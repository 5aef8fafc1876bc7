"""PerceArguments: what needs a GPU, and what is always off."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.llama import modeling_llama

from perce import MemoryConfig, UserError
from perce.model.memory import CHECKPOINTING
from perce.training.arguments import settle_device
from tests.helpers.memory import TILED, model_for, trainer_for


def test_offload_needs_a_gpu_and_checkpointing(tmp_path):
    with pytest.raises(UserError, match="on a CPU, whose activations are in host memory"):
        trainer_for(tmp_path, model_for(), memory=MemoryConfig(activation_offload=True))
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
        trainer_for(tmp_path, model_for(), use_liger_kernel=True)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_ligers_kernels_leave_our_forwards_in_place(tmp_path, monkeypatch, lora):
    """The Trainer patches them into the model when training begins, after ours."""
    pytest.importorskip("liger_kernel")
    for name in ("LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb"):  # Liger replaces them for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    model = model_for(lora=lora)
    base = model.get_base_model() if lora else model
    trainer = trainer_for(tmp_path, model, memory=TILED)
    layer = base.model.layers[0]
    before = [module.forward.__func__ for module in (base, base.lm_head, layer.mlp)]
    apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    assert [module.forward.__func__ for module in (base, base.lm_head, layer.mlp)] == before
    assert "Liger" in layer.input_layernorm.forward.__func__.__qualname__, "its other kernels are in use"
