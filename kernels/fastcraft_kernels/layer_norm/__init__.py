"""Layer normalisation, the residual addition before it folded in."""

from fastcraft_kernels.layer_norm.op import layer_norm

__all__ = ["layer_norm"]
