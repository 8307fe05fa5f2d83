"""Fused operations that know the network is frozen: one folder per op (reference.py, kernel.py, op.py)."""
