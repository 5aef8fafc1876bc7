"""What a registered op asks of a backend: its arguments, valid by now, in groups."""

from typing import NamedTuple

from torch import Tensor

from perce_kernels.row_pass import Contrasting
from perce_kernels.vocab_parallel import Shard


class Call(NamedTuple):
    """Tokens and output layer, of either op. With a shard, lm_head and bias are this rank's rows, and all else is that
    of the whole vocabulary.
    """

    hidden: Tensor  # (N, D)
    lm_head: Tensor  # (V, D)
    target: Tensor  # (N,)
    bias: Tensor | None  # (V,)
    ignore_index: int
    softcap: float | None
    logit_scale: float
    compact: bool
    shard: Shard | None = None

    @property
    def vocab_size(self) -> int:
        """Of the whole vocabulary."""
        return self.lm_head.shape[0] if self.shard is None else self.shard.vocab_size


class Weighting(NamedTuple):
    """Where the token weights come from: one of the tensors."""

    hidden_cf: Tensor | None  # (N, D)
    logp_cf: Tensor | None  # (N,)
    token_weight: Tensor | None  # (N,)
    contrasting: Contrasting


class Needed(NamedTuple):
    """Which gradients are to be computed."""

    dhidden: bool
    dlm_head: bool
    dbias: bool
