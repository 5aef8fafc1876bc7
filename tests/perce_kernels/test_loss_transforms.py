"""Forward-mode AD and the transforms of torch.func: exact or refused by name for a fused op, and exact for the
reference."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, func
from torch.autograd import functional

from perce_kernels import fused_perce_loss, token_logprobs
from tests.helpers.numerics import TRAINABLE, Inputs, make_inputs
from tests.helpers.subjects import SOURCES, of_each

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # What torch warns about an op that it calls once for each element of a batch.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
FP64 = torch.float64
FUSED = ("torch", "triton")
VARIANTS = {
    "mean": {},
    "batch": {"normalize": "batch"},
    "none": {"reduction": "none"},
    "sequence": {"normalize": "sequence"},
    "logprobs": {},
}


def through(inputs: Inputs, name: str, arguments: str = "hidden", backend: str = "reference", **options):
    """The op as a scalar function of these arguments; the others are those of `inputs`."""
    options |= VARIANTS[name] | {"backend": backend}
    if options.get("normalize") == "sequence":
        options.setdefault("seq_id", torch.arange(inputs.target.shape[0], device=inputs.target.device) // 3)
    fixed, names = inputs.kwargs() | options, arguments.split(", ")

    def run(*values: Tensor) -> Tensor:
        given = fixed | dict(zip(names, values, strict=True))
        if name == "logprobs":
            given.pop("hidden_cf", None)
            return token_logprobs(**given).sum()
        return fused_perce_loss(**given).sum()

    return run


def dual(run: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The result of `run`, and its tangent if x has one."""
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(run(forward_ad.make_dual(x, x if tangent is None else tangent))))


