"""Which backend computes: the argument, or PERCE_BACKEND if that is "auto"; and what its errors say."""

import itertools

import pytest
import torch
from torch.distributed import DistBackendError

from perce_kernels import backends, chunked, fused_perce_loss, ops, token_logprobs
from perce_kernels.backends import resolve_backend
from tests.helpers.device import ON_GPU
from tests.helpers.numerics import TRAINABLE, call, make_inputs
from tests.helpers.subjects import EACH, NEEDS_TRITON, TRITON


@pytest.mark.parametrize("chosen", EACH)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_variable_says_what_auto_is(monkeypatch, ran, chosen, reduction):
    inputs = TRITON.of(make_inputs())
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
    for value in ("", "auto"):  # both mean the same as an unset variable
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
        logp = token_logprobs(inputs.hidden, inputs.lm_head, inputs.target, bias=inputs.bias, backend="reference")
    loss.backward()
    assert torch.equal(loss, expected.loss) and torch.equal(stats.pir, expected.stats.pir)
    assert torch.equal(logp, expected.stats.logp)
    assert all(torch.equal(leaves[name].grad, expected.grads[name].float()) for name in TRAINABLE)


@NEEDS_TRITON
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_error_of_the_kernels_ends_with_the_way_around(monkeypatch, reduction):
    from perce_kernels.gpu import driver

    def broken(*_):
        raise RuntimeError("Triton Error [CUDA]: invalid device function")

    monkeypatch.setattr(backends, "implementation", lambda backend, device: driver)  # as "auto" on a GPU
    leaves = {name: x.requires_grad_(name in TRAINABLE) for name, x in make_inputs().kwargs().items()}
    if reduction == "none":  # the error comes in the backward, which recomputes
        loss = fused_perce_loss(**leaves, reduction="none").sum()
    monkeypatch.setattr(driver, "sweep", broken)
    with pytest.raises(RuntimeError) as raised:
        loss.backward() if reduction == "none" else fused_perce_loss(**leaves)
    text = str(raised.value)
    assert text.startswith('backend "triton": RuntimeError: Triton Error [CUDA]: invalid device function\n')
    assert text.endswith(ops.WAY_AROUND) and "--backend torch" in text and "PERCE_BACKEND=torch" in text
    assert str(raised.value.__cause__) == "Triton Error [CUDA]: invalid device function"


@pytest.mark.parametrize("error", [torch.AcceleratorError, RuntimeError])  # as torch and Triton raise it
def test_an_assertion_on_the_device_names_its_likely_cause(monkeypatch, error):
    """It comes at a later call, which did nothing wrong; another backend would not avoid it."""

    def broken(backend, device):
        raise error("CUDA error: device-side assert triggered")

    monkeypatch.setattr(backends, "implementation", broken)
    with pytest.raises(
        RuntimeError, match=r"device-side assert.*\n.*target outside \[0, V\).*CUDA_LAUNCH_BLOCKING=1"
    ) as e:
        fused_perce_loss(**make_inputs().kwargs())
    assert "--backend torch" not in str(e.value)


ERRORS = ValueError("target"), torch.OutOfMemoryError("CUDA out of memory"), KeyError("k"), DistBackendError("NCCL")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_that_are_not_the_kernels_are_left_as_they_are(monkeypatch, error):
    """A KeyError of the torch backend, and errors that another backend would not avoid."""
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


@NEEDS_TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at the errors of a CPU")
def test_a_backend_that_is_named_is_never_replaced(monkeypatch):
    inputs = make_inputs()
    args = inputs.hidden, inputs.lm_head, inputs.target
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
    for op in (
        lambda: fused_perce_loss(**inputs.kwargs(), backend="triton"),
        lambda: token_logprobs(*args, backend="triton"),
    ):
        with pytest.raises(ValueError, match=r"backend: expected a CUDA or ROCm device .* got cpu"):
            op()
    monkeypatch.setattr(backends, "TRITON_FOUND", False)
    with pytest.raises(ValueError, match=r"backend: expected the triton package, .*not installed"):
        fused_perce_loss(**inputs.kwargs(), backend="triton")


@pytest.mark.parametrize(("found", "tiles"), itertools.product((True, False), repeat=2))
def test_auto_is_triton_on_a_gpu_that_the_kernels_are_built_for(monkeypatch, found, tiles):
    monkeypatch.setattr(backends, "TRITON_FOUND", found)
    monkeypatch.setattr("perce_kernels.gpu.tiles.is_supported", lambda device: tiles)
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: name)
    expected = backends.BACKENDS["triton" if found and tiles else "torch"].module
    assert backends.implementation("auto", torch.device("cuda")) == expected
    assert backends.implementation("auto", torch.device("cpu")) == backends.BACKENDS["torch"].module
    reason = "not installed" if not found else "are built for" if tiles else "capability 8.0"
    assert reason in backends.chosen("auto", torch.device("cuda"))[1]
    assert backends.chosen("auto", torch.device("cpu")) == ("torch", "the Triton kernels need an NVIDIA GPU")
    assert backends.chosen("torch", torch.device("cuda")) == ("torch", "it was asked for")


@pytest.mark.parametrize("backend", ["auto", *EACH])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_backend_that_runs(ran, backend, reduction):
    """Forward and recomputing backward; "auto" means Triton only on a GPU, even with the interpreter."""
    inputs = TRITON.of(make_inputs())
    leaves = {name: x.requires_grad_(name in TRAINABLE) for name, x in inputs.kwargs().items()}
    fused_perce_loss(**leaves, reduction=reduction, backend=backend).sum().backward()
    assert set(ran) == {("triton" if ON_GPU else "torch") if backend == "auto" else backend}
    if backend != "reference":  # the functions of the reference call each other
        assert len(ran) == (3 if reduction == "none" else 1)
