"""Backend "triton". Nothing here is imported before a call on a GPU (or Triton's interpreter) needs it:

row_loss.py    one pass over a chunk's logits: statistics, weight, and the gradient over them
shard_rows.py  that pass in two halves, between which the ranks of a sharded vocabulary exchange statistics
lse_gemm.py    h Wᵀ whose epilogue keeps log-probabilities and writes no logits
stored_rows.py the gradient over 16-bit logits that the GEMM stored
steps.py       from a chunk's operands to its statistics and gradient over the logits: a product and these kernels
driver.py      the chunked algorithm around them, with the signatures of perce_kernels.chunked
tiles.py       block sizes, warps and stages by architecture, dtype and D
"""
