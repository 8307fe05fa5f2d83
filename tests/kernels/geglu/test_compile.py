"""What would be launched for the widths of SD1.5, SD2.1 and SDXL, compiled for sm80 and sm90 without a GPU."""

from pathlib import Path

import pytest
import torch

from fastcraft_kernels.geglu.kernel import geglu_backward, geglu_forward
from fastcraft_kernels.testing import RegisterTable, check_compiled, compile_report, record_launches

SHAPES = [(torch.bfloat16, 1280), (torch.bfloat16, 2560), (torch.bfloat16, 5120), (torch.float16, 1280)]
SHAPES += [(torch.float32, 1280)]


@pytest.mark.parametrize("arch", [80, 90])
def test_every_shipped_launch_compiles(arch):
    table = RegisterTable(Path(__file__).with_name("registers.json"))
    for dtype, width in SHAPES:
        x = torch.empty(2, 4096, 2 * width, dtype=dtype, device="meta")
        with record_launches() as launches:
            geglu_backward(geglu_forward(x), x)
        assert len(launches) == 2
        for launch in launches:
            assert width % launch.constants["TILE_F"] == 0  # no masked lanes
            name = f"{launch.name} {width} {str(dtype)[6:]}"
            report = compile_report(launch, arch=arch)
            check_compiled(name, report, arch=arch)
            table.check(name, report, arch=arch)
            assert report.ld128 >= 4, name
            assert report.st128 >= 2, name
