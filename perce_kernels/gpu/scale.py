"""Gradients times the upstream gradient, in the inputs' dtype: the last pass over dW, which moves 6 bytes per entry.

torch.mul with an `out` of another dtype casts entry by entry; on an H100 that took twice as long (docs/LOG.md,
2026-11-27).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from perce_kernels.gpu.tiles import FP_FUSION

BLOCK, WARPS = 4096, 8


@triton.jit
def scale_kernel(
    x_ptr,  # (size,) fp32
    factor_ptr,  # () fp32
    out_ptr,  # (size,)
    size,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < size, eviction_policy="evict_first")
    scaled = x * tl.load(factor_ptr)
    tl.store(out_ptr + offs, scaled.to(out_ptr.dtype.element_ty), mask=offs < size)


def scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x · factor, rounded once. x: contiguous, fp32; factor: () fp32."""
    assert x.is_contiguous() and x.dtype == factor.dtype == torch.float32
    out = torch.empty_like(x, dtype=dtype)
    if x.numel() > 0:
        scale_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x, factor, out, x.numel(), BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=FP_FUSION
        )
    return out
