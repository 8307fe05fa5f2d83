"""Measurements: ``python -m benchmarks.NAME``; results with machine, versions and commit under ``results/``."""
