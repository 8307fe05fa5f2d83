"""Microbenchmarks of the fused ops: ``pytest benchmarks --benchmark-enable``."""
