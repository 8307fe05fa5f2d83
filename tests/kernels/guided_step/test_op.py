"""The guided step: the sampler's numbers and gradients, registration, errors."""

import pytest
import torch

from fastcraft.diffusion.samplers.ddim import DDIMSampler
from fastcraft.diffusion.schedule import NoiseSchedule
from fastcraft_kernels.guided_step import guided_step


def schedule(prediction_type):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    levels = tuple((1 - betas).cumprod(0).tolist())
    return NoiseSchedule(alphas_cumprod=levels, final_alpha_cumprod=levels[0], prediction_type=prediction_type)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("guidance_scale", "eta"), [(7.5, 0.0), (3.0, 1.0), (1.0, 0.5), (1.0, 0.0)])
def test_equals_guidance_then_sampler(prediction_type, guidance_scale, eta):
    levels = schedule(prediction_type)
    sampler = DDIMSampler(levels, num_inference_steps=10, eta=eta)
    rows = 2 if guidance_scale == 1 else 4
    for index in (0, 4, 9):
        x = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
        out = torch.randn(rows, 4, 3, 5, dtype=torch.float64, requires_grad=True)
        noise = torch.randn(2, 4, 3, 5, dtype=torch.float64)
        if rows == 4:
            uncond, cond = out.chunk(2)
            guided = uncond + guidance_scale * (cond - uncond)
        else:
            guided = out
        plain = sampler.step(index, x, guided, noise)
        timestep = sampler.timesteps[index]
        ours = guided_step(
            x, out, alpha_cumprod=levels.alpha_cumprod(timestep), guidance_scale=guidance_scale, eta=eta,
            previous_alpha_cumprod=levels.alpha_cumprod(timestep - sampler.stride), noise=noise,
            prediction_type=prediction_type,
        )  # fmt: skip
        torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-11)
        cotangent = torch.randn_like(ours)
        expected = torch.autograd.grad(plain, (x, out), cotangent)
        for a, b in zip(torch.autograd.grad(ours, (x, out), cotangent), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_nothing_is_saved_and_dtypes_hold():
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    out = torch.randn(2, 4, 2, 2, dtype=torch.bfloat16, requires_grad=True)

    def refuse(tensor):
        raise AssertionError(f"saved a tensor of shape {tuple(tensor.shape)}")

    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        y = guided_step(x, out, alpha_cumprod=0.2, previous_alpha_cumprod=0.3, guidance_scale=2)
    dx, dout = torch.autograd.grad(y.sum(), (x, out))
    assert (y.dtype, dx.dtype, dout.dtype) == (torch.float32, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("guided", [True, False])
def test_registrations(guided):
    x = torch.randn(2, 3, 2, 4).to(memory_format=torch.channels_last).requires_grad_()
    out = torch.randn(4 if guided else 2, 3, 2, 4, dtype=torch.float16, requires_grad=True)
    noise = torch.randn(2, 3, 2, 4)
    torch.library.opcheck(torch.ops.fastcraft.guided_step.default, (x, out, noise, 0.9, -0.5, 1.5, 0.1))
    torch.library.opcheck(
        torch.ops.fastcraft.guided_step_backward.default, (noise, 0.9, -0.5, 1.5, guided, torch.bfloat16)
    )


def test_gradcheck_and_compile():
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    out = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def call(x, out):
        return guided_step(x, out, alpha_cumprod=0.2, previous_alpha_cumprod=0.5, guidance_scale=3.0)

    assert torch.autograd.gradcheck(call, (x, out), fast_mode=True)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(x, out).square().sum(), (x, out)),
        torch.autograd.grad(call(x, out).square().sum(), (x, out)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 4, 8)}, "latents must be a float32 (B, C, H, W), got torch.float32 (2, 4, 8)"),
        ({"latents": torch.zeros(2, 4, 8, 8).half()}, "latents must be a float32 (B, C, H, W), got torch.float16"),
        (
            {"guidance_scale": 1.0},
            "model_output must be a float (2, 4, 8, 8) for latents (2, 4, 8, 8) without guidance",
        ),
        ({"model_output": torch.zeros(4, 4, 8, 8, dtype=torch.int32)}, "model_output must be a float (4, 4, 8, 8)"),
        ({"model_output": torch.zeros(4, 4, 8, 8, device="meta")}, "model_output must be on the device of latents"),
        (
            {"alpha_cumprod": 1.0},
            "alpha_cumprod must lie in (0, 1) and previous_alpha_cumprod between it and 1, got 1.0",
        ),
        ({"previous_alpha_cumprod": 0.1}, "between it and 1, got 0.2 and 0.1"),
        ({"guidance_scale": 0.5}, "guidance_scale must be at least 1 and eta lie in [0, 1], got 0.5 and 0.0"),
        ({"eta": 2.0}, "guidance_scale must be at least 1 and eta lie in [0, 1], got 2.0 and 2.0"),
        ({"eta": 0.5}, "noise is needed with eta = 0.5, got None"),
        ({"noise": torch.zeros(2, 4, 8, 7)}, "noise must be torch.float32 (2, 4, 8, 8) like latents"),
        ({"prediction_type": "sample"}, "prediction_type must be one of epsilon, v_prediction, got 'sample'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(change, message):
    arguments = {
        "latents": torch.zeros(2, 4, 8, 8), "model_output": torch.zeros(4, 4, 8, 8), "alpha_cumprod": 0.2,
        "previous_alpha_cumprod": 0.3, "guidance_scale": 2.0,
    } | change  # fmt: skip
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the text is compared
        guided_step(**arguments)
    assert message in str(raised.value)
    assert str(raised.value).startswith("guided_step: ")
