"""Backend "triton". Nothing here is imported before a call on a GPU (or Triton's interpreter) needs it:

row_loss.py   one pass over a chunk's logits: statistics, weight, and the gradient over them
lse_gemm.py   h Wᵀ whose epilogue keeps log-probabilities and writes no logits
driver.py     the chunked algorithm around them, with the signatures of perce_kernels.chunked
tiles.py      block sizes, warps and stages by architecture, dtype and D
"""
