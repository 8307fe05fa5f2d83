"""The public function and its registration."""

from typing import Any

import torch
from torch import Tensor

from fastcraft_kernels.backend import uses_triton
from fastcraft_kernels.guided_step.reference import guided_step_backward, guided_step_forward, step_coefficients

PREDICTION_TYPES = ("epsilon", "v_prediction")


def guided_step(
    latents: Tensor, model_output: Tensor, *, alpha_cumprod: float, previous_alpha_cumprod: float,
    guidance_scale: float = 1.0, eta: float = 0.0, noise: Tensor | None = None, prediction_type: str = "epsilon",
) -> Tensor:  # fmt: skip
    """Latents after one DDIM step from a guided prediction, in one pass.

    Args:
        latents: ``(B, C, H, W)`` float32 (or float64), before the step.
        model_output: what the UNet gave, any float dtype: ``(2B, C, H, W)`` with the unconditional rows first, or
            ``(B, C, H, W)`` when ``guidance_scale`` is 1.
        alpha_cumprod: squared signal level of ``latents``, in (0, 1); 0, all noise, with a v-prediction only.
        previous_alpha_cumprod: squared signal level after the step, above 0, from ``alpha_cumprod`` to 1.
        guidance_scale: weight w of ``e_u + w (e_c - e_u)``, at least 1.
        eta: DDIM noise weight in [0, 1].
        noise: ``(B, C, H, W)`` standard normal, dtype of ``latents``; needed when ``eta`` > 0. It carries no gradient.
        prediction_type: ``"epsilon"`` or ``"v_prediction"``.

    Returns:
        ``(B, C, H, W)``, dtype of ``latents``, contiguous.

    Raises:
        ValueError: shapes, dtypes, devices or numbers outside the above.

    Saves for backward: nothing; the step is linear.
    Source: arXiv:2010.02502, Eq. 12; arXiv:2207.12598.
    """
    _check_tensors(latents, model_output, noise, guided=guidance_scale != 1)
    all_noise = alpha_cumprod == 0 and prediction_type == "v_prediction"  # there an epsilon says nothing about x0
    if not (0 < alpha_cumprod < 1 or all_noise) or not alpha_cumprod <= previous_alpha_cumprod <= 1:
        raise ValueError(
            "guided_step: alpha_cumprod must lie in (0, 1), or be 0 with a v-prediction, and previous_alpha_cumprod "
            f"between it and 1, got {alpha_cumprod} and {previous_alpha_cumprod}"
        )
    if previous_alpha_cumprod == 0:
        raise ValueError("guided_step: previous_alpha_cumprod must be above 0, got 0")
    if not guidance_scale >= 1 or not 0 <= eta <= 1:
        raise ValueError(
            f"guided_step: guidance_scale must be at least 1 and eta lie in [0, 1], got {guidance_scale} and {eta}"
        )
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"guided_step: prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}"
        )
    if eta > 0 and noise is None:
        raise ValueError(f"guided_step: noise is needed with eta = {eta}, got None")
    numbers = step_coefficients(
        alpha_cumprod, previous_alpha_cumprod, guidance_scale=guidance_scale, eta=eta, prediction_type=prediction_type
    )
    return _guided_step(latents, model_output, noise if eta > 0 else None, *numbers)


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
    latents: Tensor, output: Tensor, noise: Tensor | None, a: float, b_uncond: float, b_cond: float, s: float
) -> Tensor:
    if uses_triton("guided_step", latents):
        from fastcraft_kernels.guided_step import kernel

        return kernel.guided_step_forward(latents, output, noise, a=a, b_uncond=b_uncond, b_cond=b_cond, s=s)
    result = guided_step_forward(latents, output, noise, a=a, b_uncond=b_uncond, b_cond=b_cond, s=s)
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
