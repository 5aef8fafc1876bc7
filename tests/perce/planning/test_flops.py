"""Counts of operations equal torch's."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, Qwen2Config

from perce import MemoryConfig
from perce.data.sharing import Forward, Trunk, Trunks
from perce.model.loading import add_adapter, lora_config
from perce.model.memory import enable_checkpointing, prepare_memory
from perce.model.patch import prepare_model
from perce.model.prefill import hidden_on_trunks
from perce.planning import flops
from perce.planning.building import Setup
from perce.planning.flops import attention_flops, count_flops, matmul_rate
from perce.planning.memory import count
from perce.planning.shapes import shape_of
from tests.helpers.architectures import tiny
from tests.helpers.plans import FULL, LORA, NONE, SHORT, TILED
from tests.helpers.tiny import tiny_model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_torch_counts(checkpointing):
    """Products only: torch's counter knows neither the CPU's attention nor the inside of the loss."""
    model = prepare_model(tiny_model("llama")).train()
    plan = replace(SHORT, objective="ce", activation_checkpointing=checkpointing)
    setup = Setup(FULL, False, checkpointing)
    ours = count_flops(model.config, setup, plan, count(model.config, setup))
    attention = ours.forward - 2 * shape_of(plan, MemoryConfig()).tokens * count(model.config, setup).linear
    if checkpointing:
        enable_checkpointing(model)
    ids = torch.zeros(1, shape_of(plan, MemoryConfig()).tokens, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter:
        model.base_model(input_ids=ids, use_cache=False)[0].sum().backward()
    # In transformers 5.16 the rotary embedding is a product (bmm) of 4 operations per token and pair of channels.
    products = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    counted = sum(n for op, n in products.items() if "attention" not in op and op != "aten.bmm")
    assert counted == ours.cross_entropy - ours.head - attention * (3 + checkpointing)


@pytest.mark.parametrize(("objective", "products"), [("ce", 0), ("perce", 1), ("lossce", 1), ("entce", 1)])
def test_weights_cost_the_head_a_product_a_pass(objective, products):
    """Also weights from a token's own loss or entropy, which must be known before the loss that they weight."""
    config = tiny_model("llama").config
    setup = Setup(FULL, False, False)
    counts = count(config, setup)
    ours, ce = (count_flops(config, setup, replace(SHORT, objective=name), counts) for name in (objective, "ce"))
    layers = ours.estimation
    assert ours.total - ce.total - layers == products * 2 * 16 * counts.hidden * counts.vocabulary
    assert (layers > 0) == (objective == "perce")


def test_attention_sees_a_window():
    config = tiny_model("gemma3").config  # one layer sees 16 tokens, one all
    setup = Setup(LORA, False, False)
    both = count_flops(config, setup, SHORT, count(config, setup))
    linear = 2 * 95 * (count(config, setup).linear + count(config, setup).adapter)
    pairs = 95 * 96 // 2 + 16 * 17 // 2 + (95 - 16) * 16
    assert both.forward == linear + 4 * 4 * 8 * pairs
    assert 0 < both.overhead < 1


