"""Reward fine-tuning of Stable Diffusion text encoders: TextCraftor and its relatives, on DeepSpeed ZeRO-2."""

__version__ = "0.1.0"
