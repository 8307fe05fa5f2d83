"""The guided step's kernels compiled for sm80 and sm90."""

from pathlib import Path

import pytest
import torch

from fastcraft_kernels.guided_step import kernel
from fastcraft_kernels.launch import assume_device
from fastcraft_kernels.testing import A100, H200, RegisterTable, check_compiled, compile_report, record_launches

TABLE = Path(__file__).with_name("registers.json")


@pytest.mark.parametrize("facts", [A100, H200], ids=["sm80", "sm90"])
def test_compiles_without_spills(facts):
    numbers = {"a": 0.9, "b_uncond": -0.5, "b_cond": 1.5}
    latents = torch.empty(2, 4, 64, 64, device="meta")
    output = torch.empty(4, 4, 64, 64, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with record_launches() as launches, assume_device(facts):
        kernel.guided_step_forward(latents, output, latents, c=0.1, **numbers)
        kernel.guided_step_backward(latents, guided=True, output_dtype=torch.bfloat16, **numbers)
    table = RegisterTable(TABLE)
    assert [launch.grid for launch in launches] == [(32,), (32,)]
    for launch in launches:
        report = compile_report(launch, arch=facts.arch)
        check_compiled(launch.name, report, arch=facts.arch)
        table.check(launch.name, report, arch=facts.arch)
        if launch.name == "_backward_kernel":
            assert report.st128 > 0  # contiguous float32 results
