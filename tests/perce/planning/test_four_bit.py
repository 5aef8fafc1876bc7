"""Linear layers in 4 bits, as bitsandbytes stores and runs them; on tensors without data."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from perce import UserError
from perce.config.commands import PlanOptions
from perce.config.schema import ModelConfig
from perce.planning.building import Setup, build
from perce.planning.four_bit import FourBitLinear, quantised
from perce.planning.memory import count
from perce.planning.plans import Costs, check_options, variants
from tests.helpers.plans import LORA, SHORT
from tests.helpers.tiny import tiny_model

FOUR = ModelConfig(lora_r=4, load_in_4bit=True, precision="bf16")


def held(module):
    return sum(x.numel() * x.itemsize for x in [*module.parameters(), *module.buffers()])


def test_a_weight_takes_four_bits_and_its_scales():
    """arXiv 2305.14314, section 3: 0.127 bits of scales per weight. The numbers are those of a layer of bitsandbytes
    0.50.2 on a CPU: 49,152 scales in 8 bits, 192 and an offset in fp32, tables of 16 and 256."""
    layer = FourBitLinear(nn.Linear(1024, 3072, bias=False), torch.bfloat16)
    assert held(layer) == 1_572_864 + 49_152 + 4 * (192 + 1 + 16 + 256)
    assert 8 * held(layer) / (3072 * 1024) == pytest.approx(4.127, abs=0.006)


def test_a_product_has_the_weight_in_16_bits_while_it_runs_and_keeps_no_input():
    layer = FourBitLinear(nn.Linear(64, 32), torch.bfloat16)
    states = torch.zeros(2, 5, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        out = layer(states)
    assert out.shape == (2, 5, 32) and out.dtype == states.dtype and not saved
    out.sum().backward()
    assert states.grad.shape == states.shape


def test_embeddings_norms_and_head_stay_and_are_in_fp32():
    model = quantised(tiny_model("llama"), torch.bfloat16)
    kinds = {
        type(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }
    assert kinds == {FourBitLinear} and type(model.lm_head) is nn.Linear
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8}


def test_counts_and_memory_of_a_model_in_four_bits():
    config = tiny_model("llama", hidden_size=128, intermediate_size=256).config
    four, sixteen = (count(config, Setup(model, True, False)) for model in (FOUR, replace(FOUR, load_in_4bit=False)))
    assert four.weight_bytes < sixteen.weight_bytes
    assert replace(four, weight_bytes=0) == replace(sixteen, weight_bytes=0), "the same weights, stored differently"
    assert four.weight_bytes == held(build(config, Setup(FOUR, True, False)))
    cost = Costs(config, "cuda").of(PlanOptions(FOUR, SHORT))
    assert cost.memory.phases["forward"]["working set"] > 0
    assert cost.flops == Costs(config, "cuda").of(PlanOptions(replace(FOUR, load_in_4bit=False), SHORT)).flops


def test_it_has_a_line_where_it_can_be():
    assert "--load_in_4bit true" in dict(variants(PlanOptions(LORA, SHORT), "cuda"))
    assert "--load_in_4bit false" in dict(variants(PlanOptions(FOUR, SHORT), "cuda"))
    for options, device in ((LORA, "cpu"), (replace(LORA, lora_r=0), "cuda")):
        assert "--load_in_4bit true" not in dict(variants(PlanOptions(options, SHORT), device))
    assert not dict(variants(PlanOptions(FOUR, SHORT), "cuda"))["--lora_r 0"].model.load_in_4bit


@pytest.mark.parametrize(
    ("model", "step", "device", "message"),
    [
        (FOUR, SHORT, "cpu", "Expected --device cuda"),
        (FOUR, replace(SHORT, devices=2, sharding="full"), "cuda", "Use --sharding none"),
    ],
)
def test_what_a_run_refuses_is_not_planned(model, step, device, message):
    with pytest.raises(UserError, match=message):
        check_options(PlanOptions(model, step), device)
