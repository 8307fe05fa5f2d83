"""The guided step: the sampler's numbers and gradients, registration, errors."""

import pytest
import torch

from fastcraft_kernels.guided_step import guided_step
from fastcraft_kernels.guided_step.reference import step_coefficients


def plain_step(x, output, noise, *, level, previous, guidance_scale, eta, prediction_type):
    """Guidance, then Eq. 12 of arXiv:2010.02502, one term after another."""
    if guidance_scale != 1:
        uncond, cond = output.chunk(2)
        output = uncond + guidance_scale * (cond - uncond)
    if prediction_type == "epsilon":
        original, epsilon = (x - (1 - level) ** 0.5 * output) / level**0.5, output
    else:
        original = level**0.5 * x - (1 - level) ** 0.5 * output
        epsilon = level**0.5 * output + (1 - level) ** 0.5 * x
    sigma = eta * ((1 - previous) / (1 - level) * (1 - level / previous)) ** 0.5
    return previous**0.5 * original + (1 - previous - sigma**2) ** 0.5 * epsilon + sigma * noise


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("guidance_scale", "eta"), [(7.5, 0.0), (3.0, 1.0), (1.0, 0.5), (1.0, 0.0)])
def test_equals_guidance_then_ddim(prediction_type, guidance_scale, eta):
    rows = 2 if guidance_scale == 1 else 4
    for level, previous in ((0.0047, 0.014), (0.2, 0.35), (0.8, 0.99), (0.9, 1.0)):
        x = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
        out = torch.randn(rows, 4, 3, 5, dtype=torch.float64, requires_grad=True)
        noise = torch.randn(2, 4, 3, 5, dtype=torch.float64)
        numbers = {"guidance_scale": guidance_scale, "eta": eta, "prediction_type": prediction_type}
        plain = plain_step(x, out, noise, level=level, previous=previous, **numbers)
        ours = guided_step(
            x, out, alpha_cumprod=level, previous_alpha_cumprod=previous, noise=noise, **numbers
        )  # fmt: skip
        torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-11)
        cotangent = torch.randn_like(ours)
        expected = torch.autograd.grad(plain, (x, out), cotangent)
        for a, b in zip(torch.autograd.grad(ours, (x, out), cotangent), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_nothing_of_the_predicted_noise_is_left():
    """From noise alone with eta = 1: what is under the root is 0 to rounding, above or below."""
    for previous in torch.linspace(0.01, 0.99, 99).tolist():
        numbers = step_coefficients(0.0, previous, guidance_scale=3.0, eta=1.0, prediction_type="v_prediction")
        assert all(type(number) is float for number in numbers)  # a root of less than 0 would be complex
        assert numbers[0] == pytest.approx(0, abs=1e-7)
        assert numbers[2:] == pytest.approx((-3 * previous**0.5, (1 - previous) ** 0.5))


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
            "alpha_cumprod must lie in (0, 1), or be 0 with a v-prediction, and previous_alpha_cumprod between it and "
            "1, got 1.0",
        ),
        ({"alpha_cumprod": 0.0}, "alpha_cumprod must lie in (0, 1), or be 0 with a v-prediction"),
        (
            {"alpha_cumprod": 0.0, "previous_alpha_cumprod": 0.0, "prediction_type": "v_prediction"},
            "previous_alpha_cumprod must be above 0",
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
