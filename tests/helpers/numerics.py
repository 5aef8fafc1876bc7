"""Shared by the op's tests: inputs, the fp64 oracle, and the comparison "as accurate as eager PyTorch"."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from perce_kernels import PerCEStats, fused_perce_loss, reference
from perce_kernels.contract import Call, Contrasting, Needed, Weighting

IGNORE = -100
DEFAULTS: dict[str, Any] = {"ignore_index": IGNORE, "softcap": None, "logit_scale": 1.0, "compact": True}
TRAINABLE = ("hidden", "lm_head", "bias")


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call; those that are None are not passed."""

    hidden: Tensor  # (N, D)
    lm_head: Tensor  # (V, D)
    target: Tensor  # (N,)
    hidden_cf: Tensor | None = None  # (N, D)
    bias: Tensor | None = None  # (V,)

    def to(self, dtype: torch.dtype) -> "Inputs":
        moved = {name: x.detach().to(dtype) for name, x in vars(self).items() if x is not None and name != "target"}
        return replace(self, **moved)

    def kwargs(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if x is not None}


def beneath(
    inputs: Inputs, *, needed=(True, True, True), weights: dict[str, Tensor] | None = None, **options: Any
) -> tuple[Call, Weighting, Needed]:
    """The call that a backend gets for `inputs`, made below the registered op, where dispatch modes can see inside."""
    call = Call(inputs.hidden, inputs.lm_head, inputs.target, inputs.bias, **DEFAULTS | options)
    sources = {"hidden_cf": inputs.hidden_cf, "logp_cf": None, "token_weight": None} | (weights or {})
    return call, Weighting(**sources, contrasting=Contrasting("log", 0.8, 5.0)), Needed(*needed)


@dataclass
class Result:
    """One call and one backward."""

    loss: Tensor
    stats: PerCEStats
    grads: dict[str, Tensor | None]


def make_inputs(
    n=37, d=24, v=211, dtype=torch.float32, *, spread=3.0, ignored=0.3, bias=False, cf=True, seed=0,
    ignore_index=IGNORE,
) -> Inputs:  # fmt: skip
    """Random inputs with logits of standard deviation `spread`; a share `ignored` of the targets is ignore_index.

    V and N are not multiples of a block size. A third of the targets are the likeliest token, so that p near 1 occurs,
    and the contrast covers both bounds of the clip and its inside.
    """
    g = torch.Generator().manual_seed(seed)
    hidden, hidden_cf = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2))
    lm_head = torch.randn(v, d, generator=g, dtype=torch.float64) * spread / d**0.5
    target = torch.randint(0, v, (n,), generator=g)
    target[::3] = (hidden @ lm_head.T).argmax(1)[::3]
    target[torch.rand(n, generator=g) < ignored] = ignore_index
    b = torch.randn(v, generator=g, dtype=torch.float64) if bias else None
    return Inputs(hidden, lm_head, target, hidden_cf if cf else None, b).to(dtype)


def call(inputs: Inputs, *, upstream: Tensor | float = 1.0, op=fused_perce_loss, **options: Any) -> Result:
    """Run the op with every input that may train requiring a gradient, and backward from `upstream`·loss."""
    kwargs = {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in inputs.kwargs().items()}
    loss, stats = op(**kwargs, **options, return_stats=True)
    (loss * upstream).sum().backward()
    assert "hidden_cf" not in kwargs or kwargs["hidden_cf"].grad is None, "hidden_cf never receives a gradient"
    return Result(loss.detach(), stats, {name: kwargs[name].grad for name in TRAINABLE if name in kwargs})


def oracle(inputs: Inputs, *, upstream: Tensor | float = 1.0, **options: Any) -> Result:
    """The reference in fp64 on the same values."""
    doubled = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() and x.dim() else x
        for name, x in options.items()
        if name not in ("compact", "backend")
    }
    if isinstance(upstream, Tensor):
        upstream = upstream.double()
    return call(inputs.to(torch.float64), upstream=upstream, op=_reference, **doubled)


def _reference(hidden, lm_head, target, *, return_stats, **options):
    loss, logp, logp_cf, weight = reference.perce_loss(hidden, lm_head, target, **options)
    pir = torch.zeros_like(logp) if options.get("token_weight") is not None else logp - logp_cf
    return loss, PerCEStats(logp, logp_cf, pir, weight)


def eager(inputs: Inputs, *, upstream: Tensor | float = 1.0, **options: Any) -> Result:
    """What a user would write in PyTorch, all in the input dtype: its accuracy is the one to compare with."""
    return call(inputs, upstream=upstream, op=_eager, **options)


def _eager(
    hidden, lm_head, target, hidden_cf=None, bias=None, *, softcap=None, logit_scale=1.0, reduction="mean",
    normalize="none", seq_id=None, return_stats=True,
):  # fmt: skip
    def logprobs(x):
        z = torch.nn.functional.linear(x, lm_head, bias) * logit_scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return -torch.nn.functional.cross_entropy(z, target, reduction="none", ignore_index=IGNORE)

    logp, valid = logprobs(hidden), target != IGNORE
    with torch.no_grad():
        logp_cf = logprobs(hidden_cf)
    weight = torch.where(valid, (logp - logp_cf).detach().clamp(0.8, 5.0), 0)
    weight = reference.normalize_weight(weight, valid, normalize, seq_id)
    loss = -(weight * logp)
    loss = loss if reduction == "none" else loss.sum() / valid.sum()
    return loss, PerCEStats(logp.detach(), logp_cf, (logp - logp_cf).detach(), weight)


def max_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max())


def assert_as_accurate_as_torch(
    name: str, actual: Tensor, in_torch: Tensor, expected: Tensor, *, factor: float = 2.0, floor: float = 1e-5
) -> None:
    """Largest error against the fp64 oracle ≤ factor × that of eager PyTorch + floor; prints the worst element."""
    assert actual.shape == expected.shape == in_torch.shape
    error = (actual.double() - expected).abs()
    assert not error.isnan().any(), f"{name}: NaN"
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    allowed = factor * max_error(in_torch, expected) + floor
    message = (
        f"{name}{list(index)}: {float(actual[index]):.8g}, oracle {float(expected[index]):.8g}, "
        f"eager {float(in_torch[index]):.8g}; error {float(error[index]):.3g}, allowed {allowed:.3g}"
    )
    print(message)
    assert float(error[index]) <= allowed, message


def assert_matches(result: Result, expected: Result, dtype: torch.dtype, slack: float = 1.0) -> None:
    """Loss, statistics and gradients of `result` against the oracle, to the accuracy of `dtype`'s statistics."""
    rtol, atol = {torch.float64: (1e-9, 1e-11), torch.float32: (2e-4, 4e-6)}[dtype]

    def assert_close(name: str, actual: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(
            actual, wanted, rtol=slack * rtol, atol=slack * atol, check_dtype=False, msg=lambda m: f"{name}: {m}"
        )

    assert_close("loss", result.loss, expected.loss)
    for name, value in result.stats._asdict().items():
        assert not value.requires_grad
        assert_close(name, value, getattr(expected.stats, name))
    assert result.grads.keys() == expected.grads.keys()
    for name, value in result.grads.items():
        assert value.dtype == dtype
        assert_close(f"d{name}", value, expected.grads[name])


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values without a unit stride: every second element of a transposed buffer."""
    buffer = x.new_zeros([2 * s for s in reversed(x.shape)])
    view = buffer[tuple(slice(None, None, 2) for _ in x.shape)].permute(*reversed(range(x.dim())))
    view.copy_(x)
    assert not view.is_contiguous()
    return view
