"""The largest context that fits, and what each option changes."""

from dataclasses import replace

import pytest

from perce import MemoryConfig, UserError
from perce import plan as command
from perce.config.commands import PlanOptions
from perce.config.schema import ModelConfig
from perce.config.step import StepConfig
from perce.model.branches import sharing_of
from perce.model.loading import resolve_precision
from perce.model.patch import prepare_model
from perce.planning import plans
from perce.planning.plans import Costs, largest, largest_context, variants
from tests.helpers.architectures import tiny
from tests.helpers.plans import FULL, LORA, SHORT
from tests.helpers.tiny import LAYERS, tiny_model


@pytest.mark.parametrize("peak", [lambda x: 7 * x, lambda x: max(100 * x, x * x), lambda x: 10_000 + x // 3])
@pytest.mark.parametrize("budget", [0, 700, 10_100, 123_456, 10**9])
def test_largest_is_maximal(peak, budget):
    found = largest(peak, 3, 5000, budget)
    assert found == max((x for x in range(3, 5001) if peak(x) <= budget), default=0)


def test_largest_context_is_maximal():
    config = tiny_model("llama").config
    costs = Costs(config, "cuda")

    def options(**changes):
        return PlanOptions(FULL, replace(SHORT, **changes))

    def peak(context):
        return costs.peak(options(context=context))

    budget = peak(2000)
    found = largest_context(config, options(gpu_memory=f"{budget / 2**20:.6f}MiB"), costs)
    assert found is not None and abs(found - 2000) <= 1
    assert peak(found) <= budget + 1 and peak(found + 1) > budget - 1
    assert largest_context(config, options(gpu_memory="1MiB"), costs) == 0
    assert largest_context(config, options(gpu_memory="100TB"), costs) == 8192


@pytest.mark.slow
def test_a_model_is_counted_once_for_all_its_steps(monkeypatch, tmp_path):
    """It is built whole for that, which takes about as long as the rehearsal of a step."""
    tiny_model("llama").config.save_pretrained(tmp_path)
    counted, count = [], plans.count
    monkeypatch.setattr(plans, "count", lambda config, setup: counted.append(setup) or count(config, setup))
    model, step = replace(LORA, model=str(tmp_path)), replace(SHORT, device="cuda", gpu_memory="2GiB", tflops=1)
    made = plans.make_plan(PlanOptions(model, step))
    assert made.largest_context and made.command and len(made.variants) > 5
    assert len(counted) == len({(setup.model, setup.low_precision) for setup in counted})


def test_every_option_has_a_line():
    config = PlanOptions(LORA, replace(SHORT, activation_checkpointing=True))
    on = {"--persona_grad none", "--mlp_tile 1024", "--activation_offload true", "--activation_checkpointing false"}
    assert on <= {flags for flags, _ in variants(config, "cuda")}
    assert "--activation_offload true" not in {flags for flags, _ in variants(config, "cpu")}
    options = MemoryConfig(persona_grad="none", mlp_tile=8, activation_offload=True)
    changed = dict(variants(replace(config, memory=options), "cuda"))
    assert {"--persona_grad full", "--mlp_tile 0", "--activation_offload false"} <= set(changed)
    assert not changed["--activation_checkpointing false"].memory.activation_offload


def test_replies_that_share_have_lines_of_their_own():
    step = replace(SHORT, replies=3, branches=True, per_device_train_batch_size=6)
    changed = dict(variants(PlanOptions(LORA, step), "cpu"))
    alone, fewer = changed["--share none"].step, changed["--per_device_train_batch_size 3"].step
    assert (alone.replies, alone.branches, alone.per_device_train_batch_size) == (1, False, 6)
    assert (fewer.replies, fewer.per_device_train_batch_size, fewer.gradient_accumulation_steps) == (3, 3, 2)


def test_training_all_weights_is_another_option_whatever_the_adapter():
    model = ModelConfig(lora_alpha=8, lora_dropout=0.1)
    assert "--lora_r 0" in {flags for flags, _ in variants(PlanOptions(model, StepConfig()), "cpu")}


def test_documents_have_neither_query_nor_persona():
    """All tokens of a document are the response; cross-entropy is planned on a row with a persona, another step."""
    step = StepConfig(context=60, objective="longce", short_context=16, short_stride=4)
    flags = {flags for flags, _ in variants(PlanOptions(LORA, step), "cpu")}
    assert "--mlp_tile 1024" in flags and not {"--objective ce", "--persona_grad none"} & flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--persona_grad none --objective longce", "--persona_grad none: needs a persona"),
        ("--persona_grad none --devices 2 --sharding full", "--sharding full: do not work together"),
        ("--activation_offload --device cuda --tflops 1", "Expected --activation_checkpointing and --device cuda"),
        ("--activation_offload --activation_checkpointing --device cpu", "Expected --activation_checkpointing and"),
        ("--objective longce --context 1", "context: expected >= 2"),
        ("--short_stride 0", "short_stride: expected >= 1"),
        (
            "--replies 3 --per_device_train_batch_size 4",
            "per_device_train_batch_size: expected a multiple of the 3 --re",
        ),
        ("--replies 3 --per_device_train_batch_size 1", "expected a multiple of the 3 --replies, got 1"),
        ("--share_persona 4 --per_device_train_batch_size 1", "a multiple of --share_persona, which is 4, got 1"),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps: expected >= 1, got 0"),
        ("--replies 0", "replies: expected >= 1"),
        ("--branches", "branches: expected --replies above 1 with it, got 1"),
        ("--replies 2 --objective longce", "replies: expected 1 for documents, got 2"),
        (
            "--replies 8 --per_device_train_batch_size 8 --context 100 --query 8 --response 8",
            "context: expected >= 129 (8 x (query + response) + a persona), got 100",
        ),
        ("--objective ce --estimate epoch", "estimate: expected online with --objective ce, whose weights are 1"),
        ("--context 15 --query 4 --response 4", "context: expected >= 16"),
        ("--objective longce --query 9", "query: expected 128 for documents, got 9"),
        ("--objective longce --response 9", "response: expected 512 for documents, got 9"),
        ("--short_stride 8", "short_stride: expected 1024 for rows with a persona, got 8"),
        ("--objective ce --short_context 8", "short_context: expected 4096 for rows with a persona, got 8"),
    ],
)
def test_options_that_do_not_go_together(flags, message, tmp_path, capsys):
    tiny_model("llama").config.save_pretrained(tmp_path)
    assert command.main(["--model", str(tmp_path), *flags.split()]) == 2
    assert message in capsys.readouterr().err


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024,
    "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
}  # fmt: skip


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
@pytest.mark.parametrize("shared", ["--replies 4", "--share_persona 4"])
def test_nothing_is_shared_where_positions_follow_the_length(rope, shared, tmp_path, capsys):
    """A run computes such sequences one by one: a plan that shares their tokens would be a third of its peak."""
    tiny_model("llama", rope_parameters=rope).config.save_pretrained(tmp_path)
    assert command.main(["--model", str(tmp_path), *shared.split()]) == 2
    assert f"{shared}: the position encoding of llama depends on the length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("architecture", "rope"), [("llama", DYNAMIC), ("gemma3", dict.fromkeys(LAYERS, DYNAMIC))], ids=["one", "by layer"]
)
def test_dynamic_encodings_are_planned_as_those_of_fixed_frequencies(architecture, rope):
    """Within the positions that the model has, beyond which neither a run nor a plan goes, they are the same."""
    options = PlanOptions(FULL, SHORT)
    dynamic, fixed = tiny_model(architecture, rope_parameters=rope), tiny_model(architecture)
    assert Costs(dynamic.config, "cpu").of(options) == Costs(fixed.config, "cpu").of(options)


