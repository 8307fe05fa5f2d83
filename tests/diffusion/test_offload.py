"""Offloading on a CUDA device: the copies, their stream, and what stays on the device."""

import pytest
import torch

from fastcraft.diffusion.treatments import carry_out
from fastcraft.families.unet import UNetNetwork
from tests.diffusion.texts import condition

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("ops", ["attention", "attention+conv"])
def test_offloading_on_a_gpu_gives_the_gradient_and_frees_the_device(tiny_parts, ops):
    unet = tiny_parts.components.unet.to("cuda")
    network, time = UNetNetwork(module=unet), torch.tensor(9, device="cuda")
    torch.manual_seed(0)
    with torch.no_grad():
        text = condition(unet, torch.randn(16, 77, 32, device="cuda"))
    latents = torch.randn(16, 4, 32, 32, device="cuda")

    def step(treatment):
        x = latents.clone().requires_grad_()
        out = x
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(3):  # a chain, so that several regions are on their way at once
            out = carry_out(
                treatment,
                lambda y: y + 0.1 * network.predict(y, time, text, guided=False),
                out,
                module=unet,
            )
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        out.square().sum().backward()
        return held, x.grad

    (kept_bytes, expected), (sac_bytes, _) = step("keep"), step(f"sac:{ops}")
    for _ in range(3):  # the pinned buffers are used again
        offloaded_bytes, gradient = step(f"offload:{ops}")
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert offloaded_bytes < sac_bytes / 2 < kept_bytes
