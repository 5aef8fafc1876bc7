"""MLPs in tiles, options that need a GPU, and contexts that cannot work."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.llama import modeling_llama

from perce.config.schema import LossConfig, MemoryConfig
from perce.errors import UserError
from perce.model.loading import add_adapter
from perce.model.memory import CHECKPOINTING, position_limit, tile_mlps
from perce.model.patch import prepare_model
from perce.training.arguments import PerceArguments, settle_device
from perce.training.checks import check_context, check_sharding
from perce.training.trainer import PerceTrainer
from tests.tiny import demo_pairs, tiny_model, tiny_tokenizer

PAIRS = demo_pairs(3)
TILE = 32
DETACHED, TILED = MemoryConfig(persona_grad="none"), MemoryConfig(mlp_tile=TILE)


def trainer_for(tmp_path, model, pairs=PAIRS, **options):
    args = PerceArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=3, max_steps=1,
        logging_steps=1, save_strategy="no", loss=LossConfig(clip_min=0.005), dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return PerceTrainer(model, args, train_dataset=Dataset.from_list(pairs), processing_class=tiny_tokenizer())


def model_for(architecture="llama", lora=False, dropout=0.0, **changes):
    model = prepare_model(tiny_model(architecture, **changes))
    if lora:
        model = add_adapter(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # starts at zero, where the adapters of A would have no gradient
                torch.nn.init.normal_(parameter, std=0.05)
    return model


def gradients(trainer):
    """Of one training step, by name, and its loss."""
    batch = trainer.data_collator(PAIRS)
    loss = trainer.training_step(trainer.model, batch, torch.tensor(batch["target"].numel()))
    return loss, {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


# ---- tiles


class WidestActivation(TorchDispatchMode):
    """The most rows of any tensor of the MLP's intermediate width."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 3 and out.shape[-1] == self.width:
            self.rows = max(self.rows, out.shape[-2])
        return out


@pytest.mark.parametrize(
    ("architecture", "lora", "checkpointing"),
    [
        ("llama", False, False), ("llama", True, False), ("llama", False, True), ("qwen3", True, True),
        ("gemma3", True, True), ("phi", False, True),
    ],
)  # fmt: skip
def test_tiles_change_neither_loss_nor_gradients(tmp_path, architecture, lora, checkpointing):
    plain = model_for(architecture, lora)
    tiled = copy.deepcopy(plain)
    expected_loss, expected = gradients(trainer_for(tmp_path, plain))
    trainer = trainer_for(tmp_path, tiled, memory=TILED)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    with WidestActivation(width=48) as seen:
        loss, actual = gradients(trainer)
    assert seen.rows == TILE, "each MLP ran over a tile at a time, forward and backward"
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=1e-6)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_a_recomputed_tile_has_the_dropout_of_its_forward():
    """Else the gradient would not be that of the loss: compared with a difference quotient."""
    model = model_for(lora=True, dropout=0.5)
    tile_mlps(model, TILE)
    mlp = model.get_base_model().model.layers[0].mlp.train()
    weight = mlp.down_proj.lora_A["default"].weight
    hidden, direction = torch.randn(1, 3 * TILE, 32), torch.randn(weight.shape)

    def value(step=0.0):
        torch.manual_seed(2)
        weight.data += step * direction
        total = mlp(hidden).double().sum()
        weight.data -= step * direction
        return total

    value().backward()
    quotient = (value(0.01) - value(-0.01)).item() / 0.02
    assert (weight.grad * direction).sum().item() == pytest.approx(quotient, rel=1e-3)


def test_mlps_that_are_not_known_to_be_positionwise_are_refused():
    model = model_for()
    layer = model.model.layers[1]
    whole = layer.mlp
    layer.mlp = MixesTokens()
    with pytest.raises(UserError, match=r"LlamaDecoderLayer of llama.*one by one"):
        tile_mlps(model, TILE)
    layer.mlp = TakesMore()
    with pytest.raises(UserError, match="takes more than hidden states"):
        tile_mlps(model, TILE)
    del layer.mlp
    layer.feed_forward = whole
    with pytest.raises(UserError, match="no module named mlp"):
        tile_mlps(model, TILE)


class MixesTokens(torch.nn.Module):
    def forward(self, hidden):
        return hidden + hidden.mean(1, keepdim=True)


class TakesMore(torch.nn.Module):
    def forward(self, hidden, router=None):
        return hidden


# ---- a GPU


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


# ---- contexts that cannot work


def test_a_context_beyond_the_models_positions_is_found_before_training(tmp_path):
    longest = max(len(pair["input_ids"]) for pair in PAIRS)
    trainer_for(tmp_path, model_for(max_position_embeddings=longest))
    with pytest.raises(UserError, match=rf"train_dataset: .*{longest} tokens.* {longest - 1} positions"):
        trainer_for(tmp_path, model_for(max_position_embeddings=longest - 1))
    stream, config = IterableDataset.from_generator(lambda: iter(PAIRS)), tiny_model().config
    check_context(stream, "train_dataset", config, MemoryConfig(), 8192)
    with pytest.raises(UserError, match=r"8193 tokens.* 8192 positions"):
        check_context(stream, "train_dataset", config, MemoryConfig(), 8193)


def test_stretched_positions_count():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4096}
    assert position_limit(tiny_model(rope_parameters=rope).config) == 16384
    assert position_limit(tiny_model().config) == 8192


@pytest.mark.parametrize(
    ("architecture", "attention", "length", "refused"),
    [
        ("gemma3", "sdpa", 29_400, True), ("gemma3", "sdpa", 29_200, False), ("llama", "sdpa", 100_000, False),
        ("llama", "eager", 16_500, True), ("llama", "eager", 16_300, False),
        ("gemma3", "flex_attention", 99_999, False),
    ],
)  # fmt: skip
def test_attention_over_all_pairs_of_tokens_is_refused_by_name(architecture, attention, length, refused):
    config = tiny_model(architecture, max_position_embeddings=100_000).config
    config._attn_implementation = attention
    pairs = [{"input_ids": [0] * length}]
    check_context(pairs, "train_dataset", config, DETACHED, 0)
    if refused:
        with pytest.raises(UserError, match=rf"{length} × {length}.*--persona_grad none"):
            check_context(pairs, "train_dataset", config, MemoryConfig(), 0)
    else:
        check_context(pairs, "train_dataset", config, MemoryConfig(), 0)


def test_a_detached_persona_is_refused_where_processes_would_wait_for_ever():
    sharded = SimpleNamespace(is_fsdp_enabled=True)
    with pytest.raises(UserError, match="FSDP"):
        check_sharding(sharded, DETACHED)
    check_sharding(sharded, MemoryConfig())
    check_sharding(SimpleNamespace(is_fsdp_enabled=False), DETACHED)
