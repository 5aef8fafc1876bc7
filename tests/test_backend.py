"""Which backend computes: the argument, PERCE_BACKEND where that is "auto", --backend; and what its failure tells."""

import json

import pytest
import torch
import yaml
from datasets import Dataset

import perce.model.patch
from perce import evaluate, plan, score
from perce.errors import UserError
from perce.planning import plans
from perce.training.arguments import PerceArguments
from perce.training.trainer import PerceTrainer
from perce_kernels import backends, chunked, fused_perce_loss, ops, reference, token_logprobs
from perce_kernels.backends import resolve_backend
from tests.numerics import TRAINABLE, call, make_inputs
from tests.tiny import demo_pairs, tiny_model, tiny_tokenizer
from tests.training import fails, model_directory, rows_file, training  # noqa: F401  fixtures

TRITON = pytest.mark.skipif(not backends.TRITON_FOUND, reason="Triton is not installed")
EACH = ["torch", "reference", pytest.param("triton", marks=TRITON)]


@pytest.fixture
def ran(monkeypatch):
    """The backends that computed something, in order."""
    modules = {"torch": chunked, "reference": reference}
    if backends.TRITON_FOUND:
        from perce_kernels.gpu import driver

        modules["triton"] = driver
    names = []
    for backend, module in modules.items():
        for function in ("perce_loss" if module is reference else "sweep", "logprobs"):
            run = getattr(module, function)

            def spy(*args, run=run, backend=backend, **options):
                names.append(backend)
                return run(*args, **options)

            monkeypatch.setattr(module, function, spy)
    return names


# --- In one's own trainer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", EACH)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_variable_says_what_auto_is(monkeypatch, ran, chosen, reduction):
    inputs = make_inputs()
    expected = call(inputs, backend=chosen, reduction=reduction)
    monkeypatch.setenv("PERCE_BACKEND", chosen)
    ran.clear()
    actual = call(inputs, reduction=reduction)
    logp = token_logprobs(inputs.hidden, inputs.lm_head, inputs.target)
    assert set(ran) == {chosen}, "the recomputing backward included"
    assert torch.equal(actual.loss, expected.loss)
    assert all(torch.equal(actual.grads[name], expected.grads[name]) for name in ("hidden", "lm_head"))
    torch.testing.assert_close(logp, expected.stats.logp)


def test_a_backend_that_is_named_does_not_ask_the_variable(monkeypatch, ran):
    for value in ("reference", "cuda"):
        monkeypatch.setenv("PERCE_BACKEND", value)
        call(make_inputs(), backend="torch", reduction="none")
    assert set(ran) == {"torch"}
    for value in ("", "auto"):  # as if it were not set
        monkeypatch.setenv("PERCE_BACKEND", value)
        assert resolve_backend("auto", torch.device("cpu")) == "auto"


def test_a_value_that_cannot_be_is_an_error_that_names_the_variable(monkeypatch):
    inputs = make_inputs()
    calls = (
        lambda: fused_perce_loss(**inputs.kwargs()),
        lambda: token_logprobs(inputs.hidden, inputs.lm_head, inputs.target),
    )
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(backends, "TRITON_FOUND", True)
    for value, message in {
        "cuda": "PERCE_BACKEND: expected one of auto, triton, torch, reference, got 'cuda'",
        "triton": r'PERCE_BACKEND: expected a CUDA or ROCm device .* for "triton", got cpu',
    }.items():
        monkeypatch.setenv("PERCE_BACKEND", value)
        for run in calls:
            with pytest.raises(ValueError, match=message):
                run()
    monkeypatch.setenv("PERCE_BACKEND", "reference")
    with pytest.raises(ValueError, match='PERCE_BACKEND: expected "triton", "torch" or "auto" with a group, got "ref'):
        resolve_backend("auto", torch.device("cpu"), group=object())


@pytest.mark.parametrize("chosen", EACH)
def test_the_variable_is_read_without_a_graph_break(monkeypatch, ran, chosen):
    torch.compiler.reset()
    inputs = make_inputs(bias=True)
    expected = call(inputs, backend=chosen)
    monkeypatch.setenv("PERCE_BACKEND", chosen)
    ran.clear()
    actual = call(inputs, op=torch.compile(fused_perce_loss, fullgraph=True, backend="aot_eager"))
    compiled = torch.compile(token_logprobs, fullgraph=True, backend="aot_eager")
    logp = compiled(inputs.hidden, inputs.lm_head, inputs.target, bias=inputs.bias)
    assert set(ran) <= {chosen}, "the reference is traced"
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(logp, expected.stats.logp)
    for name in TRAINABLE:
        torch.testing.assert_close(actual.grads[name], expected.grads[name])
    inputs.target[3] = 211
    with pytest.raises((ValueError, RuntimeError), match="target"):
        compiled(inputs.hidden, inputs.lm_head, inputs.target, bias=inputs.bias)


