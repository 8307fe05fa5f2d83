"""The Triton source of the guided step against float64."""

import pytest
import torch

from fastcraft_kernels.guided_step import guided_step
from fastcraft_kernels.guided_step.reference import guided_step_forward
from fastcraft_kernels.testing import assert_op_as_accurate, run

pytestmark = pytest.mark.usefixtures("triton_backend")
NUMBERS = {"a": 1.3, "b": -0.4, "c": 0.6}


def eager(guidance_scale):
    a, b, c = NUMBERS.values()
    weights = {"a": a, "b_uncond": (1 - guidance_scale) * b, "b_cond": guidance_scale * b, "c": c}
    return lambda x, out, noise: guided_step_forward(x, out, noise, **weights)


def cotangents(shape, device):
    wide = torch.randn(shape[0], 2 * shape[1], *shape[2:], device=device)
    return [wide[:, shape[1] :], torch.ones((), device=device).expand(shape)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("shape", [(2, 4, 17, 31), (1, 3, 5, 1), (3, 4, 1, 7)], ids=str)
def test_forward_and_gradients(shape, guidance_scale, dtype, device):
    rows = shape[0] * (1 if guidance_scale == 1 else 2)
    formats = (torch.contiguous_format, torch.channels_last)
    for memory_format, dy in zip(formats, cotangents(shape, device), strict=True):
        x = torch.randn(shape, device=device).to(memory_format=memory_format).requires_grad_()
        out = torch.randn(rows, *shape[1:], dtype=dtype, device=device).to(memory_format=memory_format)
        noise = torch.randn(shape, device=device).transpose(2, 3).contiguous().transpose(2, 3)  # walked by a copy
        arguments = [x, out.requires_grad_(), noise]

        def fast(x, out, noise):
            return guided_step(x, out, noise=noise, guidance_scale=guidance_scale, **NUMBERS)

        got = assert_op_as_accurate(fast, eager(guidance_scale), arguments, [dy])
        again = run(fast, arguments, [dy])
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
