"""Classifier-free guidance and a sampler's linear update in one pass."""

from fastcraft_kernels.guided_step.op import guided_step

__all__ = ["guided_step"]
