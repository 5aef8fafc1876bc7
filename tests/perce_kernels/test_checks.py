"""Arguments of the op: errors that name them, and the user's autocast."""

import inspect
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from perce_kernels import chunked, fused_perce_loss, token_logprobs
from perce_kernels.loss import HeadOptions, LossOptions
from tests.helpers.numerics import TRAINABLE, Inputs, call, make_inputs
from tests.helpers.subjects import EACH, TRITON

pytestmark = pytest.mark.usefixtures("poisoned_memory", "small_chunks")


N, D, V = 37, 24, 211
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
    ("clip_max", {"clip_max": 1e39}),
    ("contrast", {"contrast": "difference"}),
    ("normalize", {"normalize": "mean"}),
    ("reduction", {"reduction": "avg"}),
    ("backend", {"backend": "cuda"}),
    ("seq_id", {"normalize": "sequence"}),
    ("seq_id", {"seq_id": LONG}),
    ("seq_id", {"normalize": "sequence", "seq_id": LONG[1:]}),
    ("seq_id", {"normalize": "sequence", "seq_id": LONG.float()}),
    ("seq_id", {"normalize": "sequence", "seq_id": LONG.bool()}),
    ("seq_id", {"normalize": "sequence", "seq_id": LONG.to(torch.uint16)}),
    ("num_items", {"num_items": 0}),
    ("num_items", {"num_items": -3}),
    ("num_items", {"num_items": 2.0}),
    ("num_items", {"num_items": True}),
    ("num_items", {"num_items": torch.ones(1)}),
    ("num_items", {"num_items": 5, "reduction": "sum"}),
    ("num_items", {"num_items": "6"}),
    ("clip_max", {"clip_max": None}),
    ("clip_min", {"clip_min": torch.tensor(1.0)}),
    ("softcap", {"softcap": "30"}),
    ("softcap", {"softcap": torch.tensor(30.0)}),
    ("logit_scale", {"logit_scale": None}),
    ("ignore_index", {"ignore_index": None}),
    ("ignore_index", {"ignore_index": -100.0}),
    ("softcap", {"softcap": True}),
    ("ignore_index", {"ignore_index": False}),
    ("softcap", {"softcap": 0.0}),
    ("softcap", {"softcap": float("inf")}),
    ("logit_scale", {"logit_scale": float("nan")}),
]


@pytest.mark.parametrize(("named", "change"), BAD_ARGUMENTS, ids=lambda x: x if isinstance(x, str) else "+".join(x))
def test_bad_argument_is_a_value_error_that_names_it(named, change):
    with pytest.raises(ValueError, match=f"{named}.*got|got {named}$"):
        fused_perce_loss(**make_inputs().kwargs() | change)


def test_a_scale_that_could_train_is_refused_with_what_trains_it():
    """The fused backends would compute no gradient for it."""
    inputs = make_inputs(bias=True)
    scale = torch.nn.Parameter(torch.tensor(0.5))
    refused = r"^logit_scale: expected a number, got a tensor\. To train it, multiply hidden, hidden_cf and bias by it"
    for backend in ("auto", "torch", "reference"):
        with pytest.raises(ValueError, match=refused):
            fused_perce_loss(**inputs.kwargs(), logit_scale=scale, backend=backend)
    with pytest.raises(ValueError, match=refused):
        token_logprobs(inputs.hidden, inputs.lm_head, inputs.target, logit_scale=scale)
    changed = {name: getattr(inputs, name) * scale for name in ("hidden", "hidden_cf", "bias")}
    actual = fused_perce_loss(**inputs.kwargs() | changed)
    torch.testing.assert_close(actual, fused_perce_loss(**inputs.kwargs(), logit_scale=0.5))
    assert torch.autograd.grad(actual, scale)[0].isfinite()


@pytest.mark.parametrize("backend", EACH)
def test_eight_bits_are_too_few(backend):
    """torch promotes them to no other dtype, and the kernels round the gradient of the logits to theirs."""
    inputs = TRITON.of(make_inputs()).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"^hidden: expected .* of 16 bits or more, got torch\.float8"):
        fused_perce_loss(**inputs.kwargs(), backend=backend)


