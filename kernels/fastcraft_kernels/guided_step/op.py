"""The public function and its registration."""

import math
from typing import Any

import torch
from torch import Tensor

from fastcraft_kernels.backend import uses_triton
from fastcraft_kernels.guided_step.reference import guided_step_backward, guided_step_forward


def guided_step(
    latents: Tensor, model_output: Tensor, *, a: float, b: float, c: float = 0.0, guidance_scale: float = 1.0,
    noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``a x + b m + c z``: latents after one step of a sampler from a guided prediction m, in one pass.

    Args:
        latents: x, ``(B, C, H, W)`` float32 (or float64), before the step.
        model_output: what the network gave, any float dtype: ``(2B, C, H, W)`` with the unconditional rows first, which
            makes ``m = m_u + guidance_scale (m_c - m_u)``, or m itself, ``(B, C, H, W)``, when ``guidance_scale`` is 1.
        a: weight of the latents, finite.
        b: weight of the prediction, finite.
        c: weight of the noise, finite, at least 0.
        guidance_scale: at least 1.
        noise: z, ``(B, C, H, W)`` standard normal, dtype of ``latents``; needed when ``c`` > 0, else ignored. It
            carries no gradient.

    Returns:
        ``(B, C, H, W)``, dtype of ``latents``, contiguous.

    Raises:
        ValueError: shapes, dtypes, devices or numbers outside the above.

    Saves for backward: nothing; the step is linear.
    Source: guidance arXiv:2207.12598; the numbers are the sampler's.
    """
    _check_tensors(latents, model_output, noise, guided=guidance_scale != 1)
    if not (math.isfinite(a) and math.isfinite(b) and 0 <= c < math.inf):
        raise ValueError(f"guided_step: a, b and c must be finite and c at least 0, got {a}, {b} and {c}")
    if not 1 <= guidance_scale < math.inf:
        raise ValueError(f"guided_step: guidance_scale must be finite and at least 1, got {guidance_scale}")
    if c > 0 and noise is None:
        raise ValueError(f"guided_step: noise is needed with c = {c}, got None")
    return _guided_step(
        latents, model_output, noise if c > 0 else None, a, (1 - guidance_scale) * b, guidance_scale * b, c
    )


def _check_tensors(latents: Tensor, output: Tensor, noise: Tensor | None, *, guided: bool) -> None:
    if latents.dim() != 4 or latents.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"guided_step: latents must be a float32 (B, C, H, W), got {latents.dtype} {tuple(latents.shape)}"
        )
    expected = ((2 if guided else 1) * latents.shape[0], *latents.shape[1:])
    if output.shape != expected or not output.is_floating_point():
        raise ValueError(
            f"guided_step: model_output must be a float {expected} for latents {tuple(latents.shape)} "
            f"{'with' if guided else 'without'} guidance, got {output.dtype} {tuple(output.shape)}"
        )
    if noise is not None and (noise.shape != latents.shape or noise.dtype != latents.dtype):
        raise ValueError(
            f"guided_step: noise must be {latents.dtype} {tuple(latents.shape)} like latents, got {noise.dtype} "
            f"{tuple(noise.shape)}"
        )
    for name, tensor in (("model_output", output), ("noise", noise)):
        if tensor is not None and tensor.device != latents.device:
            raise ValueError(
                f"guided_step: {name} must be on the device of latents ({latents.device}), got {tensor.device}"
            )


@torch.library.custom_op("fastcraft::guided_step", mutates_args=())
def _guided_step(
    latents: Tensor, output: Tensor, noise: Tensor | None, a: float, b_uncond: float, b_cond: float, c: float
) -> Tensor:
    if uses_triton("guided_step", latents):
        from fastcraft_kernels.guided_step import kernel

        return kernel.guided_step_forward(latents, output, noise, a=a, b_uncond=b_uncond, b_cond=b_cond, c=c)
    result = guided_step_forward(latents, output, noise, a=a, b_uncond=b_uncond, b_cond=b_cond, c=c)
    return result.contiguous()


@_guided_step.register_fake
def _(latents: Tensor, output: Tensor, noise: Tensor | None, *numbers: float) -> Tensor:
    return torch.empty_like(latents, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastcraft::guided_step_backward", mutates_args=())
def _guided_step_backward(
    dy: Tensor, a: float, b_uncond: float, b_cond: float, guided: bool, output_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    arguments: dict[str, Any] = {
        "a": a, "b_uncond": b_uncond, "b_cond": b_cond, "guided": guided, "output_dtype": output_dtype,
    }  # fmt: skip
    if uses_triton("guided_step", dy):
        from fastcraft_kernels.guided_step import kernel

        return kernel.guided_step_backward(dy, **arguments)
    d_latents, d_output = guided_step_backward(dy, **arguments)
    return d_latents.contiguous(), d_output.contiguous()


@_guided_step_backward.register_fake
def _(
    dy: Tensor, a: float, b_uncond: float, b_cond: float, guided: bool, output_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    rows = (2 if guided else 1) * dy.shape[0]
    d_latents = torch.empty_like(dy, memory_format=torch.contiguous_format)
    return d_latents, dy.new_empty((rows, *dy.shape[1:]), dtype=output_dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    latents, model_output, _, a, b_uncond, b_cond, _ = inputs
    ctx.numbers = a, b_uncond, b_cond
    ctx.guided = model_output.shape[0] != latents.shape[0]
    ctx.output_dtype = model_output.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    d_latents, d_output = _guided_step_backward(dy, *ctx.numbers, ctx.guided, ctx.output_dtype)
    return d_latents, d_output, None, None, None, None, None


_guided_step.register_autograd(_backward, setup_context=_setup)
