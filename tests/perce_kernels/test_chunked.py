"""Backend "torch": its memory and products, fp32 statistics for every input dtype, and weights of zero."""

import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from perce_kernels import chunked, fused_perce_loss, row_pass, token_logprobs
from perce_kernels.contract import Call
from tests.helpers.numerics import IGNORE, TRAINABLE, assert_matches, beneath, call, make_inputs, oracle
from tests.helpers.watch import NEEDED_AND_COST, Watch

N, D, V = 37, 24, 211
pytestmark = pytest.mark.usefixtures("poisoned_memory", "small_chunks")


def test_the_usual_inputs_take_several_chunks():
    valid = int((make_inputs().target != IGNORE).sum())
    assert 16 < valid < N, "with and without compaction, the last one partial"
    assert chunked.chunk_rows(V, torch.float32, 1, "cpu") == 16


@pytest.mark.parametrize("normalize", ["none", "batch", "sequence"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_zero_weights_give_a_zero_loss(normalize, reduction):
    options = {"normalize": normalize, "reduction": reduction, "token_weight": torch.zeros(N)}
    if normalize == "sequence":
        options["seq_id"] = torch.arange(N) // 5
    inputs = make_inputs(cf=False)
    result = call(inputs, **options)
    assert not result.loss.any() and not result.stats.token_weight.any() and result.stats.logp.any()
    assert not result.grads["hidden"].any() and not result.grads["lm_head"].any()


def test_one_sequence_of_zero_weight_does_not_disturb_the_others():
    inputs = make_inputs(ignored=0.0, cf=False)
    seq_id, weight = torch.arange(N) // 10, torch.rand(N) + 0.1
    weight[:10] = 0
    stats = call(inputs, normalize="sequence", seq_id=seq_id, token_weight=weight).stats
    assert not stats.token_weight[:10].any()
    for s in (1, 2, 3):
        torch.testing.assert_close(stats.token_weight[seq_id == s].mean(), torch.tensor(1.0))


def test_ones_as_weights_are_cross_entropy():
    inputs = make_inputs(cf=False)
    loss = fused_perce_loss(inputs.hidden, inputs.lm_head, inputs.target, token_weight=torch.ones(N))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(inputs.hidden @ inputs.lm_head.T, inputs.target))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fp16_gradients_survive_a_loss_scale(reduction):
    """The cast comes after the upstream gradient: many gradients here are 0 in fp16, yet normal numbers once scaled."""
    inputs = make_inputs(n=5, spread=8.0, bias=True, ignored=0.0).to(torch.float16)
    scale, count = 65536.0, 100
    options = {"upstream": scale, "num_items": count} if reduction == "mean" else {"upstream": scale / count}
    result, expected = call(inputs, reduction=reduction, **options), oracle(inputs, reduction=reduction, **options)
    lost = (expected.grads["lm_head"] * count / scale).half() == 0
    assert (lost & (expected.grads["lm_head"].abs() > 2e-6)).float().mean() > 0.02
    for name in TRAINABLE:
        torch.testing.assert_close(result.grads[name].double(), expected.grads[name], rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compact", [True, False])
def test_fp16_operands_do_not_overflow_under_a_loss_scale(monkeypatch, compact, reduction):
    """As on CUDA, where products of fp16 have fp32 results, so that dz is rounded to fp16 before them."""
    rounded = []

    def wide(a, b, out, *, add=False):
        rounded.append(a.dtype)
        return out.copy_(a.float() @ b.float() + (out if add else 0))

    monkeypatch.setattr(chunked, "can_widen", lambda x: True)
    monkeypatch.setattr(chunked, "product", wide)
    inputs = make_inputs(cf=False)
    inputs.hidden.mul_(0.1)  # so that the gradients themselves are numbers of fp16
    inputs.lm_head.mul_(0.1)
    inputs = inputs.to(torch.float16)
    weight = torch.where(inputs.target == IGNORE, 1e30, 2.0)  # of ignored rows it does not matter
    options = {"reduction": reduction, "upstream": 65536.0, "token_weight": weight, "compact": compact}
    result, expected = call(inputs, **options), oracle(inputs, **options)
    assert set(rounded) == {torch.float16}
    for name in ("hidden", "lm_head"):
        largest = expected.grads[name].abs().max().item()
        torch.testing.assert_close(result.grads[name].double(), expected.grads[name], rtol=0, atol=1e-3 * largest)


def test_token_logprobs_without_entropy_are_the_same():
    inputs = make_inputs()
    args = inputs.hidden, inputs.lm_head, inputs.target
    torch.testing.assert_close(token_logprobs(*args), token_logprobs(*args, return_entropy=True)[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(token_logprobs(*args), token_logprobs(*args, backend="reference"), rtol=1e-5, atol=1e-5)


def test_entropy_where_probabilities_underflow():
    """p·log p → 0: a one-hot row has entropy 0, a uniform one log V."""
    lm_head = torch.zeros(101, 2)
    lm_head[0, 0] = 1e4
    hidden = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    _, entropy = token_logprobs(hidden, lm_head, torch.tensor([0, 0]), return_entropy=True)
    torch.testing.assert_close(entropy, torch.tensor([0.0, 101.0]).log().clamp(min=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("compact", [True, False])
def test_no_tensor_of_n_by_v_exists(monkeypatch, compact, softcap, dtype):
    n, d, v = 160, 8, 997
    budget = 16 * v * 4
    monkeypatch.setattr(chunked, "LOGITS_BYTES", budget)
    monkeypatch.setattr(row_pass, "ROW_BLOCK_BYTES", budget // 3)
    inputs = make_inputs(n, d, v, bias=True).to(dtype)
    with Watch() as watch:
        chunked.sweep(*beneath(inputs, compact=compact, softcap=softcap))
        chunked.logprobs(beneath(inputs, compact=compact, softcap=softcap)[0], return_entropy=True)
    assert budget // 2 < watch.largest_bytes <= budget
    assert n * v * 2 > 4 * budget, "an (N, V) tensor in bf16 would exceed the limit"


@pytest.mark.parametrize("entropy", [False, True])
def test_logits_of_a_gpu_keep_to_their_budget(entropy):
    """Its rows are reduced all at once, for which an entropy takes a second buffer. The device "meta" has no data."""
    n, d, v = 5000, 8, 128_256
    hidden, lm_head, target = (x.to("meta") for x in (torch.zeros(n, d), torch.zeros(v, d), torch.zeros(n).long()))
    with Watch() as watch:
        chunked.logprobs(Call(hidden, lm_head, target, None, IGNORE, None, 1.0, compact=False), return_entropy=entropy)
    assert 0.98 < watch.peak / chunked.GPU_LOGITS_BYTES < 1.01


@NEEDED_AND_COST
@pytest.mark.parametrize("compact", [True, False])
def test_matrix_products_cost_the_floor_and_ignored_rows_nothing(compact, needed, per_token):
    inputs = make_inputs(bias=True)
    rows = int((inputs.target != IGNORE).sum()) if compact else N
    assert rows == N or rows < 0.8 * N
    with Watch() as watch:
        out = chunked.sweep(*beneath(inputs, compact=compact, needed=needed))
    assert watch.flop == per_token * rows * D * V
    assert [gradient.numel() > 0 for gradient in out[-3:]] == list(needed)


class Rounded(TorchDispatchMode):
    """Whether rows of V logits were copied to bf16."""

    seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        of_rows = func is torch.ops.aten._to_copy.default and result.shape[-1:] == (V,)
        self.seen |= of_rows and result.dtype == torch.bfloat16
        return result


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_logits_are_rounded_only_for_products(monkeypatch, needed):
    """A GPU multiplies 16-bit operands, so there the head stays as it is."""
    monkeypatch.setattr(chunked, "can_widen", lambda _: True)
    asked = beneath(make_inputs(bias=True).to(torch.bfloat16), needed=needed)
    with Rounded() as rounded:
        chunked.sweep(*asked)
    assert rounded.seen == any(needed[:2])


@pytest.mark.parametrize("compact", [True, False])
def test_what_a_gpu_waits_for(monkeypatch, compact):
    """Only a CPU checks targets; on a GPU, an id out of range is computed as some other id."""
    monkeypatch.setattr("perce_kernels.contract.check_target", lambda *_: None)
    inputs = make_inputs(bias=True)
    inputs.target[inputs.target == IGNORE] = V
    inputs.target[0] = IGNORE
    with Watch() as watch:
        out = chunked.sweep(*beneath(inputs, compact=compact))
        chunked.logprobs(beneath(inputs, compact=compact)[0], return_entropy=True)
    assert watch.syncs == ["nonzero"] * 2 * compact and out.loss_sum.isfinite()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trainable", [("hidden",), ("lm_head",), ("bias",), ()], ids=str)
def test_only_the_needed_gradients_are_computed(monkeypatch, trainable, reduction):
    asked, run = [], chunked.sweep
    monkeypatch.setattr(chunked, "sweep", lambda *args: asked.append(args[-1]) or run(*args))
    inputs = make_inputs(bias=True)
    leaves = {name: x.requires_grad_(name in trainable) for name, x in inputs.kwargs().items()}
    loss = fused_perce_loss(**leaves, reduction=reduction).sum()
    if trainable:
        loss.backward()
    expected = tuple(name in trainable for name in TRAINABLE)
    assert asked == ([expected] if trainable or reduction == "mean" else [])
    asked.clear()
    with torch.no_grad():
        fused_perce_loss(**leaves)
    assert asked == [(False, False, False)]


@pytest.mark.parametrize(("device", "name"), [("cpu", "LOGITS_BYTES"), ("cuda", "GPU_LOGITS_BYTES")])
def test_chunk_rows_is_a_pure_function_within_the_budget(monkeypatch, device, name):
    for budget in (2**20, 64 * 2**20, 128 * 2**20):
        monkeypatch.setattr(chunked, name, budget)
        for vocab_size in (211, 49152, 262144):
            for dtype, itemsize in ((torch.bfloat16, 4), (torch.float32, 4), (torch.float64, 8)):
                for buffers in (1, 2):
                    rows = chunked.chunk_rows(vocab_size, dtype, buffers, device)
                    row_bytes = buffers * vocab_size * itemsize
                    assert rows == 16 or rows * row_bytes <= budget < (rows + 1) * row_bytes
                    assert rows == chunked.chunk_rows(vocab_size, dtype, buffers, device)


def test_shipped_logits_budget():
    """At most 128 MiB on a CPU; read from the source because the fixture above replaces the attribute."""
    spec = importlib.util.find_spec("perce_kernels.chunked")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert 2**20 <= fresh.LOGITS_BYTES <= 128 * 2**20


@pytest.mark.parametrize("rows", [1, 16, 20, 1000])
def test_result_does_not_depend_on_the_chunk_size(monkeypatch, rows):
    monkeypatch.setattr(chunked, "LOGITS_BYTES", rows * V * 4)
    inputs = make_inputs(bias=True)
    assert_matches(call(inputs), oracle(inputs), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("normalize", ["none", "batch", "sequence"])
def test_same_inputs_same_bits(normalize, dtype):
    options = {"normalize": normalize} | ({"seq_id": torch.arange(300) % 7} if normalize == "sequence" else {})
    inputs = make_inputs(n=300, d=64, v=2003, bias=True).to(dtype)
    first, second = call(inputs, **options), call(inputs, **options)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(a, b) for a, b in zip(first.stats, second.stats, strict=True))
    assert all(torch.equal(first.grads[name], second.grads[name]) for name in TRAINABLE)
