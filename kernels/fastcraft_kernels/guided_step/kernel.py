# mypy: allow-untyped-defs
"""Triton source of the guided step: one program per block of elements, any memory format, float32 arithmetic."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcraft_kernels.launch import ceil_div, device_guard

BLOCK = 1024


def guided_step_forward(
    latents: Tensor, output: Tensor, noise: Tensor | None, *, a: float, b_uncond: float, b_cond: float, c: float
) -> Tensor:
    """As in `reference`; reads each input once and writes the result once."""
    result = torch.empty_like(latents, memory_format=torch.contiguous_format)
    batch, num_channels, height, width = latents.shape
    latents, output = _planes(latents), _planes(output)
    noise = None if noise is None else _planes(noise)
    with device_guard(latents):
        _forward_kernel[(ceil_div(result.numel(), BLOCK),)](
            latents, output, noise, result, result.numel(), height * width, num_channels,
            *_strides(latents), *_strides(output), *(_strides(latents if noise is None else noise)),
            batch * output.stride(0), float(a), float(b_uncond), float(b_cond), float(c),
            GUIDED=len(output) == 2 * batch, NOISY=noise is not None, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return result


def guided_step_backward(
    dy: Tensor, *, a: float, b_uncond: float, b_cond: float, guided: bool, output_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As in `reference`; reads ``dy`` once and writes both gradients."""
    batch, num_channels, height, width = dy.shape
    dy = _planes(dy)
    d_latents = torch.empty((batch, num_channels, height, width), dtype=dy.dtype, device=dy.device)
    d_output = torch.empty(
        ((2 if guided else 1) * batch, num_channels, height, width), dtype=output_dtype, device=dy.device
    )
    with device_guard(dy):
        _backward_kernel[(ceil_div(d_latents.numel(), BLOCK),)](
            dy, d_latents, d_output, d_latents.numel(), height * width, num_channels, *_strides(dy),
            float(a), float(b_uncond), float(b_cond), GUIDED=guided, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return d_latents, d_output


def _planes(x: Tensor) -> Tensor:
    """``x``, copied only if its rows cannot be walked as one line of pixels (contiguous and channels-last can)."""
    height, width = x.shape[2:]
    return x if 1 in (height, width) or x.stride(2) == width * x.stride(3) else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of sample, channel and pixel."""
    return x.stride(0), x.stride(1), x.stride(3) if x.shape[3] > 1 else x.stride(2)


@triton.jit
def _offsets(index, plane, num_channels, stride_n, stride_c, stride_p):
    """Where element ``index`` of a contiguous (N, C, plane) tensor lies in a tensor of these strides."""
    pixel = index % plane
    channel = (index // plane) % num_channels
    sample = index // plane // num_channels
    return sample * stride_n + channel * stride_c + pixel * stride_p


@triton.jit
def _forward_kernel(
    x_ptr, output_ptr, noise_ptr, y_ptr, num_elements, plane, num_channels,
    x_n, x_c, x_p, o_n, o_c, o_p, n_n, n_c, n_p, cond_offset, a, b_uncond, b_cond, c,
    GUIDED: tl.constexpr, NOISY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_elements
    x = tl.load(x_ptr + _offsets(index, plane, num_channels, x_n, x_c, x_p), mask=mask, other=0.0).to(tl.float32)
    at = _offsets(index, plane, num_channels, o_n, o_c, o_p)
    if GUIDED:
        uncond = tl.load(output_ptr + at, mask=mask, other=0.0).to(tl.float32)
        cond = tl.load(output_ptr + cond_offset + at, mask=mask, other=0.0).to(tl.float32)
        y = a * x + (b_cond * cond + b_uncond * uncond)
    else:
        y = a * x + b_cond * tl.load(output_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if NOISY:
        at = _offsets(index, plane, num_channels, n_n, n_c, n_p)
        y += c * tl.load(noise_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + index, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr, dx_ptr, do_ptr, num_elements, plane, num_channels, dy_n, dy_c, dy_p, a, b_uncond, b_cond,
    GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_elements
    at = _offsets(index, plane, num_channels, dy_n, dy_c, dy_p)
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + index, (a * dy).to(dx_ptr.dtype.element_ty), mask=mask)
    if GUIDED:
        tl.store(do_ptr + index, (b_uncond * dy).to(do_ptr.dtype.element_ty), mask=mask)
        tl.store(do_ptr + num_elements + index, (b_cond * dy).to(do_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(do_ptr + index, (b_cond * dy).to(do_ptr.dtype.element_ty), mask=mask)
