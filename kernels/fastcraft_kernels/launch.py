"""What a launch needs to know: the device, how many programs to start, tile sizes, whether kernels are interpreted."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What kernels read about a device.

    ``arch`` is the compute capability times ten (80: A100, 90: H100 and H200; 0: none, the interpreter);
    ``num_sms`` the number of multiprocessors.
    """

    arch: int
    num_sms: int


INTERPRETER = DeviceFacts(arch=0, num_sms=2)

_assumed: list[DeviceFacts] = []


def device_facts(device: torch.device) -> DeviceFacts:
    """Facts about ``device``; those of `assume_device` inside its block."""
    if _assumed:
        return _assumed[-1]
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return DeviceFacts(arch=properties.major * 10 + properties.minor, num_sms=properties.multi_processor_count)


@contextlib.contextmanager
def assume_device(facts: DeviceFacts) -> Iterator[None]:
    """Launch as if on another device: to take a card's path under the interpreter, or to compile for it."""
    _assumed.append(facts)
    try:
        yield
    finally:
        _assumed.pop()


def device_guard(x: Tensor) -> Any:
    """Context in which kernels start on ``x``'s device; Triton starts them on the current one."""
    return torch.cuda.device_of(x)


def is_interpreting() -> bool:
    """Whether Triton kernels run in its interpreter.

    Triton reads the variable when a kernel is decorated, so it has to be set before the process imports a kernel.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def dot_in_float32() -> bool:
    """Value of the compile-time constant ``DOT_F32``: operands of `tl.dot` are widened to float32 first.

    The interpreter multiplies bfloat16 bit patterns as if they were integers; compiled kernels keep 16-bit operands.
    """
    return is_interpreting()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (1 for ``n`` below 2)."""
    return 1 << max(n - 1, 0).bit_length()


def largest_power_of_2(n: int) -> int:
    """The largest power of two that is at most ``n``."""
    return 1 << (n.bit_length() - 1)


def split_count(num_slots: int, num_tiles: int, *, most: int) -> int:
    """Into how many pieces to cut each of ``num_tiles`` tiles so that their programs fill the device once.

    ``num_slots`` is how many programs it holds at a time: a few more than fit would cost a second, almost empty round,
    so the count is rounded down. Between 1 and ``most``.
    """
    return max(1, min(num_slots // num_tiles, most))
