"""What the op promises besides its values: errors, memory, cost and isolation from the user's settings."""

import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perce_kernels import chunked, fused_perce_loss, row_pass, token_logprobs
from tests.device import WAITS
from tests.numerics import IGNORE, TRAINABLE, Inputs, assert_matches, beneath, call, make_inputs, oracle

pytestmark = pytest.mark.usefixtures("poisoned_memory", "small_chunks")
N, D, V = 37, 24, 211


# --- Errors ----------------------------------------------------------------------------------------------------------

LONG = torch.zeros(N, dtype=torch.int64)
BAD_ARGUMENTS = [
    ("hidden", {"hidden": torch.zeros(2, N, D)}),
    ("hidden", {"hidden": torch.zeros(N, D, dtype=torch.int64)}),
    ("lm_head", {"lm_head": torch.zeros(V, D + 1)}),
    ("lm_head", {"lm_head": torch.zeros(0, D)}),
    ("lm_head", {"lm_head": torch.zeros(V, D, dtype=torch.bfloat16)}),
    ("lm_head", {"lm_head": torch.zeros(V, D, device="meta")}),
    ("target", {"target": LONG[1:]}),
    ("target", {"target": LONG.int()}),
    ("target", {"target": LONG + V}),
    ("target", {"target": LONG - 1}),
    ("hidden_cf", {"hidden_cf": torch.zeros(N + 1, D)}),
    ("hidden_cf", {"hidden_cf": torch.zeros(N, D, dtype=torch.float64)}),
    ("logp_cf", {"hidden_cf": None, "logp_cf": torch.zeros(N + 1)}),
    ("logp_cf", {"hidden_cf": None, "logp_cf": LONG}),
    ("token_weight", {"hidden_cf": None, "token_weight": torch.zeros(N, 1)}),
    ("hidden_cf and logp_cf", {"logp_cf": torch.zeros(N)}),
    ("hidden_cf and token_weight", {"token_weight": torch.zeros(N)}),
    ("none", {"hidden_cf": None}),
    ("bias", {"bias": torch.zeros(V + 1)}),
    ("bias", {"bias": torch.zeros(V, dtype=torch.int64)}),
    ("clip_min", {"clip_min": -0.1}),
    ("clip_min", {"clip_min": 6.0}),
    ("clip_min", {"clip_min": float("nan")}),
    ("clip_max", {"clip_max": float("inf")}),
    ("clip_max", {"clip_max": float("nan")}),
    ("contrast", {"contrast": "difference"}),
    ("normalize", {"normalize": "mean"}),
    ("reduction", {"reduction": "avg"}),
    ("backend", {"backend": "cuda"}),
    ("seq_id", {"normalize": "sequence"}),
    ("seq_id", {"seq_id": LONG}),
    ("seq_id", {"normalize": "sequence", "seq_id": LONG[1:]}),
    ("seq_id", {"normalize": "sequence", "seq_id": LONG.float()}),
    ("seq_id", {"normalize": "sequence", "seq_id": LONG.bool()}),
    ("num_items", {"num_items": 0}),
    ("num_items", {"num_items": -3}),
    ("num_items", {"num_items": 2.0}),
    ("num_items", {"num_items": True}),
    ("num_items", {"num_items": torch.ones(1)}),
    ("num_items", {"num_items": 5, "reduction": "sum"}),
    ("softcap", {"softcap": 0.0}),
    ("softcap", {"softcap": float("inf")}),
    ("logit_scale", {"logit_scale": float("nan")}),
]


@pytest.mark.parametrize(("named", "change"), BAD_ARGUMENTS, ids=lambda x: x if isinstance(x, str) else "+".join(x))
def test_bad_argument_is_a_value_error_that_names_it(named, change):
    with pytest.raises(ValueError, match=f"{named}.*got|got {named}$"):
        fused_perce_loss(**make_inputs().kwargs() | change)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("token", [V, -1, 10**12])
