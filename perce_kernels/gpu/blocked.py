"""Log-probabilities by cuBLAS, its logits in fp32 and in blocks of columns: statistics need no row as a whole.

    per block of columns   x = h Wᵀ of these columns     (R, B) fp32
                           max, Σ exp, z_y               row_halves.row_parts
    at the end             combined over the blocks      combine.py

A buffer holds R rows of B columns or fewer rows of all columns. The product reads W once for R rows and h once for B
columns, so that the nearer a block is to a square, the less it reads: 4096 rows of 32k columns take W through memory
half as often as 1024 rows of 128k do. The factual pass cannot have that, for its gradient follows its statistics.
"""

from torch import Tensor

from perce_kernels.gpu.combine import Statistics, TileStatistics, combine
from perce_kernels.gpu.cut import block_of
from perce_kernels.gpu.product import product
from perce_kernels.gpu.row_halves import row_parts


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
    """lse_gemm.statistics by way of `logits`, which leave as scratch. V may be 0; no entropy."""
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
