"""Benchmarks: `pytest benchmarks/ --benchmark-only`; each checks correctness before it times anything."""
