"""Cross-attention's shipped configurations, compiled for sm80 and sm90 without a GPU."""

from pathlib import Path

import pytest
import torch

from fastcraft_kernels.cross_attention.launcher import cross_attention_backward, cross_attention_forward
from fastcraft_kernels.launch import assume_device
from fastcraft_kernels.testing import A100, H200, RegisterTable, check_compiled, compile_report, record_launches

SEQUENCES = {40: 4096, 64: 4096, 80: 1024, 160: 256}
ALL = ("cross_forward_kernel", "cross_dq_kernel", "cross_dkdv_kernel")
CASES = [
    *((facts, 77, 40, torch.bfloat16, ("cross_sum_kernel",)) for facts in (H200, A100)),
    # one block of keys, the largest such block, a loop over blocks; dK/dV of wider heads takes 77 keys as it takes 128
    *((facts, 77, width, torch.bfloat16, ALL) for facts in (H200, A100) for width in SEQUENCES),
    *(
        (facts, 128, width, torch.bfloat16, ALL if width < 80 else ALL[:2])
        for facts in (H200, A100)
        for width in SEQUENCES
    ),
    *((facts, 231, width, torch.bfloat16, ALL) for facts in (H200, A100) for width in SEQUENCES),
    # narrower heads have the tiles of 80, and more registers left
    *((facts, 77, width, torch.float32, ALL) for facts in (H200, A100) for width in (80, 160)),
]


def launches(facts, keys, width, dtype):
    q, dout = (torch.empty(2, SEQUENCES[width], 8, width, dtype=dtype, device="meta") for _ in range(2))
    k, v = (torch.empty(2, keys, 8, width, dtype=dtype, device="meta") for _ in range(2))
    with assume_device(facts), record_launches() as recorded:
        cross_attention_forward(q, k, v, scale=0.1)
        cross_attention_backward(dout, q, k, v, scale=0.1)
    return {launch.name: launch for launch in recorded}


@pytest.mark.parametrize(("facts", "keys", "width", "dtype", "kernels"), CASES, ids=str)
def test_shipped_configurations(facts, keys, width, dtype, kernels):
    recorded = launches(facts, keys, width, dtype)
    assert len(recorded) == 4
    table = RegisterTable(Path(__file__).with_name("registers.json"))
    for kernel in kernels:
        name = f"{kernel} D={width} L={keys} {str(dtype).removeprefix('torch.')}"
        report = compile_report(recorded[kernel], arch=facts.arch)
        check_compiled(name, report, arch=facts.arch)
        assert report.ld128 > 0, f"{name}: {report}"
        if dtype == torch.bfloat16 and "sum" not in kernel:
            assert (report.wgmma if facts.arch == 90 else report.mma_sync) > 0, f"{name}: {report}"
        if "dkdv" in kernel and dtype == torch.bfloat16:  # the loop over queries is fed asynchronously
            assert report.cp_async > 0, f"{name}: {report}"
        table.check(name, report, arch=facts.arch)