def gradient(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(run(leaf), leaf)[0]


def no_grad_inside_a_tangent(run, x):
    with torch.no_grad():
        return dual(run, x)


def gradient_of_a_batch(run, x):
    leaf = torch.stack([x, 2 * x]).requires_grad_()
    return torch.autograd.grad(torch.vmap(run)(leaf).sum(), leaf, allow_unused=True)


# (the transform's name, how the error names it, a function that applies it)
REFUSED = {
    "a tangent": ("forward-mode AD", dual),
    "a tangent beside a gradient": ("forward-mode AD", lambda run, x: dual(run, x.clone().requires_grad_())),
    "a tangent without gradients": ("forward-mode AD", no_grad_inside_a_tangent),
    "jvp": ("forward-mode AD", lambda run, x: func.jvp(run, (x,), (x,))),
    "jacfwd": ("forward-mode AD.*jacfwd", lambda run, x: func.jacfwd(run)(x)),
    "linearize": ("forward-mode AD", lambda run, x: func.linearize(run, x)),
    "jacobian, forward": (
        "forward-mode AD",
        lambda run, x: functional.jacobian(run, x, vectorize=True, strategy="forward-mode"),
    ),
    "grad": (r"torch\.func\.grad", lambda run, x: func.grad(run)(x)),
    "vjp": ("vjp", lambda run, x: func.vjp(run, x)),
    "jacrev": ("jacrev", lambda run, x: func.jacrev(run)(x)),
    "hessian": ("hessian", lambda run, x: func.hessian(run)(x)),
    "vmap": (r"torch\.vmap", lambda run, x: torch.vmap(run)(torch.stack([x, x]))),
    "the gradient of a batch": (r"torch\.vmap", gradient_of_a_batch),
    "vmap of grad": (r"torch\.func\.grad", lambda run, x: torch.vmap(func.grad(run))(torch.stack([x, x]))),
    "grad of vmap": (
        r"torch\.vmap",
        lambda run, x: func.grad(lambda batch: torch.vmap(run)(batch).sum())(torch.stack([x, x])),
    ),
    "jvp of functionalize": (r"torch\.func", lambda run, x: func.jvp(func.functionalize(run), (x,), (x,))),
    "an argument of grad that is not differentiated": (
        r"torch\.func\.grad",
        lambda run, x: func.grad(lambda s, leaf: s * run(leaf))(x.new_ones(()), x.clone().requires_grad_()),
    ),
    "functional.jvp": ("higher-order", lambda run, x: functional.jvp(run, x, x)),
    "functional.hvp": ("higher-order", lambda run, x: functional.hvp(run, x, x)),
    "functional.hessian": ("higher-order", functional.hessian),
    "gradgradcheck": ("higher-order", lambda run, x: torch.autograd.gradgradcheck(run, x.clone().requires_grad_())),
}


@of_each(
    "name, asked",
    *itertools.product(["torch"], VARIANTS, REFUSED),
    *itertools.product(["triton"], ("mean", "none", "logprobs"), ("a tangent", "jvp", "grad", "vmap")),
)
def test_what_a_fused_op_cannot_do_is_refused_by_name(subject, name, asked):
    inputs = subject.inputs(n=5, d=4, v=11, bias=True)
    named, ask = REFUSED[asked]
    with pytest.raises(RuntimeError, match=f"{named}.*not supported by the fused op; use backend='reference'"):
        ask(through(inputs, name, backend=subject.backend), inputs.hidden)


@of_each("argument, asked", *itertools.product(FUSED, TRAINABLE, ("a tangent", "jvp", "grad", "vmap")))
def test_the_argument_is_named(subject, argument, asked):
    inputs = subject.inputs(n=5, d=4, v=11, bias=True)
    named, ask = REFUSED[asked]
    for name in ("mean", "logprobs"):
        with pytest.raises(RuntimeError, match=rf"{named}.*\b{argument}\b.*backend='reference'"):
            ask(through(inputs, name, argument, subject.backend), getattr(inputs, argument))


@pytest.mark.parametrize("name", ["mean", "none"])
def test_the_variable_may_name_the_reference(monkeypatch, name):
    inputs = make_inputs(n=5, d=4, v=11)
    monkeypatch.setenv("PERCE_BACKEND", "reference")
    tangent = dual(through(inputs, name, backend="auto"), inputs.hidden)[1]
    torch.testing.assert_close(tangent, (gradient(through(inputs, name), inputs.hidden) * inputs.hidden).sum())


@of_each("name, source", *itertools.product((*FUSED, "reference"), ("mean", "none"), ("hidden_cf", "logp_cf")))
def test_tangents_and_gradients_of_the_weights_stop(subject, name, source):
    """Tangents of token_weight, hidden_cf and logp_cf do not pass, just as their gradients do not."""
    inputs, weights = subject.with_source(subject.inputs(), source)
    x = weights.get(source, inputs.hidden_cf)
    run = through(inputs, name, source, subject.backend)
    expected = run(x)
    loss, tangent = dual(run, x)
    assert torch.equal(loss, expected) and (tangent is None or not tangent.any())
    loss, tangent = func.jvp(run, (x,), (x,))
    assert torch.equal(loss, expected) and not tangent.any()
    assert not func.grad(run)(x).any()


@of_each(*FUSED, "reference")
def test_what_does_not_reach_the_op_is_left_alone(subject):
    """Transforms of what the loss is divided by, functionalize, and a dual level in which no tensor is dual."""
    inputs = subject.inputs()
    run, n = through(inputs, "mean", "num_items", subject.backend), torch.tensor(5.0, device=subject.device)
    expected = -run(n) / n
    torch.testing.assert_close(dual(run, n, torch.ones_like(n))[1], expected, check_dtype=False)
    torch.testing.assert_close(func.jvp(run, (n,), (torch.ones_like(n),))[1], expected, check_dtype=False)
    torch.testing.assert_close(func.grad(run)(n), expected, check_dtype=False)
    run = through(inputs, "mean", backend=subject.backend)
    with forward_ad.dual_level():
        assert torch.equal(run(inputs.hidden), func.functionalize(run)(inputs.hidden))


def batch_of(inputs: Inputs, argument: str) -> Tensor:
    """A batch (3, …) of values of one argument."""
    n, generator = inputs.target.shape[0], torch.Generator().manual_seed(1)
    values = {
        "target": torch.stack([inputs.target, inputs.target.roll(1), inputs.target.flip(0)]),
        "logp_cf": torch.rand(3, n, generator=generator) * -9,
        "token_weight": torch.rand(3, n, generator=generator),
        "seq_id": torch.arange(n) // torch.tensor([[1], [2], [3]]),
        "num_items": torch.tensor([1.0, 2.0, 3.0]),
    }
    if argument in values:
        return values[argument].to(inputs.target.device)
    x = getattr(inputs, argument)
    return torch.stack([x, 2 * x, x + 1])


BATCHES = [
    ("target", "none"), ("hidden_cf", "mean"), ("target", "mean"), ("target", "logprobs"), ("hidden_cf", "none"),
    ("logp_cf", "mean"), ("token_weight", "mean"), ("token_weight", "none"), ("seq_id", "sequence"),
    ("num_items", "mean"),
]  # fmt: skip


@of_each(
    "argument, name",
    *[(subject, *x) for subject in ("torch", "torch fp64", "reference") for x in BATCHES],
    ("triton", *BATCHES[0]),
    slow=[("triton", *BATCHES[1])],
)
def test_a_batch_of_what_does_not_train_is_exact(subject, argument, name):
    """Values, and gradients of the shared arguments: torch calls a fused op once for each element."""
    inputs, _ = subject.with_source(subject.inputs(n=7, d=4, v=11), argument if argument in SOURCES else "hidden_cf")
    leaf = inputs.hidden.requires_grad_()
    run, batch = through(inputs, name, argument, subject.backend), batch_of(inputs, argument)
    expected = torch.stack([run(x) for x in batch])
    for dim in range(batch.dim()):
        actual = torch.vmap(run, in_dims=dim)(batch.movedim(0, dim))
        for a, b in zip((actual, *grads(actual, leaf)), (expected, *grads(expected, leaf)), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=4e-6)


def grads(losses: Tensor, leaf: Tensor) -> tuple[Tensor, ...]:
    weights = torch.tensor([1.0, -2.0, 3.0], device=losses.device)
    return torch.autograd.grad((losses * weights).sum(), leaf, retain_graph=True)


@of_each("name", *itertools.product((*FUSED, "reference"), VARIANTS))
def test_a_batch_of_upstream_gradients_is_exact(subject, name):
    inputs = subject.inputs(n=5, d=4, v=11)
    leaf = inputs.hidden.requires_grad_()
    loss = through(inputs, name, backend=subject.backend)(leaf)
    upstream = torch.tensor([1.0, -2.0, 3.0], device=loss.device)
    (actual,) = torch.autograd.grad(loss, leaf, upstream, is_grads_batched=True, retain_graph=True)
    expected = torch.stack([torch.autograd.grad(loss, leaf, x, retain_graph=True)[0] for x in upstream])
    torch.testing.assert_close(actual, expected)


@of_each("name", *itertools.product(FUSED, ("mean", "none")))
def test_a_jacobian_by_a_batch_of_upstream_gradients_is_exact(subject, name):
    inputs = subject.inputs(n=5, d=4, v=11)
    run = through(inputs, name, backend=subject.backend)
    for vectorize in (False, True):
        jacobian = functional.jacobian(run, inputs.hidden, vectorize=vectorize)
        torch.testing.assert_close(jacobian, gradient(run, inputs.hidden))


@of_each("name", *itertools.product(FUSED, VARIANTS))
def test_a_tangent_of_the_upstream_gradient_is_refused(subject, name):
    """In forward-over-reverse mode the gradient's tangent would be lost; also in a compiled region that may break."""
    inputs = subject.inputs(n=5, d=4, v=11)
    leaf = inputs.hidden.requires_grad_()
    loss = through(inputs, name, backend=subject.backend)(leaf)
    message = "forward-mode AD of a gradient .* use backend='reference'"

    def backward(upstream):
        return torch.autograd.grad(loss, leaf, upstream, retain_graph=True)[0]

    torch.compiler.reset()
    for run in (backward, torch.compile(backward, backend="eager")):
        with pytest.raises(RuntimeError, match=message):
            dual(run, torch.ones_like(loss))
    if name == "mean":
        run = through(inputs, "mean", "num_items", subject.backend)
        with pytest.raises(RuntimeError, match=message):
            dual(lambda n: torch.autograd.grad(run(n), leaf)[0], torch.tensor(5.0, device=subject.device))
    loss = through(inputs, name)(leaf)
    expected = backward(torch.ones_like(loss))
    torch.testing.assert_close(dual(backward, torch.ones_like(loss))[1], expected)


# --- The reference ---------------------------------------------------------------------------------------------------


def reference_inputs() -> Inputs:
    inputs = make_inputs(n=7, d=4, v=11, dtype=FP64, bias=True, ignored=0.2)
    assert (inputs.target < 0).any()
    return inputs


ORDERS = {
    "a tangent": lambda run, x: dual(run, x)[1],
    "jvp": lambda run, x: func.jvp(run, (x,), (x,))[1],
    "jacfwd": lambda run, x: (func.jacfwd(run)(x) * x).sum(),
    "grad": lambda run, x: (func.grad(run)(x) * x).sum(),
    "vjp": lambda run, x: (func.vjp(run, x)[1](x.new_ones(()))[0] * x).sum(),
    "jacrev": lambda run, x: (func.jacrev(run)(x) * x).sum(),
    "linearize": lambda run, x: func.linearize(run, x)[1](x),
    "functional.jvp": lambda run, x: functional.jvp(run, x, x)[1],
}


@pytest.mark.parametrize("name, argument", [
    pytest.param(name, argument, marks=[pytest.mark.slow] * (name != "mean" and argument != "hidden"))
    for name, argument in itertools.product(VARIANTS, TRAINABLE)
])  # fmt: skip
def test_the_reference_is_differentiable_in_either_mode(name, argument):
    inputs = reference_inputs()
    run, x = through(inputs, name, argument), getattr(inputs, argument)
    expected = (gradient(run, x) * x).sum()
    assert expected.abs() > 1e-3
    for asked, ask in ORDERS.items():
        torch.testing.assert_close(ask(run, x), expected, msg=lambda text, asked=asked: f"{asked}: {text}")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_reference_is_differentiable_twice(name):
    inputs = reference_inputs()
    run, x = through(inputs, name), inputs.hidden
    expected = functional.hessian(run, x)
    assert expected.abs().max() > 1e-3
    for ask in (func.hessian, lambda run: func.jacrev(func.jacfwd(run)), lambda run: func.jacrev(func.jacrev(run))):
        torch.testing.assert_close(ask(run)(x), expected)
    if name != "logprobs":  # numerical gradients would see the weights move
        given = Inputs(inputs.hidden, inputs.lm_head, inputs.target, None, inputs.bias)
        run = through(given, name, token_weight=torch.rand(7, dtype=FP64))
    assert torch.autograd.gradcheck(run, x.clone().requires_grad_(), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, x.clone().requires_grad_())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_reference_maps_over_all_arguments_at_once(name):
    """Values, gradients of each call, and of the whole batch; every argument has its own batch dimension."""
    inputs = reference_inputs()
    varying = "hidden, lm_head, target" + {"logprobs": "", "sequence": ", hidden_cf, seq_id"}.get(name, ", hidden_cf")
    run, batches = through(inputs, name, varying), [batch_of(inputs, argument) for argument in varying.split(", ")]
    calls = list(zip(*batches, strict=True))
    expected = torch.stack([run(*values) for values in calls])
    torch.testing.assert_close(torch.vmap(run)(*batches), expected)
    moved = [x.movedim(0, -1) for x in batches]
    torch.testing.assert_close(torch.vmap(run, in_dims=-1)(*moved), expected)

    expected = torch.stack([gradient(lambda x, rest=rest: run(x, *rest), x) for x, *rest in calls])
    assert expected.any()
    torch.testing.assert_close(torch.vmap(func.grad(run))(*batches), expected)
    actual = func.grad(lambda x, *rest: torch.vmap(run)(x, *rest).sum())(*batches)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient(lambda x: torch.vmap(run)(x, *batches[1:]).sum(), batches[0]), expected)


