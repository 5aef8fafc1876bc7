"""What backend "triton" guarantees besides values, at sizes of real models: equal bits, syncs, graphs, memory, casts.

Every test runs twice: on a GPU at those sizes (marked `gpu`; `make gpu-b`), and on any device at tiny ones.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import ROOT
from tests.helpers.cases import CHUNK, CUT, GEMMA, LLAMA, QWEN, Case, both, make_inputs, on_gpu
from tests.helpers.device import DEVICE, ON_GPU, capture, free, host_syncs, no_host_sync, peak_bytes
from tests.helpers.numerics import IGNORE, TRAINABLE, Inputs, beneath
from tests.helpers.subjects import TRITON

pytest.importorskip("triton")
from perce_kernels import chunked, fused_perce_loss, token_logprobs
from perce_kernels.gpu import driver, tiles
from perce_kernels.gpu.cut import Cut

pytestmark = pytest.mark.usefixtures("interpreter_rounds")


@pytest.fixture
def case(request, monkeypatch) -> Case:
    """The case, with chunks so small that a tiny case has several."""
    if request.param.is_tiny:
        monkeypatch.setattr(driver, "cut_of", lambda *_: Cut(*CUT))
        monkeypatch.setattr(driver, "LOGPROB_ROWS", CHUNK)
    yield request.param
    free()


def each(**cases: Case):
    """All cases on a GPU; on any device, the tiny version of the first."""
    (name, first), *others = cases.items()
    return pytest.mark.parametrize("case", both(**{name: first}) + on_gpu(**dict(others)), indirect=True)


def leaves_of(inputs: Inputs) -> dict[str, Tensor]:
    return {name: x.detach().clone().requires_grad_(name in TRAINABLE) for name, x in inputs.kwargs().items()}


def step(leaves: dict[str, Tensor], backend="triton", **options) -> list[Tensor]:
    """Loss and gradients of one forward and backward."""
    loss = fused_perce_loss(**leaves, backend=backend, **options).sum()
    trained = [x for x in leaves.values() if x.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


def assert_same_to_rounding(actual: list[Tensor], expected: list[Tensor]) -> None:
    """The kernels are the same, but cuBLAS may choose another algorithm, and a compiler may fuse code around them."""
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=0)
    for a, b in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6 * float(b.abs().max()))


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@each(llama=Case(3000, *LLAMA, bias=True), qwen_fp32=Case(257, *QWEN, torch.float32))
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"compact": False}], ids=["mean", "none", "masked"])
def test_same_inputs_same_bits(case, options):
    leaves = leaves_of(make_inputs(case))
    first = step(leaves, **options)
    assert all(x.isfinite().all() for x in first)
    for _ in range(1 if case.is_tiny else 3):
        assert_same_bits(step(leaves, **options), first)


@each(llama=Case(2000, *LLAMA, bias=True), qwen_fp16=Case(2000, *QWEN, torch.float16))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_compaction_nothing_waits_for_the_device(monkeypatch, case, reduction):
    monkeypatch.setattr("perce_kernels.contract.check_target", lambda *_: None)  # this check runs only on a CPU
    leaves = leaves_of(make_inputs(case))
    options: dict[str, Any] = {"compact": False, "reduction": reduction}
    if reduction == "mean":
        options["num_items"] = torch.tensor(7)  # of a CPU
    expected = step(leaves, **options)  # compiles the kernels
    with no_host_sync():
        actual = step(leaves, **options)
    assert_same_bits(actual, expected)


@each(llama=Case(2000, *LLAMA), qwen_fp16=Case(2000, *QWEN, torch.float16))
def test_compaction_waits_for_the_device_once(case):
    leaves = leaves_of(make_inputs(case))
    step(leaves)
    assert host_syncs(lambda: step(leaves)) == 1
    assert host_syncs(lambda: step(leaves, compact=False)) == 0
    logprobs = {"lm_head": leaves["lm_head"], "target": leaves["target"], "backend": "triton"}
    assert host_syncs(lambda: token_logprobs(leaves["hidden"], **logprobs)) == 1


@each(llama=Case(1500, *LLAMA, bias=True), gemma=Case(1500, *GEMMA))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_captured_graph_follows_its_inputs(case, reduction):
    leaves, other = leaves_of(make_inputs(case)), make_inputs(case, seed=5)
    options = {"compact": False, "reduction": reduction}
    outputs, replay = capture(lambda: step(leaves, **options))
    with torch.no_grad():
        for name, x in leaves.items():
            x.copy_(getattr(other, name))
    replay()
    assert_same_to_rounding(outputs, step(leaves_of(other), **options))


MEMORY = {  # (compact, ignored, needed gradients, passes)
    "trainable": (True, 0.3, (True, True, True)),
    "frozen head": (True, 0.3, (True, False, False)),
    "no gather": (True, 0.0, (True, True, False)),
    "masked": (False, 0.3, (True, True, False)),
}


@each(llama=Case(8192, *LLAMA, bias=True), gemma=Case(4096, *GEMMA, bias=True))
@pytest.mark.parametrize("name", MEMORY)
def test_peak_memory_follows_the_formula(monkeypatch, case, name):
    compact, ignored, needed = MEMORY[name]
    monkeypatch.setattr("perce_kernels.contract.check_target", lambda *_: None)
    # On a CPU, bf16 products make fp32 copies of their operands.
    inputs = make_inputs(case._replace(ignored=ignored, dtype=torch.float32 if case.is_tiny else case.dtype))

    def run():
        return driver.sweep(*beneath(inputs, compact=compact, needed=needed))

    outputs = sum(x.untyped_storage().nbytes() for x in run())
    n, d, v = case.n, case.d, case.v
    rows = int((inputs.target != IGNORE).sum()) if compact else n
    itemsize, way = inputs.hidden.itemsize, tiles.way(inputs.hidden)
    cut = Cut(*driver.cut_of(rows, d, v, itemsize, way, tiles.multiprocessors(DEVICE)))
    expected = driver.extra_bytes(
        rows, d, v, itemsize, cut=cut, way=way, passes=2, gathered=rows < n, masked=not compact, needed=needed
    )
    slack = 32 * 2**20 if ON_GPU else 0  # CUDA's allocator rounds large blocks up to 2 MiB
    extra = peak_bytes(run) - outputs
    assert expected <= extra <= expected + 40 * n + slack
    assert not ON_GPU or case.is_tiny or n * v * 4 > 1.4 * extra, "an (N, V) tensor would exceed the limit"


@each(qwen=Case(1000, *QWEN, bias=True))
@pytest.mark.parametrize("options", [{}, {"compact": False}, {"reduction": "none"}], ids=["mean", "masked", "none"])
def test_compiles_without_a_graph_break(case, options):
    torch.compiler.reset()
    leaves = leaves_of(make_inputs(case))
    compiled = torch.compile(fused_perce_loss, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    loss = compiled(**leaves, **options, backend="triton").sum()
    gradients = torch.autograd.grad(loss, [x for x in leaves.values() if x.requires_grad])
    assert_same_to_rounding([loss.detach(), *gradients], step(leaves, **options))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
def test_a_compiler_that_makes_cuda_graphs_leaves_the_op_out():
    torch.compiler.reset()
    leaves = leaves_of(make_inputs(Case(500, *QWEN)))
    compiled = torch.compile(fused_perce_loss, mode="reduce-overhead")
    for _ in range(3):  # a graph would be recorded in the second call, and replayed in the third
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(**leaves)
        gradients = torch.autograd.grad(loss, [x for x in leaves.values() if x.requires_grad])
        assert_same_to_rounding([loss.detach().clone(), *gradients], step(leaves))


@each(llama=Case(1000, *LLAMA, torch.float32, bias=True))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_is_a_cast_of_the_inputs(case, dtype, reduction):
    inputs = make_inputs(case)
    with torch.autocast(DEVICE.type, dtype):
        cast = TRITON.call(inputs, reduction=reduction)
    by_hand = TRITON.call(inputs.to(dtype), reduction=reduction)
    assert torch.equal(cast.loss, by_hand.loss) and cast.loss.dtype == torch.float32
    for name in TRAINABLE:
        assert cast.grads[name].dtype == torch.float32
        assert torch.equal(cast.grads[name], by_hand.grads[name].float())


@each(qwen=Case(300, *QWEN, torch.float32, bias=True))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fp32_ignores_the_users_tf32(case, reduction):
    leaves = leaves_of(make_inputs(case))
    expected = step(leaves, reduction=reduction)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        actual = step(leaves, reduction=reduction)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same_bits(actual, expected)


@each(llama=Case(500, *LLAMA, bias=True), gemma_fp32=Case(100, *GEMMA, torch.float32))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_auto_is_triton_on_a_gpu_and_torch_on_a_cpu(monkeypatch, case, reduction):
    ran = []
    for module in (chunked, driver):
        for name in ("sweep", "logprobs"):
            run = getattr(module, name)
            spy = lambda *args, run=run, module=module: ran.append(module) or run(*args)  # noqa: E731
            monkeypatch.setattr(module, name, spy)
    leaves = leaves_of(make_inputs(case))
    actual = step(leaves, backend="auto", reduction=reduction)
    assert set(ran) == {driver if ON_GPU else chunked}
    assert_same_bits(actual, step(leaves, backend="triton" if ON_GPU else "torch", reduction=reduction))


OUT_OF_RANGE = """
import sys, torch
from perce_kernels import fused_perce_loss, token_logprobs
device, reduction, token, (n, d, v) = sys.argv[1], sys.argv[2], int(sys.argv[3]), map(int, sys.argv[4:])
hidden, lm_head = torch.randn(n, d, device=device), torch.randn(v, d, device=device)
target = torch.zeros(n, dtype=torch.int64, device=device)
fused_perce_loss(hidden, lm_head, target, hidden, reduction=reduction, backend="triton")
if device == "cuda":
    torch.cuda.synchronize()
