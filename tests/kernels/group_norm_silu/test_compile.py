"""What would be launched on an A100 and an H200, compiled for each without a GPU."""

from pathlib import Path

import pytest
import torch

from fastcraft_kernels.group_norm_silu.kernel import group_norm_silu_backward, group_norm_silu_forward
from fastcraft_kernels.launch import assume_device
from fastcraft_kernels.testing import A100, H200, RegisterTable, check_compiled, compile_report, record_launches

SHAPES = [
    # N, C, side, dtype, what is folded in, trainable affine: every group width of SD1.5, SD2.1, SDXL and their VAEs
    (8, 320, 64, torch.bfloat16, "", False),  # width 10
    (2, 320, 64, torch.float16, "shift and residual", True),
    (2, 640, 64, torch.float32, "", False),  # 20
    (8, 960, 64, torch.bfloat16, "", False),  # 30
    (2, 1280, 32, torch.bfloat16, "", False),  # 40
    (2, 1920, 32, torch.bfloat16, "", False),  # 60
    (2, 2560, 16, torch.bfloat16, "", False),  # 80
    (1, 128, 512, torch.bfloat16, "", False),  # 4
    (1, 512, 128, torch.bfloat16, "", False),  # 16
    (2, 640, 16, torch.bfloat16, "", False),
    (16, 1280, 8, torch.bfloat16, "shift and residual", True),
    (2, 1920, 16, torch.bfloat16, "", False),
    (2, 2560, 8, torch.bfloat16, "shift and residual", False),
    (1, 128, 512, torch.bfloat16, "residual", False),  # between the ResNets of a VAE's decoder
    (1, 256, 256, torch.bfloat16, "residual", False),
    (1, 512, 128, torch.bfloat16, "residual", False),
]
FOLDS = {"": "", "shift and residual": " folds", "residual": " residual"}


def recorded(facts, samples, channels, side, dtype, folds, trainable):
    x = torch.empty(samples, side, side, channels, dtype=dtype, device="meta").movedim(-1, 1)
    weight = torch.empty(channels, dtype=dtype, device="meta")
    shift = torch.empty(samples, channels, dtype=dtype, device="meta") if "shift" in folds else None
    residual = x if "residual" in folds else None
    with record_launches() as launches, assume_device(facts):
        total, y, mean, rstd = group_norm_silu_forward(x, weight, weight, shift, residual, 32, 1e-5, True)
        group_norm_silu_backward(y, total, x, weight, weight, None, mean, rstd, True, trainable, shift is not None)
    return launches


def launch_name(launch, shape):
    samples, channels, side, dtype, folds, _ = shape
    return f"{launch.name} {samples}x{channels}x{side}x{side} {str(dtype)[6:]}{FOLDS[folds]}"


@pytest.mark.parametrize("facts", [A100, H200], ids=["sm80", "sm90"])
def test_every_shipped_launch_compiles(facts):
    table = RegisterTable(Path(__file__).with_name("registers.json"))
    seen = set()
    for shape in SHAPES:
        for launch in recorded(facts, *shape):
            key = (launch.name, str(launch.types), str(launch.constants), str(launch.options))
            if key in seen:
                continue
            seen.add(key)
            report = compile_report(launch, arch=facts.arch)
            name = launch_name(launch, shape)
            check_compiled(name, report, arch=facts.arch)
            table.check(name, report, arch=facts.arch)
            # A row of 1920 / 32 = 60 channels is 120 bytes: eight-byte loads are the widest that it allows.
            assert (shape[1] == 1920 and "small" in launch.name) or report.ld128 > 0, name
            threads = 32 * launch.options["num_warps"]
            assert report.registers * threads <= 65_536, name
    assert len(seen) > 30


@pytest.mark.parametrize("facts", [A100, H200], ids=["sm80", "sm90"])
def test_one_round_of_programs_fills_the_device(facts):
    for samples, channels, side in [(8, 320, 64), (8, 640, 64), (8, 960, 64), (16, 640, 32), (1, 128, 512)]:
        for launch in recorded(facts, samples, channels, side, torch.bfloat16, "", False):
            programs = torch.Size(launch.grid).numel()
            assert facts.num_sms < programs <= 4 * facts.num_sms


def test_small_planes_take_one_launch_each_way():
    names = [launch.name for launch in recorded(H200, 2, 1280, 8, torch.bfloat16, "", False)]
    assert names == ["_small_forward_kernel", "_small_backward_kernel"]
    assert len(recorded(H200, 2, 320, 64, torch.bfloat16, "", False)) == 4
