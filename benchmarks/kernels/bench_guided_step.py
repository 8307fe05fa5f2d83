"""Guidance and DDIM update: launches, not bytes, are what is saved."""

import pytest
import torch

from benchmarks.kernels.harness import DIRECTIONS, Inputs, Workload, compiled, measure
from benchmarks.kernels.shapes import sizes_of
from fastcraft_kernels.guided_step import guided_step

# DDIM's numbers from the squared signal level 0.2 to 0.25, of a network that predicts epsilon
A = (0.25 / 0.2) ** 0.5
B = 0.75**0.5 - A * 0.8**0.5


def eager(latents, model_output):
    uncond, cond = model_output.float().chunk(2)
    noise_pred = uncond + 7.5 * (cond - uncond)
    original = (latents - 0.8**0.5 * noise_pred) / 0.2**0.5
    return 0.25**0.5 * original + 0.75**0.5 * noise_pred


def ours(latents, model_output):
    return guided_step(latents, model_output, a=A, b=B, guidance_scale=7.5)


def make(n, size):
    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        latents = torch.randn(n, 4, size, size, device=device, requires_grad=True)
        output = torch.randn(2 * n, 4, size, size, device=device).to(dtype)
        return {"latents": latents, "model_output": output.to(memory_format=torch.channels_last).requires_grad_()}

    return inputs


ROWS = sizes_of(gpu=[("sd15@512 64x64 B4", 4, 64), ("sdxl@1024 128x128 B8", 8, 128)], cpu=[("small 8x8 B1", 1, 8)])
# in elements of 2 bytes: float32 latents in and out count twice, the two predictions once; backward the same again
WORKLOADS = [
    Workload(name=name, make=make(n, s), num_elements=(6 * 4 * n * s * s, 12 * 4 * n * s * s)) for name, n, s in ROWS
]
PROVIDERS = {"eager": eager, "torch.compile": compiled(eager), "ours": ours}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_guided_step(benchmark, machine, workload, direction, provider):
    measure(
        benchmark, machine, op="guided_step", provider=provider, function=PROVIDERS[provider], workload=workload,
        direction=direction,
    )  # fmt: skip
