"""What the tests of a sharded head share: layouts, the cases that ranks run, and one rank's shard of the inputs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.numerics import (
    IGNORE,
    Inputs,
    Result,
    assert_matches,
    call,
    make_inputs,
    oracle,
)

N, D, V = 22, 8, 173
LAYOUTS = {  # borders between the ranks' shards
    "two": (97,),
    "two, first empty": (0,),
    "three": (58, 116),
    "three uneven": (5, 130),
    "three, middle empty": (97, 97),
    "three, last empty": (140, V),
}
GROUPS: dict[str, Any] = {}
CASES: dict[str, Callable[[], None]] = {}
SLOW: set[str] = set()


def case(name: str, *, slow: bool = False):
    def register(run: Callable[[], None]):
        assert name not in CASES
        CASES[name] = run
        if slow:
            SLOW.add(name)
        return run

    return register


class Shards:
    """This rank's part of a layout."""

    def __init__(self, layout: str):
        self.name = layout.split()[0].rstrip(",")
        self.group = GROUPS[self.name]
        self.rank = dist.get_rank(self.group)
        borders = (0, *LAYOUTS[layout], V)
        self.rows = slice(borders[self.rank], borders[self.rank + 1])
        self.arguments = {"group": self.group, "vocab_start": self.rows.start, "vocab_size": V}

    def shard(self, inputs: Inputs) -> Inputs:
        bias = None if inputs.bias is None else inputs.bias[self.rows]
        return Inputs(inputs.hidden, inputs.lm_head[self.rows], inputs.target, inputs.hidden_cf, bias)

    def call(self, inputs: Inputs, **options: Any) -> Result:
        return call(self.shard(inputs), **self.arguments, **options)

    def of(self, whole: Result) -> Result:
        """The part of the unsharded result that this rank should have."""
        grads = {name: x if name == "hidden" else x[self.rows] for name, x in whole.grads.items()}
        return Result(whole.loss, whole.stats, grads)

    def assert_same_on_every_rank(self, *tensors: torch.Tensor) -> None:
        for x in tensors:
            everywhere = [torch.empty_like(x) for _ in range(self.group.size())]
            dist.all_gather(everywhere, x.contiguous(), self.group)
            assert all(torch.equal(x, other) for other in everywhere)


def inputs_for(layout: str, *, n=N, dtype=torch.float32, ignored=0.3, **options: Any) -> Inputs:
    """make_inputs with a target on either side of every border, on the first and on the last token."""
    inputs = make_inputs(n, D, V, ignored=ignored, bias=True, **options)
    edges = sorted({min(max(b + step, 0), V - 1) for b in (0, *LAYOUTS[layout], V) for step in (-1, 0)})
    if n >= len(edges):
        inputs.target[: len(edges)] = torch.tensor(edges)
    return inputs.to(dtype)


def source_of(inputs: Inputs, source: str) -> tuple[Inputs, dict[str, torch.Tensor]]:
    if source == "hidden_cf":
        return inputs, {}
    values = torch.rand(inputs.target.shape[0], generator=torch.Generator().manual_seed(7))
    without = Inputs(inputs.hidden, inputs.lm_head, inputs.target, None, inputs.bias)
    return without, {source: values * (-9 if source == "logp_cf" else 9)}


def assert_equal_to_unsharded(actual: Result, whole: Result) -> None:
    """To fp32 rounding, with room for another order of summation."""
    pairs = {"loss": (actual.loss, whole.loss)}
    pairs |= {name: (getattr(actual.stats, name), getattr(whole.stats, name)) for name in whole.stats._fields}
    pairs |= {f"d{name}": (actual.grads[name], whole.grads[name]) for name in whole.grads}
    for name, (a, b) in pairs.items():
        torch.testing.assert_close(a, b, rtol=3e-5, atol=5e-6, msg=lambda m, name=name: f"{name}: {m}")


def check(layout: str, backend: str, *, source="hidden_cf", compact=True, n=N, **options: Any) -> None:
    shards = Shards(layout)
    inputs, weights = source_of(inputs_for(layout, n=n, ignore_index=options.get("ignore_index", IGNORE)), source)
    options = options | weights
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(n if options.get("reduction") == "none" else (), generator=generator)
    actual = shards.call(inputs, backend=backend, compact=compact, upstream=upstream, **options)
    assert_matches(actual, shards.of(oracle(inputs, upstream=upstream, **options)), torch.float32)
    whole = call(inputs, backend=backend, compact=compact, upstream=upstream, **options)
    assert_equal_to_unsharded(actual, shards.of(whole))
    shards.assert_same_on_every_rank(actual.loss, *actual.stats, actual.grads["hidden"])