print("in range: fine", flush=True)
target[n // 2] = token
loss = fused_perce_loss(hidden, lm_head, target, hidden, reduction=reduction, backend="triton")
print("not caught:", loss.sum().item())
"""


BEYOND, NEGATIVE = (
    Case(300, *LLAMA, options=(("reduction", "mean"),)),
    Case(300, *LLAMA, options=(("reduction", "none"),)),
)


@pytest.mark.parametrize("case", both(beyond=BEYOND) + on_gpu(negative=NEGATIVE), indirect=True)
def test_a_target_outside_the_vocabulary_stops_the_process(case):
    """On a GPU an asynchronous assertion does, after which no CUDA call works, so this has a process of its own."""
    reduction = dict(case.options)["reduction"]
    token = case.v if reduction == "mean" else -1
    arguments = [DEVICE.type, reduction, str(token), str(case.n), str(case.d), str(case.v)]
    run = subprocess.run(
        [sys.executable, "-c", OUT_OF_RANGE, *arguments], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | ({} if ON_GPU else {"TRITON_INTERPRET": "1"}), timeout=120,
    )  # fmt: skip
    assert run.returncode != 0 and "in range: fine" in run.stdout and "not caught" not in run.stdout, run.stderr[-2000:]
    assert ("device-side assert" if ON_GPU else "ValueError: target: expected ids in") in run.stderr
