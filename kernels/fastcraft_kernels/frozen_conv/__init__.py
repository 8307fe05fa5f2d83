"""Convolution and linear layer that keep nothing of their input while the weight is frozen."""

from fastcraft_kernels.frozen_conv.op import frozen_conv2d, frozen_linear

__all__ = ["frozen_conv2d", "frozen_linear"]
