"""Self-attention at the head widths of Stable Diffusion, computed by whoever is measured to be fastest."""

from fastcraft_kernels.attention.dispatch import (
    AttentionChoice,
    attention_table,
    choose_attention,
    load_attention_table,
)
from fastcraft_kernels.attention.measure import measure_attention
from fastcraft_kernels.attention.op import attention

__all__ = [
    "AttentionChoice",
    "attention",
    "attention_table",
    "choose_attention",
    "load_attention_table",
    "measure_attention",
]
