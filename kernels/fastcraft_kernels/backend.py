"""Who computes an op: plain PyTorch (`reference`) or the Triton kernels, and why a Triton path was refused.

Every op asks `uses_triton` inside its custom op, so the answer also holds under ``torch.compile`` and in the backward
pass. The setting belongs to the process, not to a thread: autograd runs the backward pass on threads of its own.
"""

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from fastcraft_kernels.launch import is_interpreting

BACKENDS = ("auto", "reference", "triton")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_CAPABILITY = (8, 0)

_setting = ["auto"]


def current_backend() -> str:
    """The name set by `set_backend`; ``"auto"`` at start."""
    return _setting[0]


def set_backend(name: str) -> None:
    """Choose who computes every op of this process.

    Args:
        name: ``"reference"``: plain PyTorch on every device. ``"triton"``: the kernels, and an error where they cannot
            serve. ``"auto"``: the kernels on CUDA tensors, plain PyTorch elsewhere; a CUDA tensor that the kernels
            refuse is warned about, with the reason.

    Raises:
        ValueError: an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"set_backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    _setting[0] = name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend` for a block; the backward pass has to run inside the block too."""
    before = current_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot serve tensors of this kind, or ``None`` where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"the kernels know float32, float16 and bfloat16, not {dtype}"
    if is_interpreting():
        return None if device.type == "cpu" else f"Triton's interpreter serves CPU tensors, not {device.type}"
    if device.type != "cuda":
        return f"the kernels need a CUDA device, not {device.type}"
    if torch.version.hip is not None:
        return "the kernels are written and checked for NVIDIA devices only"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return "the kernels need compute capability 8.0 or newer, not {}.{}".format(*capability)
    return None


def uses_triton(op: str, x: Tensor) -> bool:
    """Whether ``op`` runs its Triton kernels on ``x``.

    Raises:
        ValueError: the backend is ``"triton"`` and the kernels refuse ``x``; the message holds the reason.
    """
    name = current_backend()
    if name == "reference" or (name == "auto" and x.device.type != "cuda"):
        return False
    reason = triton_refusal(x.device, x.dtype)
    if reason is None:
        return True
    if name == "triton":
        raise ValueError(f"{op}: backend triton was asked for, but {reason}")
    warnings.warn(f"{op}: plain PyTorch computes this, because {reason}", RuntimeWarning, stacklevel=2)
    return False
