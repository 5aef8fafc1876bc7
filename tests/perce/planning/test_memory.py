"""Peak memory: exact counts, parts by phase, loss buffers."""

from dataclasses import asdict, replace

import pytest
from transformers import GPT2Config

from perce import MemoryConfig
from perce.config.commands import PlanOptions
from perce.config.schema import ModelConfig
from perce.config.step import StepConfig
from perce.model.loading import add_adapter, lora_config
from perce.planning import rehearsal
from perce.planning.building import Setup
from perce.planning.memory import UPDATE, count, loss_buffers
from perce.planning.plans import Costs, variants
from perce.planning.shapes import StepShape
from tests.helpers.plans import FULL, LORA, NONE, SHORT, TALK, TREE
from tests.helpers.tiny import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_counts_are_those_of_the_real_model(architecture, rank):
    model = tiny_model(architecture)
    options = ModelConfig(lora_r=rank)
    counts = count(model.config, Setup(options, False, False))
    real = add_adapter(model, lora_config(options)) if rank else model
    assert counts.parameters == sum(p.numel() for p in real.parameters())
    assert counts.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert counts.weight_bytes == sum(x.numel() * x.itemsize for x in [*real.parameters(), *real.buffers()])
    assert (counts.vocabulary, counts.hidden) == tuple(real.get_output_embeddings().weight.shape)


def test_memory_is_linear_in_context_and_falls_with_checkpointing():
    config = tiny_model("llama", num_hidden_layers=2).config

    def peak(context=1025, model=FULL, **changes):
        options = replace(SHORT, context=context, **changes)
        return Costs(config, "cpu").of(PlanOptions(model, options)).memory.peak

    first, second, third = peak(), peak(2049), peak(4096)
    assert first < second < third
    assert third - second == pytest.approx(2 * (second - first), rel=2e-3), "nothing is T × T"
    assert peak(2049, replace(FULL, attn_implementation="eager")) > 3 * second
    assert peak(activation_checkpointing=True) < first
    assert peak(per_device_train_batch_size=2) > 1.7 * first


def test_objective_and_devices():
    config = tiny_model("llama").config

    def parts(**changes):
        return Costs(config, "cpu").of(PlanOptions(FULL, replace(SHORT, **changes))).memory.phases

    both, ce = parts(), parts(objective="ce")
    assert "counterfactual" in both and "counterfactual" not in ce
    assert both[UPDATE]["optimiser states"] == 2 * both[UPDATE]["gradients"]
    ddp, fsdp = parts(devices=4), parts(devices=4, sharding="full")
    assert ddp[UPDATE]["gradient buckets"] == both[UPDATE]["gradients"] == 4 * fsdp[UPDATE]["gradients"]
    assert 4 * fsdp[UPDATE]["optimiser states"] == both[UPDATE]["optimiser states"]
    assert fsdp["forward"]["gathered weights"] > 0


def test_loss_buffers_follow_the_op():
    config = tiny_model("llama", vocab_size=49152).config
    setup, shape = Setup(FULL, False, False), StepShape(1, 5000, 500, 4000, False)
    counts = count(config, setup)
    chunk = 64 * 2**20 // (49152 * 4)
    assert loss_buffers(config, setup, shape, counts, "cpu") == chunk * (49152 + 32) * 4
    low = loss_buffers(config, replace(setup, low_precision=True), shape, counts, "cpu")
    assert low == chunk * (49152 + 32) * 4 + (49152 + 2 * chunk) * 32 * 4
    pytest.importorskip("triton")
    from perce_kernels.gpu import cut

    size = loss_buffers(config, setup, shape, counts, "cuda")
    assert cut.BUDGET / 2 < size < cut.BUDGET + 4000 * 60


def test_the_torch_backend_on_a_gpu_holds_larger_chunks():
    config = tiny_model("llama", vocab_size=49152).config
    setup, shape = Setup(replace(FULL, backend="torch"), False, False), StepShape(1, 9000, 500, 8000, False)
    counts, chunk = count(config, setup), 2**30 // (49152 * 4)
    assert loss_buffers(config, setup, shape, counts, "cuda") == chunk * (49152 + 32) * 4
    low = loss_buffers(config, replace(setup, low_precision=True), shape, counts, "cuda")
    assert low == chunk * (49152 + 32) * 4 + chunk * 49152 * 2, "logits, and dz in 16 bits"


