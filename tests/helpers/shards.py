"""Shared by the tests of a sharded head: layouts, and one rank's shard as a subject of the contract tests."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.numerics import Inputs, Result, call
from tests.helpers.subjects import Subject

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


class Shards:
    """This rank's part of a layout."""

    def __init__(self, layout: str):
        self.group = GROUPS[layout.split()[0].rstrip(",")]
        self.rank = dist.get_rank(self.group)
        borders = (0, *LAYOUTS[layout], V)
        self.rows = slice(borders[self.rank], borders[self.rank + 1])
        self.arguments = {"group": self.group, "vocab_start": self.rows.start, "vocab_size": V}

    def shard(self, inputs: Inputs) -> Inputs:
        bias = None if inputs.bias is None else inputs.bias[self.rows]
        return replace(inputs, lm_head=inputs.lm_head[self.rows], bias=bias)

    def call(self, inputs: Inputs, **options: Any) -> Result:
        return call(self.shard(inputs), **self.arguments, **options)

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks, in order."""
        parts: list[Any] = [None] * self.group.size()
        dist.all_gather_object(parts, value, self.group)
        return parts

    def assert_same(self, *tensors: torch.Tensor) -> None:
        """Asserts that tensors are equal on every rank, to the bit."""
        for theirs in self.gathered(tensors):
            for mine, other in zip(tensors, theirs, strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)

    def whole(self, mine: Result) -> Result:
        """The result for the whole head, from the results of all ranks."""
        self.assert_same(mine.loss, *mine.stats, mine.grads["hidden"])
        sharded = [name for name in mine.grads if name != "hidden"]
        parts = self.gathered({name: mine.grads[name] for name in sharded})
        return replace(mine, grads=mine.grads | {name: torch.cat([part[name] for part in parts]) for name in sharded})


@dataclass(frozen=True)
class Sharded(Subject):
    """A backend whose head is sharded in some layout; its results are combined again."""

    n: int = N
    d: int = D
    v: int = V
    layout: str = "three uneven"

    def inputs(self, n: int | None = None, d: int | None = None, v: int | None = None, **options: Any) -> Inputs:
        """Inputs with a target on both sides of every border, and on the first and the last token."""
        inputs = super().inputs(n, d, **options)
        edges = sorted({min(max(b + step, 0), V - 1) for b in (0, *LAYOUTS[self.layout], V) for step in (-1, 0)})
        if inputs.target.shape[0] >= len(edges) and options.get("ignored", 0.3) < 1:
            inputs.target[: len(edges)] = torch.tensor(edges)
        return inputs

    def call(self, inputs: Inputs, **options: Any) -> Result:
        shards = Shards(self.layout)
        result = shards.whole(shards.call(inputs, backend=self.backend, **options))
        if inputs.hidden.dtype == torch.float32:
            assert_equal(result, call(inputs, backend=self.backend, **options))
        return result


def assert_equal(sharded: Result, whole: Result) -> None:
    """Asserts equality up to fp32 rounding, with tolerance for another order of summation."""
    pairs = {"loss": (sharded.loss, whole.loss)}
    pairs |= {name: (getattr(sharded.stats, name), getattr(whole.stats, name)) for name in whole.stats._fields}
    pairs |= {f"d{name}": (sharded.grads[name], whole.grads[name]) for name in whole.grads}
    for name, (a, b) in pairs.items():
        torch.testing.assert_close(a, b, rtol=3e-5, atol=5e-6, msg=lambda m, name=name: f"{name}: {m}")
