"""Cross-attention over a text's keys: nothing kept but q, gradients of all steps meeting in one float32 sum."""

from fastcraft_kernels.cross_attention.gather import gather_kv_gradients
from fastcraft_kernels.cross_attention.op import cross_attention

__all__ = ["cross_attention", "gather_kv_gradients"]
