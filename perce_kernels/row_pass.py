"""The row pass of backend "torch": from a chunk's raw products it computes statistics, and overwrites the products with
their gradient.

    z      = softcap · tanh(scale · (h Wᵀ + b) / softcap)
    logp   = (z_y − max) − log Σ exp(z − max)                  logp_cf → pir → w
    dz     = w·scale·(softmax(z) − onehot)·(1 − (z/softcap)²)  in place; expm1(logp) at the target, because computing
                                                               p − 1 by subtraction loses all digits as p → 1

Element-wise passes go through the logits in blocks of rows that stay in a core's cache: one visit computes statistics,
weight and gradient. With a shard of the vocabulary, the statistics are those of all ranks, and the gradient takes a
second visit.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from perce_kernels.contract import Contrasting
from perce_kernels.reference import contrast_weight
from perce_kernels.vocab_parallel import RowParts, Shard, lowest_finite

ROW_BLOCK_BYTES = 2**20


class Head(NamedTuple):
    """The output layer: logits = softcap·tanh(logit_scale·(h Wᵀ + b)/softcap)."""

    weight: Tensor  # (V, D), in the statistics dtype where products cannot widen
    bias: Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float


class Given(NamedTuple):
    """What the caller provides for R rows."""

    valid: Tensor | None  # (R,); None: all are valid
    logp_cf: Tensor | None  # (R,)
    token_weight: Tensor | None  # (R,) weights instead of logp_cf


def _row_blocks(z: Tensor) -> Iterator[slice]:
    rows = max(1, ROW_BLOCK_BYTES // (z.shape[1] * z.itemsize)) if z.device.type == "cpu" else z.shape[0]
    for start in range(0, z.shape[0], rows):
        yield slice(start, start + rows)


def _transform(z: Tensor, head: Head) -> None:
    """Raw products → logits, in place: bias, scale, softcap."""
    if head.bias is not None:
        z.add_(head.bias)
    if head.logit_scale != 1.0:
        z.mul_(head.logit_scale)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)


def _exponentials(
    z: Tensor, target: Tensor, head: Head, dcap: Tensor | None = None, with_moment: bool = False
) -> RowParts:
    """Raw products (R, V) → exp(z − max), in place; returns the statistics. 1 − (z/softcap)² is written to dcap."""
    _transform(z, head)
    if dcap is not None and head.softcap is not None:
        torch.addcmul(z.new_ones(()), z, z, value=-1 / head.softcap**2, out=dcap)
    row_max = z.amax(1)
    z.sub_(lowest_finite(row_max)[:, None])
    z_target = z.gather(1, target[:, None]).squeeze(1)
    exponent = z.clamp(min=-1e30) if with_moment else None  # p = 0 must add nothing, but 0 · −inf is NaN
    total = z.exp_().sum(1)
    return RowParts(row_max, total, z_target, None if exponent is None else exponent.mul_(z).sum(1))


def row_parts(z: Tensor, column: Tensor, head: Head, dcap: Tensor | None = None, with_moment: bool = False) -> RowParts:
    """_exponentials of a whole chunk, which may have no columns. For a target in another shard (column −1), z_target is
    meaningless."""
    if z.shape[1] == 0:
        none = z.new_zeros(z.shape[0])
        return RowParts(none - torch.inf, none, none, none if with_moment else None)
    target = column.clamp(min=0)
    blocks = [
        _exponentials(z[block], target[block], head, None if dcap is None else dcap[block], with_moment)
        for block in _row_blocks(z)
    ]
    row_max, total, z_target, moments = zip(*blocks, strict=True)
    moment = torch.cat(moments) if with_moment else None
    return RowParts(torch.cat(row_max), torch.cat(total), torch.cat(z_target), moment)


def weigh(logp: Tensor, given: Given, contrasting: Contrasting) -> tuple[Tensor, Tensor]:
    """(R,) logp and weight; the weight is contrasted and clipped, or as given. Both are 0 if a row is not valid."""
    if given.token_weight is not None:
        weight = given.token_weight
    else:
        assert given.logp_cf is not None
        weight = contrast_weight(logp, given.logp_cf, *contrasting)
    if given.valid is None:
        return logp, weight
    # torch.where, not a product: ignored rows use token 0, and with a bias of −inf there the product would be NaN · 0
    return torch.where(given.valid, logp, 0), torch.where(given.valid, weight, 0)


def _gradient(p: Tensor, column: Tensor, factor: Tensor, at_target: Tensor, dcap: Tensor | None) -> None:
    """exp(z − max) (R, V) → dz in place: factor · p, and at_target in the target's column unless that is −1."""
    p.mul_(factor[:, None])
    target = column.clamp(min=0)[:, None]
    p.scatter_(1, target, torch.where(column[:, None] >= 0, at_target[:, None], p.gather(1, target)))
    if dcap is not None:
        p.mul_(dcap)


def row_loss(
    z: Tensor,  # (R, V) raw products; overwritten with dz if need_dz, else with scratch values
    column: Tensor,  # (R,) the target's column; −1 if it is in another shard
    given: Given,
    parts_cf: RowParts | None,  # statistics of the same rows without the persona, instead of given.logp_cf
    dcap: Tensor | None,  # (R, V) scratch for the softcap's derivative
    head: Head,
    contrasting: Contrasting,
    need_dz: bool,
    shard: Shard | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(R,) logp, logp_cf and weight of one chunk: statistics, contrast, clip and, in place, the gradient."""
    if shard is not None:
        return _sharded_row_loss(z, column, given, parts_cf, dcap, head, contrasting, need_dz, shard)
    if parts_cf is not None:
        given = given._replace(logp_cf=parts_cf.logp())
    logp, weight = z.new_empty(z.shape[0]), z.new_empty(z.shape[0])
    for block in _row_blocks(z):
        block_dcap = None if dcap is None else dcap[block]
        parts = _exponentials(z[block], column[block], head, block_dcap)
        block_given = Given(*(None if x is None else x[block] for x in given))
        logp[block], weight[block] = weigh(parts.logp(), block_given, contrasting)
        if need_dz:
            scaled = weight[block] * head.logit_scale
            _gradient(z[block], column[block], scaled / parts.total, scaled * logp[block].expm1(), block_dcap)
    return logp, given.logp_cf, weight


def _sharded_row_loss(z, column, given, parts_cf, dcap, head, contrasting, need_dz, shard):
    """row_loss with the statistics of all ranks, which exchange them between the two visits of the logits."""
    rows, here = z.shape[0], column >= 0
    parts = row_parts(z, column, head, dcap)
    if parts_cf is None:
        whole = shard.combine(parts, here)
        logp = whole.logp()
    else:
        both = RowParts(*(torch.cat(pair) for pair in zip(parts[:3], parts_cf[:3], strict=True)))
        whole = shard.combine(both, here.repeat(2))
        logp, logp_cf = whole.logp().split(rows)
        given = given._replace(logp_cf=logp_cf)
    logp, weight = weigh(logp, given, contrasting)
    if need_dz and z.shape[1] > 0:
        scaled = weight * head.logit_scale
        factor = scaled * (parts.row_max - whole.row_max[:rows]).exp() / whole.total[:rows]
        at_target = scaled * logp.expm1()
        for block in _row_blocks(z):
            block_dcap = None if dcap is None else dcap[block]
            _gradient(z[block], column[block], factor[block], at_target[block], block_dcap)
    return logp, given.logp_cf, weight
