"""perce.plan under the options of long contexts: persona_grad, mlp_tile, activation_offload, and LongCE's windows."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from perce import plan as command
from perce.config.commands import PlanOptions
from perce.config.schema import MemoryConfig, ModelConfig, StepConfig
from perce.data.batch import collate
from perce.data.documents import DocumentPair, short_windows
from perce.errors import UserError
from perce.model.loading import add_adapter, lora_config
from perce.model.memory import enable_checkpointing, prepare_memory
from perce.model.patch import prepare_model
from perce.model.prefill import hidden_after_prefix, prefill
from perce.planning import plans, rehearsal
from perce.planning.flops import count_flops
from perce.planning.live import Rehearsed
from perce.planning.memory import count, shape_of
from perce.planning.plans import step_cost, variants
from perce.planning.rehearsal import Setup, StepShape, rehearse, rehearse_depth
from tests.tiny import LAYERS, tiny_model

LORA = ModelConfig(lora_r=4, precision="fp32")
NONE, TILED = MemoryConfig(persona_grad="none"), MemoryConfig(mlp_tile=16)
SHORT = StepConfig(context=96, query=8, response=16, gradient_accumulation_steps=1)


def planned(config, memory, device="cpu", **changes):
    return step_cost(config, PlanOptions(LORA, replace(SHORT, **changes), memory), device)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("prefix", [30, 70, 128, 150])
def test_a_long_prefix_is_rehearsed_from_its_ends(architecture, prefix, monkeypatch):
    """gemma3's window is 16 tokens, chunks here are 32."""
    monkeypatch.setattr("perce.model.prefill.PREFILL_CHUNK", 32)
    monkeypatch.setattr(rehearsal, "PREFILL_CHUNK", 32)
    config = tiny_model(architecture).config
    shape = StepShape(batch=2, tokens=prefix + 20, tokens_cf=20, rows=9, accumulates=False, prefix=prefix)
    setup = Setup(LORA, False, True, NONE)
    short_cut = rehearse(config, setup, shape)
    monkeypatch.setattr(
        rehearsal, "_prefix_cache",
        lambda base, tokens: prefill(base, torch.zeros(1, tokens, dtype=torch.int64)),
    )  # fmt: skip
    assert short_cut == rehearse(config, setup, shape)


