"""The op on a GPU beside its peers: `python -m benchmarks.gpu.run`, or `make gpu`; writes to benchmarks/results.

peers.py      each peer composed into PerCE as well as it allows
clock.py      CUDA events and the allocator's peak, or their stand-ins on a CPU
measure.py    one size in a process of its own: correctness first, then times in turn; prints events, one JSON a line
run.py        all sizes within a time budget; a peer that crashes or hangs is recorded and left out, never the end
tables.py     the README's tables from the results
"""
