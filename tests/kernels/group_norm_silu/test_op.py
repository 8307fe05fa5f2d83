"""The public op on CPU: registration, gradients, what it keeps, what it refuses."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastcraft_kernels.backend import use_backend
from fastcraft_kernels.group_norm_silu import group_norm_silu
from fastcraft_kernels.group_norm_silu import op as op_module
from fastcraft_kernels.testing import assert_op_as_accurate

OP = torch.ops.fastcraft.group_norm_silu.default


def planes(*shape, dtype=torch.float32, grad=True):
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_(grad)


def affine(channels, dtype=torch.float32, grad=False):
    return (torch.rand(channels, dtype=dtype) + 0.5).requires_grad_(grad), torch.randn(
        channels, dtype=dtype, requires_grad=grad
    )


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_registration(residual, trainable):
    x, (weight, bias) = planes(2, 6, 3, 2), affine(6, grad=trainable)
    shift = torch.randn(2, 6, requires_grad=trainable)
    torch.library.opcheck(OP, (x, weight, bias, shift, planes(2, 6, 3, 2) if residual else None, 3, 1e-5, True))


@pytest.mark.parametrize("silu", [False, True])
def test_gradients_in_float64(silu):
    double = torch.float64
    values = (
        planes(2, 6, 2, 2, dtype=double),
        *affine(6, double, True),
        torch.randn(2, 6, dtype=double).requires_grad_(),
    )

    def both(x, weight, bias, shift, residual):
        return group_norm_silu(x, weight, bias, num_groups=2, eps=1e-5, silu=silu, shift=shift, residual=residual)

    def one(x, weight, bias, shift):
        return group_norm_silu(x, weight, bias, num_groups=2, eps=1e-5, silu=silu, shift=shift)

    assert torch.autograd.gradcheck(one, values, fast_mode=True)
    assert torch.autograd.gradcheck(both, (*values, planes(2, 6, 2, 2, dtype=double)), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (2, 12, 9), (3, 12)], ids=str)
def test_the_reference_is_as_accurate_as_eager(shape, dtype):
    x = torch.randn(shape).add(5).to(dtype).requires_grad_()
    weight, bias = affine(12, dtype, True)

    def eager(x, weight, bias):
        return F.silu(F.group_norm(x, 4, weight, bias, 1e-6))

    def fast(x, weight, bias):
        return group_norm_silu(x, weight, bias, num_groups=4, eps=1e-6)

    assert_op_as_accurate(fast, eager, [x, weight, bias], [torch.randn(()).expand(shape)])


def test_one_bias_may_serve_every_sample():
    x, (weight, bias), shift = planes(3, 6, 2, 2), affine(6), torch.randn(6, requires_grad=True)
    out = group_norm_silu(x, weight, bias, num_groups=2, eps=1e-5, shift=shift.expand(3, 6))
    dense = group_norm_silu(x, weight, bias, num_groups=2, eps=1e-5, shift=shift.expand(3, 6).contiguous())
    assert torch.equal(out, dense)
    assert torch.autograd.grad(out.sum(), shift)[0].shape == (6,)


def test_a_frozen_norm_keeps_its_input_and_the_statistics():
    x, (weight, bias) = planes(2, 64, 8, 8), affine(64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = group_norm_silu(x, weight, bias, num_groups=32, eps=1e-5)
    fresh = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    for given in (x, weight, bias):
        assert fresh.pop(given.untyped_storage().data_ptr())
    assert sum(fresh.values()) == 2 * 2 * 32 * 4  # mean and rstd, float32
    assert torch.autograd.grad(out.sum(), x)[0].is_contiguous(memory_format=torch.channels_last)


def test_a_frozen_norm_computes_no_weight_gradient(monkeypatch):
    x, (weight, bias), seen = planes(2, 6, 2, 2), affine(6), []
    backward = op_module._group_norm_silu_backward
    monkeypatch.setattr(op_module, "_group_norm_silu_backward", lambda *a: seen.append(backward(*a)) or seen[-1])
    out = group_norm_silu(x, weight, bias, num_groups=2, eps=1e-5, shift=torch.ones(2, 6))
    torch.autograd.grad(out.sum(), x)
    assert [gradient.numel() for gradient in seen[0]] == [x.numel(), 0, 0, 0]


def test_compiled_and_checkpointed_gradients_are_equal():
    x, (weight, bias) = planes(2, 8, 4, 4), affine(8, grad=True)

    def block(x, weight, bias):
        total, out = group_norm_silu(x * 2, weight, bias, num_groups=4, eps=1e-5, residual=x)
        return (total * out).sum()

    expected = torch.autograd.grad(block(x, weight, bias), (x, weight, bias))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    again = checkpoint(block, x, weight, bias, use_reentrant=False)
    for loss in (compiled(x, weight, bias), again):
        for got, want in zip(torch.autograd.grad(loss, (x, weight, bias)), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, r"x must be \(N, C, ...\) and not empty, got shape \(4,\)"),
        ({"x": torch.zeros(0, 6, 2, 2)}, r"x must be \(N, C, ...\) and not empty, got shape \(0, 6, 2, 2\)"),
        ({"num_groups": 4}, "num_groups must divide the 6 channels of x, got 4"),
        ({"eps": 0.0}, r"eps must be positive, got 0\.0"),
        ({"weight": torch.ones(5)}, r"weight must have shape \(6,\), got \(5,\)"),
        ({"shift": torch.ones(1, 6)}, r"shift must have shape \(2, 6\), got \(1, 6\)"),
        ({"residual": torch.ones(2, 6, 2, 1)}, r"residual must have shape \(2, 6, 2, 2\), got \(2, 6, 2, 1\)"),
        (
            {"residual": torch.ones(2, 6, 2, 2).half()},
            r"residual must have x's dtype torch\.float32, got torch\.float16",
        ),
        ({"bias": torch.ones(6).int()}, r"bias must be of a floating dtype, got torch\.int32"),
        ({"bias": torch.ones(6, device="meta")}, "bias must be on x's device cpu, got meta"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.zeros(2, 6, 2, 2), "weight": torch.ones(6), "bias": torch.ones(6), "num_groups": 3}
    arguments |= {"eps": 1e-5} | change
    with pytest.raises(ValueError, match=f"group_norm_silu: {message}"):
        group_norm_silu(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments)


def test_the_kernels_refuse_a_cpu_tensor(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(ValueError, match="group_norm_silu: backend triton was asked for"):
        group_norm_silu(torch.zeros(1, 2, 2), torch.ones(2), torch.ones(2), num_groups=1, eps=1e-5)
