"""Every shipped configuration of self-attention, compiled for sm80 and sm90 without a GPU."""

from pathlib import Path

import pytest
import torch

from fastcraft_kernels.attention.launcher import attention_backward, attention_forward
from fastcraft_kernels.launch import assume_device
from fastcraft_kernels.testing import (
    A100,
    H200,
    CompileReport,
    RegisterTable,
    check_compiled,
    compile_report,
    record_launches,
)

SEQUENCES = {40: 4096, 64: 4096, 80: 1024, 160: 256}
UNEVEN = {40: 1000, 64: 1000, 80: 1000, 160: 60}
CASES = [
    *((facts, width, seq, torch.bfloat16) for facts in (A100, H200) for width, seq in SEQUENCES.items()),
    # narrower heads have the tiles of 80 in float32, and more registers left
    *((facts, width, SEQUENCES[width], torch.float32) for facts in (A100, H200) for width in (80, 160)),
    # incomplete tiles: masks cost registers
    *((facts, width, seq, torch.bfloat16) for facts in (A100, H200) for width, seq in UNEVEN.items()),
]


def launches(facts, width, seq, dtype):
    q, k, v, dout = (torch.empty(2, seq, 8, width, dtype=dtype, device="meta") for _ in range(4))
    with assume_device(facts), record_launches() as recorded:
        out, lse = attention_forward(q, k, v, scale=0.1)
        attention_backward(dout, q, k, v, out, lse, scale=0.1)
    return recorded


def check_instructions(name: str, report: CompileReport, *, arch: int, dtype: torch.dtype) -> None:
    """Tensor cores fed asynchronously, as the design says; float32 has no tensor core that keeps its precision."""
    if dtype == torch.float32:
        assert report.mma_sync == report.wgmma == 0, f"{name} sm{arch}: {report}"
        assert report.ld128 > 0, f"{name} sm{arch}: {report}"
    elif arch == 80:
        assert report.cp_async > 0, f"{name} sm{arch}: {report}"
        assert report.mma_sync > 0, f"{name} sm{arch}: {report}"
    else:
        assert report.tma > 0, f"{name} sm{arch}: {report}"
        assert report.wgmma > 0, f"{name} sm{arch}: {report}"


@pytest.mark.parametrize(("facts", "width", "seq", "dtype"), CASES, ids=str)
def test_shipped_configurations(facts, width, seq, dtype):
    recorded = launches(facts, width, seq, dtype)
    assert len(recorded) == 3
    table = RegisterTable(Path(__file__).with_name("registers.json"))
    for launch in recorded:
        name = f"{launch.name} D={width} S={seq} {str(dtype).removeprefix('torch.')}"
        report = compile_report(launch, arch=facts.arch)
        check_compiled(name, report, arch=facts.arch)
        check_instructions(name, report, arch=facts.arch, dtype=dtype)
        table.check(name, report, arch=facts.arch)
        if (facts.arch, width, launch.name) == (80, 40, "attention_forward_kernel"):
            assert report.mma_sync == 88  # 128 if 40 columns were padded to 64
