"""Log-probabilities by cuBLAS, with fp32 logits in blocks of columns: statistics do not need a whole row at once.

    per block of columns   x = h Wᵀ of these columns     (R, B) fp32
                           max, Σ exp, z_y               row_halves.row_parts
    at the end             combined over the blocks      combine.py

A buffer holds R rows of B columns, or fewer rows of all columns. The product reads W once per R rows and h once per B
columns, so a block reads less the closer it is to a square: with 4096 rows of 32k columns, W is read a quarter as often
as with 1024 rows of 128k columns. The factual pass cannot do this: its gradient needs the statistics of whole rows.
"""

from torch import Tensor

from perce_kernels.gpu.combine import Statistics, TileStatistics, combine
from perce_kernels.gpu.cut import block_of
from perce_kernels.gpu.row_halves import row_parts
from perce_kernels.product import product


def statistics(
    hidden: Tensor,  # (n, D)
    lm_head: Tensor,  # (V, D)
    target: Tensor,  # (n,) int64
    bias: Tensor | None,  # (V,)
    logits: Tensor,  # fp32, any number of elements ≥ PITCH
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Statistics:
    """As lse_gemm.statistics, through the buffer `logits`, which is overwritten. V may be 0; there is no entropy."""
    n, v = hidden.shape[0], lm_head.shape[0]
    rows, columns = block_of(n, v, logits.numel())
    parts = TileStatistics.empty(v, columns, n, hidden.device)
    for top in range(0, n, rows):
        some = slice(top, min(top + rows, n))
        for block, start in enumerate(range(0, v, columns)):
            width = min(columns, v - start)
            own = slice(start, start + width)
            z = logits.view(-1)[: (some.stop - top) * columns].view(-1, columns)
            product(hidden[some], lm_head[own].T, z[:, :width])
            row_parts(
                z, target[some], None if bias is None else bias[own],
                parts.row_max[block, some], parts.total[block, some], parts.z_target[some],
                v=width, start=start, softcap=softcap, logit_scale=logit_scale,
            )  # fmt: skip
    return combine(parts, target, ignore_index)
