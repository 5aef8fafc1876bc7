"""Backend "triton". Its modules are imported only when a call on a GPU (or in Triton's interpreter) needs them:

driver.py      the chunked algorithm, with the signatures of perce_kernels.chunked
steps.py       the ways from operands to log-probabilities and the gradient of logits, by products and these kernels
row_loss.py    one pass over a factual row's logits and back: statistics, weight, gradient
row_halves.py  that pass in two halves, between which the statistics of a row are combined from several parts
blocked.py     log-probabilities by cuBLAS, for some columns of many rows at a time
lse_gemm.py    h Wᵀ, with an epilogue that keeps log-probabilities and writes no logits, or 16-bit logits
combine.py     statistics of rows from those of tiles or blocks of columns
stored_rows.py the gradient, written over 16-bit logits that the GEMM stored
scale.py       gradients times the upstream gradient, in the inputs' dtype
cut.py         how many tokens are computed at once
tiles.py       block sizes, warps and stages by architecture, dtype and D, and the way in use
"""