def test_the_reference_is_fp32_under_autocast_too():
    inputs = make_inputs(bias=True)
    expected = call(inputs.to(torch.bfloat16), backend="reference")
    leaves = {name: x.requires_grad_(name in TRAINABLE) for name, x in inputs.kwargs().items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss, stats = fused_perce_loss(**leaves, backend="reference", return_stats=True)
        logp = token_logprobs(
            inputs.hidden, inputs.lm_head, inputs.target, bias=inputs.bias, backend="reference"
        )  # fmt: skip
    loss.backward()
    assert torch.equal(loss, expected.loss) and torch.equal(stats.pir, expected.stats.pir)
    assert torch.equal(logp, expected.stats.logp)
    assert all(torch.equal(leaves[name].grad, expected.grads[name].float()) for name in TRAINABLE)


@TRITON
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_error_of_the_kernels_ends_with_the_way_around(monkeypatch, reduction):
    from perce_kernels.gpu import driver

    def broken(*_):
        raise RuntimeError("Triton Error [CUDA]: invalid device function")

    monkeypatch.setattr(backends, "implementation", lambda backend, device: driver)  # as "auto" on a GPU
    leaves = {name: x.requires_grad_(name in TRAINABLE) for name, x in make_inputs().kwargs().items()}
    if reduction == "none":  # in the backward, which computes again
        loss = fused_perce_loss(**leaves, reduction="none").sum()
    monkeypatch.setattr(driver, "sweep", broken)
    with pytest.raises(RuntimeError) as raised:
        loss.backward() if reduction == "none" else fused_perce_loss(**leaves)
    text = str(raised.value)
    assert text.startswith('backend "triton": RuntimeError: Triton Error [CUDA]: invalid device function\n')
    assert text.endswith(ops.WAY_AROUND) and "--backend torch" in text and "PERCE_BACKEND=torch" in text
    assert str(raised.value.__cause__) == "Triton Error [CUDA]: invalid device function"


@pytest.mark.parametrize("error", [ValueError("target"), torch.OutOfMemoryError("CUDA out of memory"), KeyError("k")])
def test_errors_that_are_not_the_kernels_are_left_as_they_are(monkeypatch, error):
    """A KeyError of the torch backend, and what another backend would not cure."""
    module = chunked if isinstance(error, KeyError) else torch  # some module that is not the torch backend

    def broken(*_):
        raise error

    monkeypatch.setattr(module, "sweep", broken, raising=False)
    monkeypatch.setattr(backends, "implementation", lambda backend, device: module)
    with pytest.raises(type(error)) as raised:
        fused_perce_loss(**make_inputs().kwargs())
    assert raised.value is error


def test_a_broken_triton_is_told_of_too(monkeypatch):
    def broken(backend, device):
        raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(backends, "implementation", broken)
    with pytest.raises(RuntimeError, match=r"ImportError: libtriton.so.*\n.*--backend torch"):
        fused_perce_loss(**make_inputs().kwargs())


# --- On the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The backend of every call that a model's head makes."""
    backends = []
    for name in ("fused_perce_loss", "token_logprobs"):
        op = getattr(perce.model.patch, name)

        def spy(*args, op=op, **options):
            backends.append(options["backend"])
            return op(*args, **options)

        monkeypatch.setattr(perce.model.patch, name, spy)
    return backends


@pytest.mark.parametrize("backend", EACH)
def test_training_computes_with_the_backend_that_is_named(train, tmp_path, monkeypatch, asked, ran, backend):
    monkeypatch.setenv("PERCE_BACKEND", "torch" if backend == "reference" else "reference")
    options = {"objective": "entce", "max_steps": 1, "save_steps": 1, "report_examples": 1, "eval_examples": 1}
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
    assert planned("--backend", "reference")[0] == "reference"
    monkeypatch.setenv("PERCE_BACKEND", "torch")
    backend, out = planned()
    assert backend == "torch" and "device cpu, backend torch" in out


def test_a_backend_that_cannot_run_stops_every_command_at_its_start(train, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(backends, "TRITON_FOUND", True)
    for module in ("perce.hub", "perce.measuring.inference"):
        monkeypatch.setattr(f"{module}.load_pretrained", lambda *_, **__: pytest.fail("found too late"))

    def run(command, *flags):
        return command.main(["--model", model, *flags]), *capsys.readouterr()

    needed = ("expected a CUDA or ROCm device", "got cpu", "--backend", "PERCE_BACKEND")
    named = "--backend=triton"
    fails(train(named), "backend: ", *needed)
    fails(run(plan, "--device=cpu", named), "backend: ", *needed)
    for command in (score, evaluate):
        fails(run(command, named), "backend: ", *needed)
        fails(run(command, "--backend=cuda"), "backend: expected one of auto, triton, torch, reference, got 'cuda'")
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
