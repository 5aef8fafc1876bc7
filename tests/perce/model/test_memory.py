"""MLPs in tiles."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from perce import MemoryConfig, UserError
from perce.model.memory import tile_mlps
from tests.helpers.architectures import tiny
from tests.helpers.trainers import PAIRS, arguments, model_for, trainer_for

TILE = 32
TILED = MemoryConfig(mlp_tile=TILE)


def gradients(trainer):
    """Gradients of one training step by name, and its loss."""
    batch = trainer.data_collator(PAIRS[:3])
    loss = trainer.training_step(trainer.model, batch, torch.tensor(batch["target"].numel()))
    return loss, {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


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
    ("architecture", "kind", "checkpointing"),
    [
        ("llama", "full", False), ("llama", "lora", False), ("llama", "full", True), ("qwen3", "lora", True),
        ("gemma3", "lora", True), ("phi", "full", True),
    ],
)  # fmt: skip
def test_tiles_change_neither_loss_nor_gradients(tmp_path, architecture, kind, checkpointing):
    plain = model_for(kind, architecture=architecture)
    tiled = copy.deepcopy(plain)
    expected_loss, expected = gradients(trainer_for(plain, arguments(tmp_path)))
    trainer = trainer_for(tiled, arguments(tmp_path, memory=TILED))
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    with WidestActivation(width=48) as seen:
        loss, actual = gradients(trainer)
    assert seen.rows == TILE, "each MLP ran over a tile at a time, forward and backward"
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=1e-6)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt2", "qwen3_moe"])
def test_tiles_of_several_sequences_are_as_contiguous_as_these(tmp_path, architecture):
    """A part of two sequences is not contiguous, and MLPs that take a view of all tokens would fail."""
    plain = tiny(architecture)
    tiled = copy.deepcopy(plain)
    expected_loss, expected = gradients(trainer_for(plain, arguments(tmp_path)))
    loss, actual = gradients(trainer_for(tiled, arguments(tmp_path, memory=TILED)))
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-3)


def test_a_recomputed_tile_has_the_dropout_of_its_forward():
    """Otherwise the gradient would not be that of the loss. It is compared with a difference quotient."""
    model = model_for("lora", dropout=0.5)
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
