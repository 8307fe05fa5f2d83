"""The guided step: guidance and the sampler's numbers, gradients, registration, errors."""

import pytest
import torch

from fastcraft_kernels.guided_step import guided_step


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize(("a", "b", "c"), [(1.7, -0.9, 0.0), (0.5, 0.25, 0.3), (0.0, -1.0, 1.0)])
def test_equals_guidance_then_the_step(a, b, c, guidance_scale):
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    out = torch.randn(2 if guidance_scale == 1 else 4, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    guided = out
    if guidance_scale != 1:
        uncond, cond = out.chunk(2)
        guided = uncond + guidance_scale * (cond - uncond)
    plain = a * x + b * guided + c * noise
    ours = guided_step(x, out, a=a, b=b, c=c, guidance_scale=guidance_scale, noise=noise)
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-11)
    cotangent = torch.randn_like(ours)
    expected = torch.autograd.grad(plain, (x, out), cotangent)
    for got, want in zip(torch.autograd.grad(ours, (x, out), cotangent), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_noise_of_no_weight_is_not_read():
    x, noise = torch.randn(1, 4, 2, 2), torch.full((1, 4, 2, 2), torch.nan)
    assert torch.equal(guided_step(x, x, a=1.0, b=0.5, noise=noise), 1.5 * x)


def test_nothing_is_saved_and_dtypes_hold():
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    out = torch.randn(2, 4, 2, 2, dtype=torch.bfloat16, requires_grad=True)

    def refuse(tensor):
        raise AssertionError(f"saved a tensor of shape {tuple(tensor.shape)}")

    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        y = guided_step(x, out, a=1.2, b=-0.3, guidance_scale=2)
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
        return guided_step(x, out, a=1.2, b=-0.3, guidance_scale=3.0)

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
        ({"a": float("nan")}, "a, b and c must be finite and c at least 0, got nan, -0.3 and 0.0"),
        ({"b": float("inf")}, "a, b and c must be finite and c at least 0, got 1.2, inf and 0.0"),
        ({"c": -0.1}, "a, b and c must be finite and c at least 0, got 1.2, -0.3 and -0.1"),
        ({"guidance_scale": 0.5}, "guidance_scale must be finite and at least 1, got 0.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be finite and at least 1, got nan"),
        ({"c": 0.5}, "noise is needed with c = 0.5, got None"),
        ({"noise": torch.zeros(2, 4, 8, 7)}, "noise must be torch.float32 (2, 4, 8, 8) like latents"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(change, message):
    arguments = {
        "latents": torch.zeros(2, 4, 8, 8), "model_output": torch.zeros(4, 4, 8, 8), "a": 1.2, "b": -0.3, "c": 0.0,
        "guidance_scale": 2.0,
    } | change  # fmt: skip
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the text is compared
        guided_step(**arguments)
    assert message in str(raised.value)
    assert str(raised.value).startswith("guided_step: ")
