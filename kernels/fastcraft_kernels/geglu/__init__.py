"""Gated GELU, exact."""

from fastcraft_kernels.geglu.op import geglu

__all__ = ["geglu"]