@pytest.mark.parametrize("memory", [MemoryConfig(), NONE, TILED], ids=["full", "none", "tiled"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_under_memory_options_are_those_that_torch_counts(memory, checkpointing):
    """Products only: torch's counter does not know the CPU's attention."""
    model = add_adapter(prepare_model(tiny_model("llama")), lora_config(LORA)).train()
    base = model.get_base_model()
    plan = replace(SHORT, objective="ce", activation_checkpointing=checkpointing)
    setup = Setup(LORA, False, checkpointing, memory)
    counts = count(base.config, setup)
    without_attention = tiny_model("llama").config
    without_attention.num_attention_heads = 0
    ours = count_flops(without_attention, setup, plan, counts)
    if checkpointing:
        enable_checkpointing(base)
    prepare_memory(base, memory)
    shape = shape_of(plan, memory)
    ids = torch.zeros(1, shape.tokens, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter:
        if memory.persona_grad == "none":
            rest = Forward(shape.prefix, shape.tokens, None)
            trunks = Trunks((Trunk(0, shape.prefix, (rest,)),), detached=True, recomputed=False)
            rows = torch.arange(shape.tokens - shape.prefix)
            hidden = hidden_on_trunks(base.base_model, rows, trunks, ids, torch.arange(shape.tokens)[None])
        else:
            hidden = base.base_model(input_ids=ids, use_cache=False)[0]
        hidden.sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    # The first layer's input needs no gradient, and the part of adapters that is not recomputed is not counted apart.
    assert counted == pytest.approx(ours.cross_entropy - ours.head, rel=0.06)


def test_layers_without_attention_cost_none():
    """If they were counted, the bound would not be a lower bound."""
    config = tiny_model("llama").config
    config.num_hidden_layers, config.layer_types = 4, ["linear_attention", "full_attention", "conv", "full_attention"]
    hybrid = attention_flops(config, 64)
    config.num_hidden_layers, config.layer_types = 2, ["full_attention"] * 2
    assert hybrid == attention_flops(config, 64) > 0


def test_a_window_without_layer_types_is_that_of_all_layers():
    """As Mistral, Phi-3 and Starcoder2 apply it."""
    text = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "sliding_window": 16}
    assert attention_flops(MistralConfig(**text, head_dim=8), 64) == 2 * 4 * 4 * 8 * (16 * 17 // 2 + (64 - 16) * 16)
    assert attention_flops(Qwen2Config(**text), 64) == 2 * 4 * 4 * 8 * 64 * 65 // 2, "use_sliding_window is off"


def test_latent_attention_has_two_widths():
    """Counted by torch on eager attention, which scores all pairs of tokens. What grows with their number alone is left
    out, such as a rotary embedding as a product."""
    model = tiny("minicpm3").eval()
    model.set_attn_implementation("eager")
    short, long = [], []
    for tokens, products in ((32, short), (64, long)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.base_model(torch.ones(1, tokens, dtype=torch.int64))
        products += [n for op, n in counter.get_flop_counts()["Global"].items() if str(op) == "aten.bmm"]
    of_pairs = sum(long) - 2 * sum(short)
    assert attention_flops(model.config, 64) / (64 * 65 / 2) == of_pairs / (64**2 - 2 * 32**2)


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_what_replies_share_is_counted_once(architecture, branches):
    """Counts pairs of a token and a token that it attends to along its path; gemma3 has a window in one layer."""
    config = tiny_model(architecture).config
    setup = Setup(LORA, False, False)
    counts = count(config, setup)
    step = replace(SHORT, replies=3, branches=branches, per_device_train_batch_size=3)
    beside = 2 * 15 * branches
    ours, alone = (
        count_flops(config, setup, step, counts) for step in (step, replace(step, replies=1, branches=False))
    )
    assert ours.tokens == 95 + beside and alone.tokens == 3 * 95
    places = [*range(95), *range(95 - 48 - 15, 95 - 48), *range(95 - 24 - 15, 95 - 24)][: ours.tokens]
    windows = [16, 96] if architecture == "gemma3" else [96, 96]
    pairs = sum(min(place + 1, window) for place in places for window in windows)
    assert ours.forward == 2 * ours.tokens * (counts.linear + counts.adapter) + 4 * 4 * 8 * pairs
    assert ours.head == alone.head


@pytest.mark.parametrize("low_precision", [False, True])
def test_the_rate_is_that_of_products_on_this_machine(monkeypatch, low_precision):
    monkeypatch.setattr(flops, "GEMM_SECONDS", 0.01)
    monkeypatch.setattr(flops, "GEMM_SIDE", {"cpu": 128})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert 10**7 < matmul_rate("cpu", low_precision) < 10**14 and matmul_rate("cuda", low_precision) is None
