"""perce.plan: exact counts, rehearsals that carry on to any depth, the largest context, JSON, errors."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig, MixtralConfig, T5Config

from perce import plan as command
from perce.config.commands import PlanOptions
from perce.config.schema import ModelConfig, StepConfig
from perce.model.loading import add_adapter, lora_config
from perce.model.memory import enable_checkpointing
from perce.model.patch import prepare_model
from perce.planning import plans
from perce.planning.flops import count_flops
from perce.planning.memory import UPDATE, count, loss_buffers, shape_of
from perce.planning.plans import largest, largest_context, step_cost, variants
from perce.planning.rehearsal import Setup, StepShape, cut, rehearse, rehearse_depth
from tests.tiny import ARCHITECTURES, LAYERS, tiny_model

FULL, LORA = ModelConfig(lora_r=0, precision="fp32"), ModelConfig(lora_r=4, precision="fp32")
SHORT = StepConfig(context=96, query=8, response=16, gradient_accumulation_steps=1)
SCHEMA = {
    "options", "device", "precision", "counts", "memory", "flops", "least_seconds", "matmul_flops_per_second",
    "largest_context", "variants",
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama-tied").config.save_pretrained(path)
    return path


@pytest.fixture
def run(directory, capsys):
    def run(*argv, code=0):
        fixed = ["--model", directory, "--context", 96, "--query", 8, "--response", 16, "--tflops", 1]
        assert command.main([*map(str, [*fixed, *argv])]) == code
        return capsys.readouterr()

    return run


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


@pytest.mark.parametrize(
    ("options", "low", "checkpointing"),
    [
        (FULL, False, False),
        pytest.param(FULL, True, True, marks=pytest.mark.slow),
        pytest.param(LORA, True, True, marks=pytest.mark.slow),
    ],
)
def test_a_few_layers_tell_what_all_take(options, low, checkpointing):
    kinds = [LAYERS[0]] * 2 + [LAYERS[1]] + [LAYERS[0]] * 2
    config = tiny_model("gemma3", num_hidden_layers=5, layer_types=kinds).config
    setup = Setup(options, low, checkpointing)
    shape = StepShape(batch=2, tokens=70, tokens_cf=20, rows=9, accumulates=False)
    assert rehearse(config, setup, shape) == rehearse_depth(config, setup, shape)


def test_gradients_of_earlier_forwards_stay():
    config = tiny_model("llama").config
    trained = 4 * count(config, Setup(FULL, False, False)).trained
    for accumulates in (False, True):
        phases = rehearse(config, Setup(FULL, False, False), StepShape(1, 40, 10, 5, accumulates)).phases
        assert phases["forward"].peak.gradients == trained * accumulates
        assert phases["counterfactual"].start.gradients == trained * accumulates


def test_memory_is_linear_in_context_and_falls_with_checkpointing():
    config = tiny_model("llama", num_hidden_layers=2).config

    def peak(context=1025, model=FULL, **changes):
        options = replace(SHORT, context=context, **changes)
        return step_cost(config, PlanOptions(model, options), "cpu").memory.peak

    first, second, third = peak(), peak(2049), peak(4096)
    assert first < second < third
    assert third - second == pytest.approx(2 * (second - first), rel=2e-3), "nothing is T × T"
    assert peak(2049, replace(FULL, attn_implementation="eager")) > 3 * second
    assert peak(activation_checkpointing=True) < first
    assert peak(per_device_train_batch_size=2) > 1.7 * first


def test_objective_and_devices():
    config = tiny_model("llama").config

    def parts(**changes):
        return step_cost(config, PlanOptions(FULL, replace(SHORT, **changes)), "cpu").memory.phases

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


def test_the_torch_backend_on_a_gpu_holds_chunks_as_on_a_cpu():
    config = tiny_model("llama", vocab_size=49152).config
    setup, shape = Setup(replace(FULL, backend="torch"), False, False), StepShape(1, 5000, 500, 4000, False)
    counts, chunk = count(config, setup), 64 * 2**20 // (49152 * 4)
    assert loss_buffers(config, setup, shape, counts, "cuda") == chunk * (49152 + 32) * 4
    low = loss_buffers(config, replace(setup, low_precision=True), shape, counts, "cuda")
    assert low == chunk * (49152 + 32) * 4 + chunk * 49152 * 2, "dz in 16 bits beside the logits"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reference_holds_logits_of_the_response(precision):
    """The formula's own tensors: exp, products and log-probabilities of the response tokens, all at once."""
    config = tiny_model("llama", vocab_size=9000).config
    plan = StepConfig(context=300, query=20, response=200, gradient_accumulation_steps=1, device="cuda")

    def planned(backend):
        model = replace(LORA, backend=backend, precision=precision)
        return PlanOptions(model, plan), step_cost(config, PlanOptions(model, plan), "cpu").memory

    logits = 200 * 9000 * 4
    (named, held), (_, chunks) = planned("reference"), planned("torch")
    assert 4 * logits < held.phases["head"]["working set"] < 4.6 * logits > chunks.peak
    assert held.phases["last layer"]["activations"] > logits, "what its backward needs"
    assert held.phases["head"]["loss buffers"] == 0 < chunks.phases["head"]["loss buffers"]
    assert set(held.logits_not_held) == {"of all tokens"}
    assert "--backend torch" in dict(variants(named, "cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-full-bf16-1024-ce", "gemma3-lora-bf16-1024"])
