"""What would be launched for the widths of SD1.5, SD2.1, SDXL, text encoders and reward towers, for sm80 and sm90."""

from pathlib import Path

import pytest
import torch

from fastcraft_kernels.launch import assume_device
from fastcraft_kernels.layer_norm.kernel import layer_norm_backward, layer_norm_forward
from fastcraft_kernels.testing import A100, H200, RegisterTable, check_compiled, compile_report, record_launches

SHAPES = [
    # rows, width, dtype, residual, trainable affine
    (8192, 320, torch.bfloat16, True, False),
    (8192, 320, torch.float16, False, True),
    (2048, 640, torch.bfloat16, True, False),
    (512, 1280, torch.bfloat16, True, False),
    (2056, 1024, torch.bfloat16, True, False),  # 8 pictures in a ViT-L reward tower
    (154, 768, torch.float32, False, True),
    (154, 1024, torch.float32, False, True),
]


def recorded(facts, num_rows, width, dtype, residual, trainable):
    x, weight = (torch.empty(*size, dtype=dtype, device="meta") for size in ((num_rows, width), (width,)))
    with record_launches() as launches, assume_device(facts):
        total, y, mean, rstd = layer_norm_forward(x, weight, weight, x if residual else None, 1e-5)
        layer_norm_backward(y, total, x, weight, mean, rstd, trainable)
    return launches


@pytest.mark.parametrize("facts", [A100, H200], ids=["sm80", "sm90"])
def test_every_shipped_launch_compiles(facts):
    table = RegisterTable(Path(__file__).with_name("registers.json"))
    for shape in SHAPES:
        for launch in recorded(facts, *shape):
            name = f"{launch.name} {shape[1]} {str(shape[2])[6:]}"
            report = compile_report(launch, arch=facts.arch)
            check_compiled(name, report, arch=facts.arch)
            table.check(name, report, arch=facts.arch)
            assert report.ld128 > 0, name
            assert report.st128 > 0, name


def test_a_trainable_affine_keeps_few_partial_sums():
    frozen, trainable = (recorded(H200, 65536, 320, torch.bfloat16, False, grad)[1] for grad in (False, True))
    assert frozen.grid == (65536 // frozen.constants["ROWS"],)
    assert frozen.constants["d_weight_ptr"] is None
    assert trainable.grid[0] <= 4 * H200.num_sms