@pytest.mark.parametrize("name", ["mean", "logprobs"])
def test_a_target_outside_the_vocabulary_is_found_under_vmap(name):
    inputs = reference_inputs()
    run, batch = through(inputs, name, "target"), batch_of(inputs, "target")
    batch[2, 5] = 11
    message = r"target: expected ids in \[0, 11\) .* got 11 at row"
    with pytest.raises(ValueError, match=f"{message} 2, 5"):
        torch.vmap(run)(batch)
    for ask in (
        lambda: torch.vmap(run, in_dims=1)(batch.T),
        lambda: torch.vmap(func.grad(lambda s, target: s * run(target)), in_dims=(None, 0))(torch.ones(()), batch),
        lambda: func.grad(lambda s: (s * torch.vmap(run)(batch)).sum())(torch.ones(())),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


# --- torch.compile ---------------------------------------------------------------------------------------------------

COMPILED = {
    "a tangent": lambda run, x, compiled: dual(compiled(run), x),
    "jvp": lambda run, x, compiled: compiled(lambda x: func.jvp(run, (x,), (x,)))(x),
    "grad": lambda run, x, compiled: compiled(func.grad(run))(x),
    "vmap": lambda run, x, compiled: compiled(torch.vmap(run))(torch.stack([x, x])),
}
OURS, TORCHS = "not supported by the fused op; use backend='reference'", "torch.compile does not support input tensors"
REFUSED_BY_TORCH = torch.__version__ >= torch.torch_version.TorchVersion("2.14")
"""Whether torch.compile with fullgraph refuses every tangent, whoever would compute it."""
QUICK = {("mean", "a tangent", False), ("none", "jvp", True), ("logprobs", "grad", True), ("mean", "vmap", True)}


@pytest.mark.parametrize("name, asked, fullgraph", [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(("mean", "none", "logprobs"), COMPILED, (True, False))
])  # fmt: skip
def test_compiled_too(name, asked, fullgraph):
    inputs = reference_inputs()
    ask, x = COMPILED[asked], inputs.hidden

    def compiled(run):
        torch.compiler.reset()
        return torch.compile(run, fullgraph=fullgraph, backend="aot_eager")

    by_torch = REFUSED_BY_TORCH and fullgraph and asked == "a tangent"
    with pytest.raises(RuntimeError, match=TORCHS if by_torch else OURS):
        ask(through(inputs, name, backend="torch"), x, compiled)
    if not by_torch:
        run = through(inputs, name)
        torch.testing.assert_close(ask(run, x, compiled), ask(run, x, lambda run: run))


def test_a_compiled_call_stays_one_graph():
    """The graph has a guard on the dual level, so it is used again after a call that was refused."""
    torch.compiler.reset()
    inputs, graphs = make_inputs(n=5, d=4, v=11), 0

    def counting(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(through(inputs, "mean", backend="torch"), fullgraph=True, backend=counting)
    for _ in range(2):
        assert compiled(inputs.hidden).isfinite()
        with pytest.raises(RuntimeError, match=TORCHS if REFUSED_BY_TORCH else OURS):
            dual(compiled, inputs.hidden)
    assert graphs == 1


def test_a_compiled_batch_of_targets_says_what_works():
    inputs = reference_inputs()
    run, batch = through(inputs, "mean", "target"), batch_of(inputs, "target")
    torch.compiler.reset()
    with pytest.raises(
        RuntimeError, match=r"target: torch\.vmap over it works outside torch\.compile, or without full"
    ):
        torch.compile(torch.vmap(run), fullgraph=True, backend="aot_eager")(batch)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(torch.vmap(run), backend="aot_eager")(batch), torch.vmap(run)(batch))