@pytest.mark.parametrize("architecture", ["qwen3_5_text", "gpt_neo", "mpt", "bart", "falcon"])
def test_branches_are_not_planned_where_a_run_has_none(architecture):
    """Layers that read the whole row, or that count positions in their own way. Replies alone can share as chains."""
    config = tiny(architecture).config
    reason = sharing_of(prepare_model(tiny(architecture)))[1].partition(":")[0].partition(",")[0]
    assert "on branches" in reason
    plans.check_positions(config, PlanOptions(LORA, replace(SHORT, replies=2)))
    for step, memory, option in (
        (replace(SHORT, replies=2, branches=True), MemoryConfig(), "--branches"),
        (SHORT, MemoryConfig(share_persona=4), "--share_persona 4"),
    ):
        with pytest.raises(UserError, match=f"^{option}: {reason}"):
            plans.check_positions(config, PlanOptions(LORA, step, memory))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "phi3", "deepseek_v2"])
def test_branches_are_planned_where_a_run_has_them(architecture):
    config, branching = tiny(architecture).config, replace(SHORT, replies=2, branches=True)
    assert sharing_of(prepare_model(tiny(architecture))) == ("branches", "")
    plans.check_positions(config, PlanOptions(LORA, branching))


def test_what_is_shared_is_asked_of_few_weights(monkeypatch):
    """As many as a large model has would take gigabytes."""
    config, asked = tiny("llama").config, []
    config.vocab_size, config.intermediate_size, config.num_hidden_layers = 10**8, 10**8, 10**4
    monkeypatch.setattr(plans, "sharing_of", lambda model: asked.append(model) or ("branches", ""))
    plans.check_positions(config, PlanOptions(LORA, SHORT))
    assert not asked, "nothing is to be shared"
    plans.check_positions(config, PlanOptions(LORA, replace(SHORT, replies=2)))
    experts = tiny("qwen3_moe").config
    experts.moe_intermediate_size = 10**8
    plans.check_positions(experts, PlanOptions(LORA, replace(SHORT, replies=2)))
    assert all(sum(weight.numel() for weight in model.parameters()) < 10**5 for model in asked)