def test_real_steps_take_what_was_planned(name):
    """Two of those that benchmarks/test_plan.py measures."""
    from benchmarks.step_memory import measured
    from benchmarks.test_plan import SPECS, planned

    assert planned(SPECS[name]).memory.peak == pytest.approx(measured(SPECS[name])["peak_bytes"], rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_torch_counts(checkpointing):
    """Products only: torch's counter does not know the CPU's attention, nor the inside of the loss."""
    model = prepare_model(tiny_model("llama")).train()
    plan = replace(SHORT, objective="ce", activation_checkpointing=checkpointing)
    setup = Setup(FULL, False, checkpointing)
    ours = count_flops(model.config, setup, plan, count(model.config, setup))
    attention = ours.forward - 2 * shape_of(plan).tokens * count(model.config, setup).linear
    if checkpointing:
        enable_checkpointing(model)
    ids = torch.zeros(1, shape_of(plan).tokens, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter:
        model.base_model(input_ids=ids, use_cache=False)[0].sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    assert counted == ours.cross_entropy - ours.head - attention * (3 + checkpointing)


def test_attention_sees_a_window():
    config = tiny_model("gemma3").config  # one layer sees 16 tokens, one all
    setup = Setup(LORA, False, False)
    both = count_flops(config, setup, SHORT, count(config, setup))
    linear = 2 * 95 * (count(config, setup).linear + count(config, setup).adapter)
    pairs = 95 * 96 // 2 + 16 * 17 // 2 + (95 - 16) * 16
    assert both.forward == linear + 4 * 4 * 8 * pairs
    assert 0 < both.overhead < 1


@pytest.mark.parametrize("peak", [lambda x: 7 * x, lambda x: max(100 * x, x * x), lambda x: 10_000 + x // 3])
@pytest.mark.parametrize("budget", [0, 700, 10_100, 123_456, 10**9])
def test_largest_is_maximal(peak, budget):
    found = largest(peak, 3, 5000, budget)
    assert found == max((x for x in range(3, 5001) if peak(x) <= budget), default=0)


def test_largest_context_is_maximal():
    config = tiny_model("llama").config
    options = PlanOptions(FULL, replace(SHORT, context=2000))
    budget = step_cost(config, options, "cuda").memory.peak
    found = largest_context(config, PlanOptions(FULL, replace(SHORT, gpu_memory=f"{budget / 2**20:.6f}MiB")), "cuda")

    def peak(context):
        return step_cost(config, PlanOptions(FULL, replace(SHORT, context=context)), "cuda").memory.peak

    assert found is not None and abs(found - 2000) <= 1
    assert peak(found) <= budget + 1 and peak(found + 1) > budget - 1
    assert largest_context(config, PlanOptions(FULL, replace(SHORT, gpu_memory="1MiB")), "cuda") == 0
    assert largest_context(config, PlanOptions(FULL, replace(SHORT, gpu_memory="100TB")), "cuda") == 8192


def test_table_and_json(run, tmp_path):
    path = tmp_path / "plan.json"
    flags = "--lora_r 0 --per_device_train_batch_size 2 --device cpu --precision fp32 --gradient_accumulation_steps 1"
    out = run(*flags.split(), "--json", path).out
    content = json.loads(path.read_text(encoding="utf-8"))
    assert set(content) == SCHEMA
    memory = content["memory"]
    assert memory["peak"] == sum(memory["parts"].values()) == max(sum(x.values()) for x in memory["phases"].values())
    assert content["least_seconds"] == content["flops"]["total"] / 1e12
    assert memory["logits_not_held"] == {"of the response tokens": 32 * 400 * 4, "of all tokens": 2 * 95 * 400 * 4}
    assert content["options"]["context"] == 96 and content["largest_context"] is None
    assert set(content["variants"]) == {
        "--activation_checkpointing true", "--lora_r 16", "--precision bf16", "--per_device_train_batch_size 1",
        "--objective ce", "--persona_grad none", "--mlp_tile 1024",
    }  # fmt: skip
    for text in ("working set", "peak memory", "takes at least", "not there: logits", *content["variants"]):
        assert text in out


def test_device_memory_decides_on_cuda(run, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(plans, "variants", lambda options, device: [])
    out = run("--gpu_memory", "80GiB").out
    assert "device cuda" in out and "80.00 GiB: enough" in out and "8,192 tokens" in out and "CUDA context" in out


def test_help_needs_no_torch():
    code = (
        "import sys; from perce import plan\n"
        "try: plan.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--gpu_memory" in child.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--context", 8193], "--context 8193: the model has positions for 8192 tokens"),
        (["--context", 20], "context: expected >= 25 (query + response + a persona), got 20"),
        (["--gpu_memory", "139"], "gpu_memory: expected a size with its unit, such as 80GiB or 24GB, got '139'"),
        (["--gpu_memory", "many GiB"], "gpu_memory: expected a size"),
        (["--gpu_memory", "80GiB", "--device", "cpu"], "gpu_memory: expected --device cuda"),
        (["--sharding", "full"], "sharding: expected none with one device"),
        (["--devices", 0], "devices: expected >= 1"),
        (["--tflops", -1], "tflops: expected > 0"),
        (["--load_in_4bit"], "--load_in_4bit: plans of quantised models are not made"),
        (["--contexts", 3], "contexts: unknown option. Did you mean context"),
        (["--model", "/nowhere"], "--model /nowhere: no such directory"),
    ],
)
def test_mistakes_are_named(run, flags, message):
    assert message in run(*flags, code=2).err


def test_a_training_recipe_is_planned(run, directory, tmp_path, capsys):
    recipe = {"max_length": 300, "lora_r": 0, "weight_decay": 0.1, "data": "rows.jsonl", "objective": "lossce"}
    recipe |= {"per_device_train_batch_size": None, "tokens_per_batch": 900}  # as a run saves it
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    flags = ["--query", "8", "--response", "16", "--tflops", "1", "--model", str(directory), "--json"]
    assert command.main(["--config", str(tmp_path / "recipe.yaml"), *flags, str(tmp_path / "a.json")]) == 0
    out, err = capsys.readouterr()
    assert "not used here: data, tokens_per_batch, weight_decay" in err
    assert "lossce objective" in out and "counterfactual" not in out, "what was asked for, planned as it is run"
    asked = run("--context", 300, "--lora_r", 0, "--objective", "ce", "--json", tmp_path / "b.json").out
    first, second = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("a.json", "b.json"))
    assert first["memory"] == second["memory"] and first["variants"] == second["variants"]
    assert "counterfactual pass" not in asked and "--objective" not in asked
    (tmp_path / "recipe.yaml").write_text("weight_dekay: 0.1\n", encoding="utf-8")
    assert "weight_dekay: unknown option" in run("--config", tmp_path / "recipe.yaml", code=2).err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "PerCE needs a decoder-only model, and t5 has an encoder"),
        (MixtralConfig(num_hidden_layers=2), "mixtral has a mixture of experts. Only dense models are planned"),
        ({"model_type": "llama", "hidden_size": 64}, "num_hidden_layers is missing from its config.json"),
        ({"hidden_size": 64}, "could not be loaded as a causal language model"),
    ],
)
def test_models_that_cannot_be_planned_are_named(run, tmp_path, config, message):
    if isinstance(config, dict):
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    else:
        config.save_pretrained(tmp_path)
    assert message in run("--model", tmp_path, code=2).err


def test_other_names_for_the_same_sizes():
    """GPT-2 calls its sizes and layers otherwise, and its matrices are no nn.Linear."""
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=3, n_head=4, n_positions=256)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    plan = step_cost(config, PlanOptions(FULL, SHORT), "cpu")
    assert plan.counts.linear == 3 * 12 * 32 * 32
    assert plan.memory.attention > 0 and plan.memory.mlp > 0


def test_per_layer_lists_are_cut():
    config = cut(LlamaConfig(num_hidden_layers=4, no_rope_layers=list("abcd")), [0, 2, 3])
    assert config.num_hidden_layers == 3 and config.no_rope_layers == list("acd")
