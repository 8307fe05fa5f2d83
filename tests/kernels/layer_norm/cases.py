"""The Triton source of layer_norm against float64; see `fastcraft_kernels.testing` for how cases are run."""

import pytest
import torch
from torch.nn import functional as F

from fastcraft_kernels.launch import is_interpreting
from fastcraft_kernels.layer_norm import layer_norm
from fastcraft_kernels.testing import assert_op_as_accurate, run

pytestmark = pytest.mark.usefixtures("triton_backend")


def fast(x, weight, bias, residual):
    return layer_norm(x, weight, bias, eps=1e-5, residual=residual)


def eager(x, weight, bias, residual):
    h = x if residual is None else x + residual
    y = F.layer_norm(h, weight.shape, weight, bias, 1e-5)
    return y if residual is None else (h, y)


def inputs(shape, dtype, device, *, residual, affine, ratio):
    x = (torch.randn(shape, device=device) + ratio).to(dtype).requires_grad_()
    weight = (1 + 0.3 * torch.randn(shape[-1], device=device)).to(dtype).requires_grad_(affine)
    bias = torch.randn(shape[-1], device=device).to(dtype).requires_grad_(affine)
    added = torch.randn(shape, device=device).to(dtype).requires_grad_() if residual else None
    return [x, weight, bias, added]


def cotangents(shape, dtype, device, *, residual, kind):
    if kind == "expanded":
        dy = torch.full((), 0.37, dtype=dtype, device=device).expand(shape)
    elif kind == "slice of a cat":
        dy = torch.randn(*shape[:-1], shape[-1] + 3, dtype=dtype, device=device)[..., 2:-1]
    else:
        dy = torch.randn(shape, dtype=dtype, device=device)
    return [torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device)[..., ::2], dy][0 if residual else 1 :]


CASES = [
    # shape, dtype, residual, trainable affine, gradient, mean / std
    ((3, 21, 320), torch.float32, False, False, "dense", 3.0),
    ((3, 21, 320), torch.bfloat16, True, True, "slice of a cat", 3.0),
    ((3, 21, 320), torch.float16, True, False, "expanded", 3.0),
    ((2, 9, 640), torch.bfloat16, False, True, "dense", 3.0),
    ((70, 77), torch.float32, True, True, "slice of a cat", 100.0),  # a tail of 13, several blocks a program
    ((7, 64), torch.float32, False, True, "expanded", 10.0),  # no tail
    ((2, 1280), torch.float16, False, True, "dense", 30.0),
    ((1,), torch.float32, False, True, "dense", 1.0),
    ((5, 3, 3), torch.bfloat16, True, True, "dense", 1.0),
]
REAL = [
    ((2, 4096, 320), torch.bfloat16, True, True, "dense", 3.0),
    ((16, 1024, 640), torch.bfloat16, True, False, "slice of a cat", 3.0),
    ((2, 77, 768), torch.float32, False, True, "dense", 100.0),
    ((2, 1024, 1280), torch.float16, True, True, "dense", 3.0),
    ((3, 16384), torch.bfloat16, False, True, "dense", 3.0),
]


@pytest.mark.parametrize(
    ("shape", "dtype", "residual", "affine", "kind", "ratio"), CASES if is_interpreting() else CASES + REAL, ids=str
)
def test_against_float64(shape, dtype, residual, affine, kind, ratio, device):
    values = inputs(shape, dtype, device, residual=residual, affine=affine, ratio=ratio)
    grads = cotangents(shape, dtype, device, residual=residual, kind=kind)
    assert_op_as_accurate(fast, eager, values, grads)


def test_statistics_far_from_zero(device):
    x = torch.randn(4, 77, device=device) + 100
    one = torch.ones(77, device=device)
    _, out, mean, rstd = torch.ops.fastcraft.layer_norm(x, one, one, None, 1e-5)
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=2e-7, atol=0)
    torch.testing.assert_close(rstd.double(), (exact.var(1, correction=0) + 1e-5).rsqrt(), rtol=2e-6, atol=0)
    wanted = F.layer_norm(exact, (77,), one.double(), one.double(), 1e-5)
    assert (out.double() - wanted).abs().max() < 100 * 2**-22  # a mean rounded to float32, in standard deviations


def test_two_runs_are_bit_equal(device):
    values = inputs((30, 77), torch.bfloat16, device, residual=True, affine=True, ratio=3.0)
    grads = cotangents((30, 77), torch.bfloat16, device, residual=True, kind="dense")
    first, second = run(fast, values, grads), run(fast, values, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_the_sum_is_used(device):
    x, weight, bias, residual = inputs((5, 6), torch.float32, device, residual=True, affine=True, ratio=1.0)
    total, _ = fast(x, weight, bias, residual)
    grads = torch.autograd.grad(total.sum(), (x, weight, bias, residual), allow_unused=True)
    assert torch.equal(grads[0], torch.ones_like(x))
    assert torch.equal(grads[3], grads[0])
    assert grads[1] is None
    assert grads[2] is None
