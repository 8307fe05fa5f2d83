"""The Triton source of geglu against float64; see `fastcraft_kernels.testing` for how cases are run."""

import pytest
import torch
from torch.nn import functional as F

from fastcraft_kernels.geglu import geglu
from fastcraft_kernels.launch import is_interpreting
from fastcraft_kernels.testing import assert_op_as_accurate, run

pytestmark = pytest.mark.usefixtures("triton_backend")

SHAPES = [(2,), (3, 7, 130), (5, 384), (2, 9, 2560), (1, 3, 2 * 1023)]
if not is_interpreting():
    SHAPES += [(2, 4096, 2560), (16, 1024, 5120), (2, 256, 10240)]


def eager(x):
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def cotangent(shape, dtype, device, kind):
    if kind == "expanded":
        return torch.full((), 0.37, dtype=dtype, device=device).expand(shape)
    if kind == "slice of a cat":
        return torch.randn(*shape[:-1], shape[-1] + 3, dtype=dtype, device=device)[..., 2:-1]
    return torch.randn(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("kind", ["dense", "expanded", "slice of a cat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, kind, device):
    x = (3 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    assert_op_as_accurate(geglu, eager, [x], [cotangent((*shape[:-1], shape[-1] // 2), dtype, device, kind)])


def test_inputs_of_any_strides(device):
    wide = torch.randn(4, 6, 3, device=device)
    for x in (wide.transpose(0, 1)[..., :2], wide[:, 1:5].transpose(-1, -2), wide[:1].expand(5, 6, 3).transpose(1, 2)):
        assert_op_as_accurate(geglu, eager, [x.requires_grad_()], [torch.ones((), device=device).expand_as(eager(x))])


def test_extreme_gates(device):
    gate = torch.tensor([-1e4, -40.0, -6.0, 0.0, 6.0, 40.0, 1e4], device=device)
    x = torch.cat((torch.full_like(gate, 2.0), gate)).requires_grad_()
    y, dx = run(geglu, [x], [torch.ones_like(gate)])
    assert torch.equal(y[[0, 1, 3, 5, 6]], torch.tensor([0.0, 0.0, 0.0, 80.0, 2e4], device=device))
    assert torch.isfinite(dx).all()


def test_two_runs_are_bit_equal(device):
    x = torch.randn(9, 384, dtype=torch.bfloat16, device=device, requires_grad=True)
    first, second = (run(geglu, [x], [torch.ones(9, 192, device=device)]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
