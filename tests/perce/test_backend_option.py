"""--backend of every command, and PERCE_BACKEND."""

import json

import pytest
import yaml
from datasets import Dataset
from torch._subclasses.fake_tensor import FakeTensor

import perce.model.head
from perce import PerceArguments, PerceTrainer, UserError, evaluate, plan, score
from perce.planning import plans
from perce_kernels import backends
from tests.helpers.subjects import EACH
from tests.helpers.tiny import demo_pairs, tiny_model, tiny_tokenizer
from tests.helpers.training import fails


@pytest.fixture
def asked(monkeypatch):
    """The backend of every call that a model's head makes."""
    backends = []
    for name in ("fused_perce_loss", "token_logprobs"):
        op = getattr(perce.model.head, name)

        def spy(hidden, op=op, **options):
            if not isinstance(hidden, FakeTensor):  # what is planned before a run
                backends.append(options["backend"])
            return op(hidden, **options)

        monkeypatch.setattr(perce.model.head, name, spy)
    return backends


@pytest.mark.parametrize("backend", EACH)
def test_training_computes_with_the_backend_that_is_named(train, tmp_path, monkeypatch, asked, ran, backend):
    monkeypatch.setenv("PERCE_BACKEND", "torch" if backend == "reference" else "reference")
    options = {"objective": "entce", "max_steps": 1, "save_steps": 1, "report_examples": 1, "eval_examples": 1}
    options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}  # the interpreter takes its time
    assert train(f"--backend={backend}", **options)[0] == 0
    assert set(asked) == set(ran) == {backend}, "the flag beats the variable"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["backend"] == backend
    if backend == "torch":  # resumed with another one
        asked.clear()
        assert train("--resume", "--backend=reference", model=None, data=None, max_steps=2)[0] == 0
        assert set(asked) == {"reference"}


@pytest.mark.parametrize(
    ("command", "flags"), [(score, ["--labels", "--limit", "2"]), (evaluate, ["--generate=false", "--limit", "2"])]
)
def test_score_and_evaluate_compute_with_the_backend_that_is_named(
    model, capsys, monkeypatch, asked, ran, command, flags
):
    monkeypatch.setenv("PERCE_BACKEND", "torch")
    for chosen, expected in ((["--backend", "reference"], "reference"), ([], "torch")):
        asked.clear(), ran.clear()
        assert command.main(["--model", model, *flags, *chosen]) == 0
        assert set(asked) == set(ran) == {expected}


def test_a_plan_is_of_the_backend_that_is_named(model, tmp_path, monkeypatch, capsys):
    def planned(*flags):
        fixed = ["--model", model, "--context", "96", "--query", "8", "--response", "16", "--tflops", "1"]
        assert plan.main([*fixed, "--device", "cpu", "--json", str(tmp_path / "p.json"), *flags]) == 0
        return json.loads((tmp_path / "p.json").read_text())["options"]["backend"], capsys.readouterr().out

    monkeypatch.setattr(plans, "variants", lambda options, device: [])
    monkeypatch.setattr(plans, "_command", lambda *_: (None, ""))
    assert planned("--backend", "reference")[0] == "reference"
    monkeypatch.setenv("PERCE_BACKEND", "torch")
    backend, out = planned()
    assert backend == "torch" and "device cpu, backend torch" in out


@pytest.mark.parametrize("command", [perce.train, plan, score, evaluate])
def test_the_flags_choices_are_the_ops(command, capsys):
    assert command.main(["--backend=cuda", "--print_config"]) == 2
    assert f"backend: expected one of {', '.join(backends.NAMES)}, got 'cuda'" in capsys.readouterr().err


def test_a_backend_that_cannot_run_stops_every_command_at_its_start(train, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(backends, "TRITON_FOUND", True)
    monkeypatch.setattr("perce.model.loading.load_pretrained", lambda *_, **__: pytest.fail("found too late"))

    def run(command, *flags):
        return command.main(["--model", model, *flags]), *capsys.readouterr()

    needed = ("expected a CUDA or ROCm device", "got cpu", "--backend", "PERCE_BACKEND")
    named = "--backend=triton"
    fails(train(named), "backend: ", *needed)
    fails(run(plan, "--device=cpu", named), "backend: ", *needed)
    for command in (score, evaluate):
        fails(run(command, named), "backend: ", *needed)
    for value, fragments in (("triton", needed), ("cuda", ("expected one of", "'cuda'"))):
        monkeypatch.setenv("PERCE_BACKEND", value)
        fails(train(), "PERCE_BACKEND: ", *fragments)
        fails(run(plan, "--device=cpu"), "PERCE_BACKEND: ", *fragments)
        for command in (score, evaluate):
            fails(run(command), "PERCE_BACKEND: ", *fragments)
    assert not (tmp_path / "run").exists()


def test_a_trainer_of_ones_own_takes_it_as_an_argument(tmp_path, monkeypatch, asked):
    def step(**options):
        args = PerceArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1, save_strategy="no", **options)
        pairs = Dataset.from_list(demo_pairs(2))
        PerceTrainer(tiny_model("llama"), args, train_dataset=pairs, processing_class=tiny_tokenizer()).train()
        return args.backend, {*asked}

    assert step(backend="reference") == ("reference", {"reference"})
    asked.clear()
    monkeypatch.setenv("PERCE_BACKEND", "torch")
    assert step() == ("torch", {"torch"})
    with pytest.raises(UserError, match="backend: expected one of"):
        step(backend="liger")