def test_target_outside_the_vocabulary(backend, reduction, token):
    inputs = make_inputs()
    inputs.target[11] = token
    with pytest.raises(ValueError, match=f"target: expected ids in .*{V}.* got {token} at row 11"):
        fused_perce_loss(**inputs.kwargs(), backend=backend, reduction=reduction)
    with pytest.raises(ValueError, match=r"target.*row 11"):
        token_logprobs(inputs.hidden, inputs.lm_head, inputs.target, backend=backend)


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("lm_head", {"lm_head": torch.zeros(V, D, dtype=torch.float64)}),
        ("target", {"target": LONG[1:]}),
        ("bias", {"bias": torch.zeros(1)}),
        ("softcap", {"softcap": -1.0}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_token_logprobs_check_their_arguments(named, change):
    inputs = make_inputs()
    arguments = {"hidden": inputs.hidden, "lm_head": inputs.lm_head, "target": inputs.target}
    with pytest.raises(ValueError, match=f"^{named}.*got"):
        token_logprobs(**arguments | change)


def test_optional_arguments_are_keyword_only():
    inputs = make_inputs()
    with pytest.raises(TypeError):
        fused_perce_loss(inputs.hidden, inputs.lm_head, inputs.target, None, torch.zeros(N))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_order_gradient_is_refused(reduction):
    inputs = make_inputs()
    hidden = inputs.hidden.requires_grad_()
    loss = fused_perce_loss(hidden, inputs.lm_head, inputs.target, inputs.hidden_cf, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="higher-order"):
        torch.autograd.grad(loss, hidden, create_graph=True)


# --- Empty, ignored, NaN ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, N])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("normalize", ["none", "batch", "sequence"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nothing_to_learn_is_a_zero_loss_connected_to_every_input(n, compact, normalize, reduction, backend):
    inputs = make_inputs(n=N, bias=True, ignored=1.1)
    inputs = Inputs(inputs.hidden[:n], inputs.lm_head, inputs.target[:n], inputs.hidden_cf[:n], inputs.bias)
    options = {"seq_id": torch.zeros(n, dtype=torch.int64)} if normalize == "sequence" else {}
    result = call(inputs, compact=compact, normalize=normalize, reduction=reduction, backend=backend, **options)
    assert result.loss.shape == ((n,) if reduction == "none" else ())
    assert not result.loss.any()
    for name in TRAINABLE:
        assert result.grads[name] is not None and not result.grads[name].any()
        assert result.grads[name].shape == getattr(inputs, name).shape
    assert all(value.shape == (n,) and not value.any() for value in result.stats)


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"normalize": "batch"}], ids=lambda o: "".join(o) or "-"
)
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("source", ["hidden_cf", "logp_cf", "token_weight"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_in_ignored_rows_reaches_nothing(bad, source, compact, options):
    inputs = make_inputs(bias=True)
    ignored = inputs.target == IGNORE
    weights = {} if source == "hidden_cf" else {source: torch.rand(N)}
    hidden_cf = inputs.hidden_cf if source == "hidden_cf" else None
    clean = Inputs(inputs.hidden, inputs.lm_head, inputs.target, hidden_cf, inputs.bias)
    expected = call(clean, compact=compact, **options, **weights)
    for x in (clean.hidden, clean.hidden_cf, *weights.values()):
        if x is not None:
            x[ignored] = bad
    result = call(clean, compact=compact, **options, **weights)
    assert torch.equal(result.loss, expected.loss)
    for name in TRAINABLE:
        assert torch.equal(result.grads[name], expected.grads[name])
    for value in result.stats:
        assert value.isfinite().all() and not value[ignored].any()


def test_ignored_rows_have_no_gradient_and_no_statistics():
    inputs = make_inputs()
    result, ignored = call(inputs), inputs.target == IGNORE
    assert not result.grads["hidden"][ignored].any() and result.grads["hidden"][~ignored].all()
    assert all(not value[ignored].any() and value[~ignored].all() for value in result.stats)


# --- Memory and cost -------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Beneath the op: each tensor's storage, the FLOP of matrix products, and what would wait for a device."""

    def __init__(self):
        super().__init__()
        self.largest_bytes = 0
        self.flop = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.largest_bytes = max(self.largest_bytes, x.untyped_storage().nbytes())
        name = func.overloadpacket.__name__
        assert name not in ("bmm", "baddbmm", "linear", "matmul"), f"{name} is not counted"
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        if name in WAITS:
            self.waits.append(name)
        return result


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
    assert n * v * 2 > 4 * budget, "(N, V) in bf16 would not have passed"


@pytest.mark.parametrize(
    ("needed", "per_token"),
    [((True, True, True), 8), ((True, False, False), 6), ((False, True, False), 6), ((False, False, False), 4),
     ((False, False, True), 4)],
    ids=["trainable", "frozen head", "frozen hidden", "statistics only", "bias only"],
)  # fmt: skip
@pytest.mark.parametrize("compact", [True, False])
def test_matrix_products_cost_the_floor_and_ignored_rows_nothing(compact, needed, per_token):
    inputs = make_inputs(bias=True)
    rows = int((inputs.target != IGNORE).sum()) if compact else N
    assert rows == N or rows < 0.8 * N
    with Watch() as watch:
        out = chunked.sweep(*beneath(inputs, compact=compact, needed=needed))
    assert watch.flop == per_token * rows * D * V
    assert [gradient.numel() > 0 for gradient in out[-3:]] == list(needed)


@pytest.mark.parametrize("compact", [True, False])
def test_what_a_gpu_waits_for(monkeypatch, compact):
    """The check of the targets is the CPU's own; an id that it would have found is computed as some other."""
    monkeypatch.setattr("perce_kernels.contract.check_target", lambda *_: None)
    inputs = make_inputs(bias=True)
    inputs.target[inputs.target == IGNORE] = V
    inputs.target[0] = IGNORE
    with Watch() as watch:
        out = chunked.sweep(*beneath(inputs, compact=compact))
        chunked.logprobs(beneath(inputs, compact=compact)[0], return_entropy=True)
    assert watch.waits == ["nonzero"] * 2 * compact and out.loss_sum.isfinite()


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


def test_chunk_rows_is_a_pure_function_within_the_budget(monkeypatch):
    for budget in (2**20, 64 * 2**20, 128 * 2**20):
        monkeypatch.setattr(chunked, "LOGITS_BYTES", budget)
        for vocab_size in (211, 49152, 262144):
            for dtype, itemsize in ((torch.bfloat16, 4), (torch.float32, 4), (torch.float64, 8)):
                for buffers in (1, 2):
                    rows = chunked.chunk_rows(vocab_size, dtype, buffers)
                    row_bytes = buffers * vocab_size * itemsize
                    assert rows == 16 or rows * row_bytes <= budget < (rows + 1) * row_bytes
                    assert rows == chunked.chunk_rows(vocab_size, dtype, buffers)


def test_shipped_logits_budget():
    """≤ 128 MiB on CPU, read from the source because the fixture above replaces the attribute."""
    spec = importlib.util.find_spec("perce_kernels.chunked")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert 2**20 <= fresh.LOGITS_BYTES <= 128 * 2**20


@pytest.mark.parametrize("rows", [1, 16, 20, 1000])
def test_result_does_not_depend_on_the_chunk_size(monkeypatch, rows):
    monkeypatch.setattr(chunked, "LOGITS_BYTES", rows * V * 4)
    inputs = make_inputs(bias=True)
    assert_matches(call(inputs), oracle(inputs), torch.float32)


# --- The user's settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("source", ["hidden_cf", "logp_cf"])
def test_autocast_casts_the_inputs_and_leaves_the_body_alone(source, reduction):
    inputs = make_inputs(bias=True)
    weights = {} if source == "hidden_cf" else {"logp_cf": -torch.rand(N) * 9}
    hidden_cf = inputs.hidden_cf if source == "hidden_cf" else None
    inputs = Inputs(inputs.hidden, inputs.lm_head, inputs.target, hidden_cf, inputs.bias)
    expected = call(inputs.to(torch.bfloat16), reduction=reduction, **weights)
    with torch.autocast("cpu", torch.bfloat16):
        result = call(inputs, reduction=reduction, **weights)
    assert torch.equal(result.loss, expected.loss) and result.loss.dtype == torch.float32
    for ours, theirs in zip(result.stats, expected.stats, strict=True):
        assert torch.equal(ours, theirs), "fp32 statistics of the bf16 inputs, and an uncast logp_cf"
    for name in TRAINABLE:
        assert result.grads[name].dtype == torch.float32
        assert torch.equal(result.grads[name], expected.grads[name].float())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_is_off_inside_the_op_forward_and_backward(monkeypatch, reduction):
    seen = []
    for name in ("sweep", "logprobs"):
        run = getattr(chunked, name)

        def spy(*args, run=run):
            seen.append(torch.is_autocast_enabled("cpu"))
            return run(*args)

        monkeypatch.setattr(chunked, name, spy)
    with torch.autocast("cpu", torch.bfloat16):
        call(make_inputs(), reduction=reduction)
    assert seen and not any(seen)


def test_autocast_accepts_inputs_of_different_dtypes():
    """What a bf16 model with an fp32 head sees: the cast comes before the check."""
    inputs = make_inputs()
    mixed = inputs.kwargs() | {"hidden": inputs.hidden.bfloat16()}
    with pytest.raises(ValueError, match="lm_head"):
        fused_perce_loss(**mixed)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused_perce_loss(**mixed), fused_perce_loss(**inputs.to(torch.bfloat16).kwargs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("normalize", ["none", "batch", "sequence"])
def test_same_inputs_same_bits(normalize, dtype):
    options = {"normalize": normalize} | ({"seq_id": torch.arange(300) % 7} if normalize == "sequence" else {})
    inputs = make_inputs(n=300, d=64, v=2003, bias=True).to(dtype)
    first, second = call(inputs, **options), call(inputs, **options)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(a, b) for a, b in zip(first.stats, second.stats, strict=True))
    assert all(torch.equal(first.grads[name], second.grads[name]) for name in TRAINABLE)


def test_inputs_are_left_as_they_were():
    inputs = make_inputs(bias=True)
    before = {name: x.clone() for name, x in inputs.kwargs().items()}
    call(inputs, softcap=5.0, logit_scale=0.5)
    chunked.sweep(*beneath(inputs, compact=False))
    assert all(torch.equal(x, before[name]) for name, x in inputs.kwargs().items())