@pytest.mark.parametrize(("there", "native", "low"), [(True, True, True), (True, False, False), (False, False, True)])
def test_precision_is_that_of_a_run_on_this_gpu(there, native, low, monkeypatch):
    """Volta and Turing have no native bf16. Where no GPU is, a recent one is meant."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: native)
    assert plans.is_low_precision(ModelConfig(), "cuda") == low
    assert not there or (resolve_precision("auto", "cuda") == "bf16") == low
    lines = {x: dict(variants(PlanOptions(replace(LORA, precision=x), SHORT), "cuda")) for x in ("auto", "fp32")}
    assert ("--precision fp32" in lines["auto"]) == ("--precision bf16" in lines["fp32"]) == low
    assert "--precision bf16" not in lines["auto"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bf16_that_a_run_here_refuses_is_not_planned(device, monkeypatch):
    """Emulated products are slower than the steps made of them, so a plan's least time would be above the real one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: device == "cuda")
    monkeypatch.setattr(plans, "bf16_is_sound", lambda device: False)
    options = PlanOptions(replace(LORA, precision="bf16"), SHORT)
    with pytest.raises(UserError, match=f"--precision bf16: this {device} has no native bf16.*--device cuda --gpu_mem"):
        plans.check_options(options, device)
    plans.check_options(replace(options, step=replace(SHORT, gpu_memory="80GiB")), "cuda")  # of another GPU


def test_a_variant_that_the_architecture_cannot_do_is_left_out(monkeypatch):
    config = tiny_model("llama").config

    def refuse(*_):
        raise UserError("not this one")

    monkeypatch.setattr("perce.planning.building.prepare_memory", refuse)

    assert list(plans.planned_variants(PlanOptions(LORA, SHORT), "cpu", Costs(config, "cpu").of)) == []


def test_a_conversation_is_planned_by_its_replies_alone():
    step = StepConfig(replies=8, query=16, response=16)
    assert (step.batch, step.sequences, step.forwards) == (8, 1, 1)
