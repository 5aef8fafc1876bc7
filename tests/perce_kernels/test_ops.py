"""The registered op in PyTorch: torch.compile, opcheck, one tensor as two arguments."""

import itertools

import pytest
import torch
from torch._dynamo import trace_rules

from perce_kernels import fused_perce_loss, ops, token_logprobs
from tests.helpers.numerics import IGNORE, TRAINABLE, make_inputs, oracle, strided
from tests.helpers.subjects import of_each

pytestmark = pytest.mark.usefixtures("poisoned_memory", "small_chunks")
N, D, V = 37, 24, 211


COMPILED = {
    "mean": {},
    "masked": {"compact": False},
    "none": {"reduction": "none"},
    "batch": {"normalize": "batch"},
    "sequence": {"normalize": "sequence", "seq_id": torch.arange(N) // 5},
    "num_items": {"num_items": torch.tensor(91)},
}


@of_each("name", *[("torch", name) for name in COMPILED], *[("triton", name) for name in ("mean", "masked", "none")])
def test_compiles_without_a_graph_break(subject, name):
    torch.compiler.reset()
    inputs, options = subject.inputs(bias=True), COMPILED[name]
    compiled = torch.compile(fused_perce_loss, fullgraph=True, backend="aot_eager")
    subject.assert_matches(subject.call(inputs, op=compiled, **options), oracle(inputs, **options))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_compiles_with_what_older_torch_can_trace(monkeypatch, backend):
    """torch.compile before 2.13 has no rule for is_autocast_available."""
    torch.compiler.reset()
    monkeypatch.delitem(
        trace_rules.torch_c_binding_in_graph_functions, "torch._C._is_autocast_available", raising=False
    )
    trace_rules.get_torch_obj_rule_map.cache_clear()
    try:
        inputs = make_inputs()
        loss = torch.compile(fused_perce_loss, fullgraph=True, backend="eager")(**inputs.kwargs(), backend=backend)
        torch.testing.assert_close(loss, fused_perce_loss(**inputs.kwargs()))
    finally:
        monkeypatch.undo()
        trace_rules.get_torch_obj_rule_map.cache_clear()


def test_one_graph_for_any_number_of_tokens():
    torch.compiler.reset()
    graphs = 0

    def counting(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(fused_perce_loss, fullgraph=True, dynamic=True, backend=counting)
    for n in (37, 50, 21):
        inputs = make_inputs(n=n)
        torch.testing.assert_close(compiled(**inputs.kwargs()), fused_perce_loss(**inputs.kwargs()))
    assert graphs == 1


def test_compiled_options_may_change_between_calls():
    """After their first change, torch.compile traces floats and integers as symbols."""
    torch.compiler.reset()
    compiled = torch.compile(fused_perce_loss, fullgraph=True, backend="eager")
    inputs = make_inputs()
    for i in (1, 2, 3):
        options = {
            "clip_min": 0.1 * i,
            "clip_max": 2.0 * i,
            "softcap": 4.0 * i,
            "logit_scale": 1 / i,
            "num_items": 9 * i,
        }
        actual = compiled(**inputs.kwargs(), **options)
        torch.testing.assert_close(actual, fused_perce_loss(**inputs.kwargs(), **options))


@pytest.mark.parametrize("op", [torch.ops.perce.fused_perce_loss, torch.ops.perce.token_logprobs], ids=str)
def test_cuda_graphs_of_a_compiler_leave_the_op_out(op):
    """With compact=True its body reads from the device, which a CUDA graph cannot record."""
    assert torch.Tag.cudagraph_unsafe in op.default.tags


def test_token_logprobs_compile():
    torch.compiler.reset()
    inputs = make_inputs()
    args = inputs.hidden, inputs.lm_head, inputs.target
    compiled = torch.compile(token_logprobs, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*args, return_entropy=True), token_logprobs(*args, return_entropy=True)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@of_each(
    "n, needed",
    *[("torch", 18, needed) for needed in ((True, True, True), (True, False, False), (False, True, False))],
    *[("triton", 6, needed) for needed in ((True, True, True), (False, True, False))],
)
def test_opcheck_of_the_loss(subject, n, needed):
    inputs = subject.inputs(n=n, v=61, bias=True)
    for name, need in zip(TRAINABLE, needed, strict=True):
        getattr(inputs, name).requires_grad_(need)
    args = (inputs.hidden, inputs.lm_head, inputs.target, inputs.hidden_cf, None, None, inputs.bias, 0.8, 5.0, "log",
            IGNORE, 9.0, 0.5, True, *needed, subject.backend)  # fmt: skip
    torch.library.opcheck(ops.loss_op, args)


@of_each("n, return_entropy", *[(*x, e) for x in (("torch", 18), ("triton", 6)) for e in (False, True)])
def test_opcheck_of_log_probabilities(subject, n, return_entropy):
    inputs = subject.inputs(n=n, v=61, bias=True)
    leaves = [x.requires_grad_() for x in (inputs.hidden, inputs.lm_head, inputs.bias)]
    args = (leaves[0], leaves[1], inputs.target, leaves[2], IGNORE, 9.0, 0.5, False, return_entropy, subject.backend)
    torch.library.opcheck(ops.logprobs_op, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@of_each("torch", "triton")
def test_opcheck_of_the_scaling(subject, dtype):
    gradient, factor = torch.randn(7, 5, device=subject.device), torch.tensor(0.5, device=subject.device)
    torch.library.opcheck(ops.scaled_op, (gradient, factor, dtype, subject.backend))


def test_one_tensor_as_both_hidden_states():
    """Identical prompts: pir is exactly 0 and every weight the floor."""
    inputs = make_inputs()
    _, stats = fused_perce_loss(inputs.hidden, inputs.lm_head, inputs.target, inputs.hidden, return_stats=True)
    assert not stats.pir.any()
    assert (stats.token_weight[inputs.target != IGNORE] == torch.tensor(0.8)).all()


def test_tied_embedding_accumulates_both_gradients():
    """lm_head is also the matrix that hidden was computed from, as with tied embeddings."""
    inputs = make_inputs(d=8, v=61, ignored=0.0)
    grads = []
    for dtype, options in ((torch.float32, {}), (torch.float64, {"backend": "reference"})):
        table = inputs.lm_head.to(dtype).clone().requires_grad_()
        hidden = table[torch.arange(N)]
        fused_perce_loss(hidden, table, inputs.target, inputs.hidden_cf.to(dtype), **options).backward()
        grads.append(table.grad)
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=2e-4, atol=4e-6)


@of_each("reduction, compact", *itertools.product(("torch", "triton"), ("mean", "none"), (True, False)))
def test_non_contiguous_inputs(subject, reduction, compact):
    inputs = subject.inputs(bias=True)
    leaves = {name: strided(x).requires_grad_(name in TRAINABLE) for name, x in inputs.kwargs().items()}
    loss = fused_perce_loss(**leaves, compact=compact, reduction=reduction, backend=subject.backend)
    loss.backward(torch.tensor(0.7, device=subject.device).expand(loss.shape))  # stride 0
    expected = oracle(inputs, reduction=reduction, upstream=0.7).grads
    for name in TRAINABLE:
        torch.testing.assert_close(leaves[name].grad.double(), expected[name], rtol=2e-4, atol=4e-6)