def test_a_gpu_that_the_kernels_do_not_support_takes_the_torch_backend(monkeypatch):
    """Turing, or a machine without triton: there a run takes it too."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("perce_kernels.gpu.tiles.is_supported", lambda device: False)
    config, shape = tiny_model("llama").config, StepShape(1, 50, 20, 16, False)
    chosen, named = (Setup(replace(FULL, backend=backend), False, False) for backend in ("auto", "torch"))
    counts = count(config, chosen)
    assert loss_buffers(config, chosen, shape, counts, "cuda") == loss_buffers(config, named, shape, counts, "cuda")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reference_holds_logits_of_the_response(precision):
    """The reference holds exp, products and log-probabilities of all response tokens at the same time."""
    config = tiny_model("llama", vocab_size=9000).config
    plan = StepConfig(context=300, query=20, response=200, gradient_accumulation_steps=1, device="cuda")

    def planned(backend):
        model = replace(LORA, backend=backend, precision=precision)
        return PlanOptions(model, plan), Costs(config, "cpu").of(PlanOptions(model, plan)).memory

    logits = 200 * 9000 * 4
    (named, held), (_, chunks) = planned("reference"), planned("torch")
    assert 4 * logits < held.phases["head"]["working set"] < 4.6 * logits > chunks.peak
    assert held.phases["last layer"]["activations"] > logits, "the backward needs the logits"
    assert held.phases["head"]["loss buffers"] == 0 < chunks.phases["head"]["loss buffers"]
    assert set(held.logits_not_held) == {"of all tokens"}
    assert "--backend torch" in dict(variants(named, "cuda"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "qwen3-full-bf16-1024-ce", "gemma3-lora-bf16-1024", "smollm2-lora-fp32-1024-8-replies",
        "qwen3-lora-fp32-1024-8-branches",
    ],
)  # fmt: skip
def test_real_steps_take_what_was_planned(name):
    """Some of the steps that benchmarks/test_plan.py measures."""
    from benchmarks.step_memory import measured
    from benchmarks.test_plan import SPECS, planned

    assert planned(SPECS[name]).memory.peak == pytest.approx(measured(SPECS[name])["peak_bytes"], rel=0.15)


def test_other_names_for_the_same_sizes():
    """GPT-2 has other names for its sizes and layers, and its matrices are not nn.Linear."""
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=3, n_head=4, n_positions=256)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    plan = Costs(config, "cpu").of(PlanOptions(FULL, SHORT))
    assert plan.counts.linear == 3 * 12 * 32 * 32
    assert plan.memory.parts["working set"] > 0


def planned(config, memory, device="cpu", **changes):
    return Costs(config, device).of(PlanOptions(FULL, replace(SHORT, **changes), memory))


@pytest.mark.slow
def test_what_grows_with_a_detached_persona_is_keys_and_values(monkeypatch):
    """In one layer at a time there are also the tensors that sdpa makes from them and from a mask."""
    monkeypatch.setattr("perce.model.prefill.PREFILL_CHUNK", 32)  # else the mask dominates
    monkeypatch.setattr(rehearsal, "PREFILL_CHUNK", 32)
    layers, heads_kv, head = 4, 2, 8
    config = tiny_model("llama", num_hidden_layers=layers).config

    def peak(context, memory):
        return planned(config, memory, context=context, activation_checkpointing=True).memory.peak

    grown = peak(2400, NONE) - peak(1400, NONE)
    cache = 1000 * layers * 2 * heads_kv * head * 4
    assert cache <= grown <= 3 * cache
    assert peak(2400, MemoryConfig()) - peak(1400, MemoryConfig()) > grown


def test_tiles_hold_less_of_an_mlp():
    config = tiny_model("llama", intermediate_size=1024).config
    options = MemoryConfig(), MemoryConfig(mlp_tile=256)
    whole, tiled = (planned(config, memory, context=2000).memory for memory in options)
    assert tiled.peak < whole.peak / 2


BY_ITSELF = MemoryConfig(branches_per_forward=1)


@pytest.mark.parametrize(
    ("memory", "tokens"),  # tokens that are kept from the forward to the backward
    [
        pytest.param(MemoryConfig(), 3999, id="full"),
        pytest.param(NONE, 23, id="none", marks=pytest.mark.slow),
        pytest.param(BY_ITSELF, 3999 - 23, id="by itself", marks=pytest.mark.slow),
    ],
)
def test_offloaded_checkpoints_are_in_host_memory(memory, tokens):
    config = tiny_model("llama", num_hidden_layers=12).config
    kept, freed = (
        planned(
            config, replace(memory, activation_offload=offload), "cuda", context=4000, activation_checkpointing=True
        )
        for offload in (False, True)
    )
    hidden = 32
    offloaded = 10 * tokens * hidden * 4  # one input per layer; two are in transfer
    assert freed.memory.offloaded == offloaded and kept.memory.offloaded == 0
    # In the first layer's backward, the inputs of the other layers are freed already.
    for phase in ("head", "persona's backward" if memory == BY_ITSELF else "last layer"):
        sizes = [sum(plan.memory.phases[phase].values()) for plan in (kept, freed)]
        assert sizes[0] - sizes[1] == offloaded


@pytest.mark.parametrize(
    "memory", [pytest.param(MemoryConfig(), id="full"), pytest.param(NONE, id="none", marks=pytest.mark.slow)]
)
def test_flash_attention_has_no_mask_for_windows(memory):
    config = tiny_model("gemma3").config  # a window of 16 tokens

    def grown(attention):
        model = replace(FULL, attn_implementation=attention)
        peaks = [
            Costs(config, "cpu").of(PlanOptions(model, replace(SHORT, context=context), memory)).memory.peak
            for context in (3096, 4120, 5144)  # they differ by whole chunks of the prefill
        ]
        return peaks[1] - peaks[0], peaks[2] - peaks[1]

    first, second = grown("flash_attention_2")
    assert first == pytest.approx(second, rel=0.02), "memory grows linearly"
    first, second = grown("sdpa")
    assert (second > 1.1 * first) == (memory == MemoryConfig()), "T × T masks if all T tokens are queries"


def test_the_windows_of_documents_cost_operations():
    config, windows = tiny_model("llama").config, {"short_context": 64, "short_stride": 16}
    assert planned(config, MemoryConfig(), objective="longce", context=400, **windows).flops.overhead > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_requests_take_less_together_and_least_one_by_one(checkpointing):
    config = tiny_model("qwen3").config
    step = StepConfig(
        context=900, query=16, response=16, per_device_train_batch_size=4, activation_checkpointing=checkpointing
    )

    def peak(requests=1, **memory):
        options = MemoryConfig(share_persona=4, **memory) if requests == 4 else MemoryConfig(**memory)
        of = replace(step, per_device_train_batch_size=requests) if requests == 1 else step
        return Costs(config, "cpu").of(PlanOptions(ModelConfig(), of, options))

    one, batched = peak(), Costs(config, "cpu").of(PlanOptions(ModelConfig(), step, MemoryConfig()))
    together, one_by_one = peak(4), peak(4, branches_per_forward=1)
    assert one_by_one.memory.peak < together.memory.peak < 0.5 * batched.memory.peak
    assert one_by_one.memory.peak < 1.3 * one.memory.peak
    assert together.flops.total < one_by_one.flops.total < 0.5 * batched.flops.total
    detached = peak(4, persona_grad="none")
    assert detached.flops.total < together.flops.total and detached.memory.peak < together.memory.peak


def test_replies_that_share_take_less():
    config = tiny_model("qwen3").config
    step = replace(TALK, context=600)
    separate = planned(config, MemoryConfig(), **asdict(replace(step, replies=1)))
    chain, tree = (planned(config, MemoryConfig(), **asdict(replace(step, branches=on))) for on in (False, True))
    assert 2.5 * chain.memory.peak < separate.memory.peak and chain.memory.peak < tree.memory.peak
    assert 1.3 * tree.memory.peak < separate.memory.peak, "a branch holds the keys and values that it reads"


def test_a_conversation_behind_a_persona_without_a_gradient_is_planned():
    assert planned(tiny_model("llama").config, NONE, **asdict(TALK)).memory.peak > 0


def test_flash_attention_has_no_mask_for_branches():
    config = tiny_model("qwen3").config
    peaks = [
        Costs(config, "cpu").of(PlanOptions(replace(FULL, attn_implementation=name), TREE)).memory.phases["forward"]
        for name in ("flash_attention_2", "sdpa")
    ]
    assert peaks[0]["working set"] < peaks[1]["working set"]