@pytest.mark.parametrize(
    "memory", [pytest.param(NONE, id="none"), pytest.param(TILED, id="tiled", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_few_layers_tell_what_all_take(memory, checkpointing):
    kinds = [LAYERS[0]] * 2 + [LAYERS[1]] + [LAYERS[0]] * 2
    config = tiny_model("gemma3", num_hidden_layers=5, layer_types=kinds).config
    setup = Setup(LORA, False, checkpointing, memory)
    prefix = 50 if memory == NONE else 0
    shape = StepShape(batch=1, tokens=70, tokens_cf=20, rows=9, accumulates=False, prefix=prefix)
    # What is largest in the one layer of full attention is carried on as if the others came before it.
    few, every = (_bytes(found(config, setup, shape)) for found in (rehearse_depth, rehearse))
    assert few == pytest.approx(every, rel=0.05)


def _bytes(found: Rehearsed) -> dict[str, int]:
    moments = {f"{name} {at}": getattr(phase, at) for name, phase in found.phases.items() for at in ("start", "peak")}
    sizes = {f"{name} {what}": size for name, moment in moments.items() for what, size in vars(moment).items()}
    return sizes | found.parts | {"offloaded": found.offloaded}


def test_what_grows_with_a_detached_persona_is_keys_and_values(monkeypatch):
    """And, in one layer at a time, what sdpa makes of them and of a mask."""
    monkeypatch.setattr("perce.model.prefill.PREFILL_CHUNK", 32)  # its mask would be most of a tiny model
    monkeypatch.setattr(rehearsal, "PREFILL_CHUNK", 32)
    layers, heads_kv, head = 6, 2, 8
    config = tiny_model("llama", num_hidden_layers=layers).config

    def peak(context, memory):
        return planned(config, memory, context=context, activation_checkpointing=True).memory.peak

    grown = peak(8000, NONE) - peak(7000, NONE)
    cache = 1000 * layers * 2 * heads_kv * head * 4
    assert cache <= grown <= 3 * cache
    assert peak(8000, MemoryConfig()) - peak(7000, MemoryConfig()) > grown


def test_tiles_hold_less_of_an_mlp():
    config = tiny_model("llama", intermediate_size=1024).config
    options = MemoryConfig(), MemoryConfig(mlp_tile=256)
    whole, tiled = (planned(config, memory, context=2000).memory for memory in options)
    assert tiled.peak < whole.peak / 2 and tiled.mlp < whole.mlp / 2
    assert tiled.attention == whole.attention


@pytest.mark.parametrize("memory", [MemoryConfig(), NONE], ids=["full", "none"])
def test_offloaded_checkpoints_are_in_host_memory(memory):
    config = tiny_model("llama", num_hidden_layers=12).config
    kept, freed = (
        planned(
            config, replace(memory, activation_offload=offload), "cuda", context=4000, activation_checkpointing=True
        )
        for offload in (False, True)
    )
    tokens, hidden = (3999 if memory.persona_grad == "full" else 23), 32
    offloaded = 10 * tokens * hidden * 4  # a layer's input each; two are on their way
    assert freed.memory.offloaded == offloaded and kept.memory.offloaded == 0
    for phase in ("head", "last layer"):  # in the first layer's backward those of the others are gone
        sizes = [sum(plan.memory.phases[phase].values()) for plan in (kept, freed)]
        assert sizes[0] - sizes[1] == offloaded


@pytest.mark.parametrize("memory", [MemoryConfig(), NONE, TILED], ids=["full", "none", "tiled"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_torch_counts(memory, checkpointing):
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
            kept, prefix = torch.arange(shape.prefix, shape.tokens), torch.tensor([[shape.prefix, shape.tokens]])
            hidden = hidden_after_prefix(base.base_model, kept, prefix, ids)
        else:
            hidden = base.base_model(input_ids=ids, use_cache=False)[0]
        hidden.sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    # The first layer's input needs no gradient, and what is not recomputed of an adapter is not told apart.
    assert counted == pytest.approx(ours.cross_entropy - ours.head, rel=0.06)


@pytest.mark.parametrize("memory", [MemoryConfig(), NONE], ids=["full", "none"])
def test_flash_attention_has_no_mask_for_windows(memory):
    config = tiny_model("gemma3").config  # a window of 16 tokens

    def grown(attention):
        model = replace(LORA, attn_implementation=attention)
        peaks = [
            step_cost(config, PlanOptions(model, replace(SHORT, context=context), memory), "cpu").memory.peak
            for context in (3096, 4120, 5144)  # whole chunks of the prefill apart
        ]
        return peaks[1] - peaks[0], peaks[2] - peaks[1]

    first, second = grown("flash_attention_2")
    assert first == pytest.approx(second, rel=0.02), "a straight line"
    first, second = grown("sdpa")
    assert (second > 1.1 * first) == (memory == MemoryConfig()), "T × T, where T tokens are queries"


def test_documents_are_planned_with_their_windows():
    plan = replace(SHORT, context=100, objective="longce", short_context=24, short_stride=8)
    piece = DocumentPair(list(range(100)), short_windows(100, 24, 8), 99, [False] * 99)
    batch = collate([vars(piece)])
    shape = shape_of(plan)
    assert (shape.batch, shape.tokens) == tuple(batch["input_ids"].shape)
    assert (shape.sequences_cf, shape.tokens_cf) == tuple(batch["input_ids_cf"].shape)
    assert shape.rows == batch["target"].numel()
    config = tiny_model("llama").config
    assert (
        planned(
            config, MemoryConfig(), objective="longce", context=400, short_context=64, short_stride=16
        ).flops.overhead
        > 0.5
    )


def test_every_option_has_a_line():
    config = PlanOptions(LORA, replace(SHORT, activation_checkpointing=True))
    on = {"--persona_grad none", "--mlp_tile 1024", "--activation_offload true", "--activation_checkpointing false"}
    assert on <= {flags for flags, _ in variants(config, "cuda")}
    assert "--activation_offload true" not in {flags for flags, _ in variants(config, "cpu")}
    options = MemoryConfig(persona_grad="none", mlp_tile=8, activation_offload=True)
    changed = dict(variants(replace(config, memory=options), "cuda"))
    assert {"--persona_grad full", "--mlp_tile 0", "--activation_offload false"} <= set(changed)
    assert not changed["--activation_checkpointing false"].memory.activation_offload


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--persona_grad none --objective longce", "--persona_grad none: needs a persona"),
        ("--persona_grad none --devices 2 --sharding full", "--sharding full: do not work together"),
        ("--activation_offload --device cuda --tflops 1", "Expected --activation_checkpointing and --device cuda"),
        ("--activation_offload --activation_checkpointing --device cpu", "Expected --activation_checkpointing and"),
        ("--objective longce --context 1", "context: expected >= 2"),
        ("--short_stride 0", "short_stride: expected >= 1"),
    ],
)
def test_options_that_do_not_go_together(flags, message, tmp_path, capsys):
    tiny_model("llama").config.save_pretrained(tmp_path)
    assert command.main(["--model", str(tmp_path), *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_variant_that_the_architecture_cannot_do_is_left_out(monkeypatch):
    config = tiny_model("llama").config

    def refuse(*_):
        raise UserError("not this one")

    monkeypatch.setattr("perce.planning.rehearsal.prepare_memory", refuse)
    assert list(plans.planned_variants(config, PlanOptions(LORA, SHORT), "cpu")) == []
