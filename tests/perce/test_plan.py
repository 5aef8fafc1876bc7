"""perce.plan: table and JSON, devices, training recipes, mistakes."""

import json
from dataclasses import replace

import pytest
import yaml
from transformers import MixtralConfig, T5Config

from perce import plan as command
from perce.planning import plans
from perce.planning.device import GIB
from tests.helpers.architectures import CONFIGS, tiny, tiny_config
from tests.helpers.tiny import tiny_model
from tests.helpers.training import printed_by

SCHEMA = {
    "kind", "options", "device", "precision", "counts", "memory", "flops", "least_seconds", "matmul_flops_per_second",
    "largest_context", "variants", "memory_available", "fits", "command",
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama-tied").config.save_pretrained(path)
    return path


@pytest.fixture
def run(directory, capsys, monkeypatch):
    """The command without its search for what fits, which rehearses many steps; monkeypatch.undo() brings it back."""
    monkeypatch.setattr(plans, "_command", lambda *_: (None, ""))
    fixed = ["--model", directory, "--context", 96, "--query", 8, "--response", 16, "--tflops", 1]
    return printed_by(command.main, capsys, *fixed)


def test_table_and_json(run, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(plans, "bf16_is_sound", lambda device: True)  # else there is no bf16 to plan with
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
    assert content["fits"] and content["memory_available"] > memory["peak"], "of this machine"
    first = out.splitlines()[0]
    assert first.startswith("fits    ") and "GiB" in first and content["command"] in out.splitlines()[1]
    phases = out[out.index("GiB  ") : out.index("what an option")].splitlines()
    assert max(map(len, phases)) <= 80 and "…" not in out
    for text in ("working set", "peak memory", "takes at least", "never held: logits", *content["variants"]):
        assert text in out


def test_a_conversation_is_told(run, tmp_path, monkeypatch):
    own = plans.variants
    monkeypatch.setattr(plans, "variants", lambda *given: [each for each in own(*given) if each[0] == "--share none"])
    flags = "--replies 3 --per_device_train_batch_size 6 --device cpu --precision fp32 --branches --json".split()
    out = run(*flags, tmp_path / "plan.json").out
    assert "1 forward of 6 replies in 2 × 96 tokens (24 persona, 3 replies of 8 query, 16 response" in " ".join(
        out.split()
    )
    assert "250 are computed" in " ".join(out.split())
    content = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert content["flops"]["tokens"] == 2 * (95 + 2 * 15) and content["options"]["replies"] == 3
    assert content["variants"]["--share none"]["flops"]["tokens"] == 6 * 95


def test_what_does_not_fit_is_said_first(run, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(plans, "variants", lambda options, device: [])
    monkeypatch.setattr(plans, "largest_context", lambda *_: 0)
    out = run("--gpu_memory", "1GiB").out
    assert out.startswith("too much  ") and "more than the 1.00 GiB (--gpu_memory)" in out
    assert "python -m perce.train" not in out and "no combination of options tried here" in out


@pytest.fixture
def said(run, monkeypatch):
    """The first lines of a plan for 100 GiB, where each way takes peak(options) GiB and all have the same work."""
    monkeypatch.undo()
    monkeypatch.setattr(plans, "variants", lambda options, device: [])
    monkeypatch.setattr(plans, "available", lambda *_: 100 * GIB)
    monkeypatch.setattr(plans.Costs, "work", lambda *_: 1)
    cost_of, costs = plans.Costs._of, {}

    def verdict(peak, device="cpu", *flags):
        def cost(self, options):
            found = costs["any"] = costs.get("any") or cost_of(plans.Costs(self._config, "cpu"), options)
            part = replace(found.memory, phases={"forward": {"activations": int(peak(options) * GIB)}})
            return replace(found, memory=part)

        monkeypatch.setattr(plans.Costs, "_of", cost)
        return run("--device", device, *flags).out.split("\n\n")[0].splitlines()

    return verdict


def test_what_fits_closely_has_a_command_that_says_so(said):
    first, command, but = said(lambda options: 95)
    assert first.startswith("fits    95.00 of 100.00 GiB") and first.endswith("which is close")
    assert command.startswith("run     python -m perce.train") and "persona_grad" not in command
    assert but == "but     it takes 95.00 of 100.00 GiB, which is close"
    recomputed = "--activation_checkpointing"
    _, command, but = said(lambda options: 99 - 3 * options.step.activation_checkpointing, "cpu", recomputed)
    assert "--activation_checkpointing" in command and "96.00" in but, "as asked for, though there is a faster one"
    first, command, but = said(lambda options: 95 if options.step.activation_checkpointing else 101)
    assert first.startswith("too much  101.00") and "--activation_checkpointing" in command and "close" in but


def test_a_command_that_changes_what_is_learned_is_told_in_words(said):
    pytest.importorskip("triton")
    peaks = {"none": 80, "full": 95}
    first, command, but = said(lambda options: peaks[options.memory.persona_grad])
    assert first.startswith("fits ") and "--persona_grad none" in command
    assert but == "but     this changes what is learned: no gradient flows through the persona (--persona_grad none)"
    *_, command, but = said(lambda options: 92 if options.model.load_in_4bit else 200, "cuda")
    assert "--load_in_4bit" in command and "persona_grad" not in but
    assert but.endswith("is learned: weights are rounded to 4 bits (--load_in_4bit); it takes 92.00 of 100.00 GiB, "
                        "which is close")  # fmt: skip
    assert len(said(lambda options: peaks[options.memory.persona_grad], "cpu", "--persona_grad", "none")) == 2
    assert len(said(lambda options: 80)) == 2, "nothing to be said"


def test_sharded_steps_that_do_not_fit_are_not_sent_to_run(said):
    flags = "cpu", "--devices", 2, "--sharding", "full"
    assert "recipes/several_gpus_fsdp2.yaml" in said(lambda options: 80, *flags)[1]
    first, second = said(lambda options: 120, *flags)
    assert first.startswith("too much") and "recipes" not in second and "no combination" not in second


def test_device_memory_decides_on_cuda(run, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.undo()
    monkeypatch.setattr(plans, "variants", lambda options, device: [])
    out = run("--gpu_memory", "80GiB").out
    assert out.startswith("fits    ") and "of 80.00 GiB (--gpu_memory)" in out and "python -m perce.train" in out
    assert "device cuda" in out and "80.00 GiB: enough" in out and "8,192 tokens" in out and "CUDA context" in out


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
        (["--load_in_4bit", "--device", "cpu"], "--load_in_4bit: bitsandbytes quantises on a GPU"),
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
    assert first["memory"]["peak"] == pytest.approx(second["memory"]["peak"], rel=1e-3)
    assert "token weights" in out and "--objective ce" in first["variants"]
    assert "counterfactual pass" not in asked and "--objective" not in asked
    (tmp_path / "recipe.yaml").write_text("weight_dekay: 0.1\n", encoding="utf-8")
    assert "weight_dekay: unknown option" in run("--config", tmp_path / "recipe.yaml", code=2).err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "PerCE needs a decoder-only model, and t5 has an encoder"),
        (MixtralConfig(num_hidden_layers=2), "mixtral has a mixture of experts. Only dense models are planned"),
        ({"model_type": "llama", "hidden_size": 64}, "num_hidden_layers is missing from its config.json"),
        (
            {"quantization_config": {"quant_method": "gptq"}, "hidden_size": 64, "model_type": "llama"},
            "has a quantization_config (gptq)",
        ),
        ({"hidden_size": 64}, "could not be loaded as a causal language model"),
    ],
)
def test_models_that_cannot_be_planned_are_named(run, tmp_path, config, message):
    if isinstance(config, dict):
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    else:
        config.save_pretrained(tmp_path)
    assert message in run("--model", tmp_path, code=2).err


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("mamba", "mamba has no attention heads"),
        ("gemma4_text", "gemma4_text has layers that differ in head_dim"),
        ("dbrx", "dbrx has a mixture of experts"),  # in a config of its own
    ],
)
def test_what_cannot_be_planned_is_one_line(tmp_path, run, architecture, said):
    """transformers raises where one value is asked for and layers have several."""
    config = CONFIGS[architecture]()
    config.save_pretrained(tmp_path)
    twice, error = run("--model", tmp_path, code=2).err.splitlines()
    assert twice.startswith("--model: given twice") and said in error and error.startswith("error: --model")


@pytest.mark.slow
def test_a_text_decoder_beside_a_vision_tower_is_planned(tmp_path, run):
    tiny_config("gemma3").save_pretrained(tmp_path)
    for rank in (0, 16):
        out = run("--model", tmp_path, "--lora_r", rank, "--device", "cpu", "--json", tmp_path / "plan.json").out
        counts = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["counts"]
        trained = counts["adapter"] if rank else text_parameters()
        assert counts["trained"] == trained < counts["parameters"] and "peak memory" in out


def text_parameters():
    model = tiny("gemma3")
    return sum(p.numel() for p in {*model.model.language_model.parameters(), *model.lm_head.parameters()})