def test_numbers_of_numpy():
    inputs = make_inputs()
    expected = fused_perce_loss(**inputs.kwargs(), num_items=6, softcap=4.0)
    assert torch.equal(fused_perce_loss(**inputs.kwargs(), num_items=np.int64(6), softcap=np.float32(4)), expected)
    for dtype in (torch.float64, torch.bfloat16, torch.int64):  # the loss keeps its own
        counted = fused_perce_loss(**inputs.kwargs(), num_items=torch.tensor(6, dtype=dtype), softcap=4.0)
        torch.testing.assert_close(counted, expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_tensors_without_data(backend):
    """Autocast knows nothing of the device "meta"."""
    inputs = {name: x.to("meta") for name, x in make_inputs().kwargs().items()}
    assert fused_perce_loss(**inputs, backend=backend).is_meta
    assert token_logprobs(inputs["hidden"], inputs["lm_head"], inputs["target"], backend=backend).is_meta


@pytest.mark.parametrize("name", ["hidden", "lm_head", "target", "hidden_cf", "bias", "seq_id"])
def test_what_is_no_tensor_is_named(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected a tensor, got list"):
        fused_perce_loss(**make_inputs().kwargs() | {name: [1.0]})
    with pytest.raises(ValueError, match=r"^lm_head: expected a tensor, got Linear\. Pass its \.weight"):
        fused_perce_loss(**make_inputs().kwargs() | {"lm_head": torch.nn.Linear(2, 3)})
    if name in ("hidden", "lm_head", "target", "bias"):
        inputs = make_inputs()
        given = {"hidden": inputs.hidden, "lm_head": inputs.lm_head, "target": inputs.target}
        with pytest.raises(ValueError, match=rf"^{name}: expected a tensor, got ndarray"):
            token_logprobs(**given | {name: np.ones(3)})


class Adapted(torch.nn.Module):
    """Like a layer of PEFT's, whose `weight` is that of the layer beneath."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.weight = layer, layer.weight


REMEDIES = [
    ({"hidden": torch.zeros(2, N, D)}, "target[:, 1:][mask[:, 1:]]; likewise of the other pass"),
    ({"lm_head": Adapted(torch.nn.Linear(D, V))}, "Merge its adapter, or leave the adapter off the head"),
    ({"target": LONG.int()}, "Pass target.long()"),
    ({"lm_head": torch.zeros(V, D, dtype=torch.bfloat16)}, "Cast one of them, or use torch.autocast"),
    ({"lm_head": torch.zeros(D, V)}, "Pass lm_head.T"),
    ({"lm_head": torch.zeros(0)}, "If its parameters are partitioned (ZeRO-3), gather it first"),
    ({"hidden": torch.zeros(V, D), "lm_head": torch.zeros(N, D)}, "hidden comes before lm_head"),
    ({"target": LONG.to(torch.uint8)}, "Pass target.long()"),
    ({"target": LONG[1:].int()}, f"torch.int32 ({N - 1},) on cpu"),  # another type would not help
    ({"group": SimpleNamespace(get_group=None), "vocab_start": 0, "vocab_size": V}, "Pass mesh.get_group()"),
]


@pytest.mark.parametrize(("change", "remedy"), REMEDIES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_likely_mistake_is_told_what_puts_it_right(change, remedy):
    with pytest.raises(ValueError, match=f"{next(iter(change))}.*got.*{re.escape(remedy)}$"):
        fused_perce_loss(**make_inputs().kwargs() | change)


def test_a_distributed_tensor_is_named(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        inputs = make_inputs()
        head = distribute_tensor(inputs.lm_head, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match=r"^lm_head: expected a plain tensor, got a DTensor.*vocab_start="):
            fused_perce_loss(**inputs.kwargs() | {"lm_head": head})
        with pytest.raises(
            ValueError, match=r"^hidden: expected a plain tensor, got a DTensor\. Pass \.full_tensor\(\)$"
        ):
            fused_perce_loss(**inputs.kwargs() | {"hidden": head})
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("token", [V, -1, 10**12])
def test_target_outside_the_vocabulary(backend, reduction, token):
    inputs = TRITON.of(make_inputs())
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
    """A bf16 model with an fp32 head has such inputs; the cast comes before the check."""
    inputs = make_inputs()
    mixed = inputs.kwargs() | {"hidden": inputs.hidden.bfloat16()}
    with pytest.raises(ValueError, match="lm_head"):
        fused_perce_loss(**mixed)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused_perce_loss(**mixed), fused_perce_loss(**inputs.to(torch.bfloat16).kwargs()))


def test_type_checkers_know_every_option():
    for op, options in ((fused_perce_loss, LossOptions), (token_logprobs, HeadOptions)):
        named = [name for name, given in inspect.signature(op).parameters.items() if given.kind is given.KEYWORD_ONLY]
        assert options.__optional_keys__ == {name for name in named if not name.startswith("return_")}
