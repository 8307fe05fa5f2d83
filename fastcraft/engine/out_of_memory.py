"""Telling an out-of-memory error from any other."""

import torch


class MemoryRanOutError(Exception):
    """A micro-step did not fit, on this rank or another; no rank has added up or exchanged a gradient."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a CUDA or CPU allocator had nothing left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
