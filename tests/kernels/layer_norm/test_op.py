"""The public op on CPU: registration, gradients, what it keeps, what it refuses."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastcraft_kernels.layer_norm import layer_norm
from fastcraft_kernels.testing import assert_op_as_accurate


def affine(width, dtype=torch.float32, grad=False):
    return (torch.rand(width, dtype=dtype) + 0.5).requires_grad_(grad), torch.randn(
        width, dtype=dtype, requires_grad=grad
    )


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_registration(residual, trainable):
    x = torch.randn(3, 2, 6).transpose(0, 1).requires_grad_()
    added = torch.randn(2, 3, 6, requires_grad=True) if residual else None
    torch.library.opcheck(torch.ops.fastcraft.layer_norm.default, (x, *affine(6, grad=trainable), added, 1e-5))


@pytest.mark.parametrize("residual", [False, True])
def test_gradients_in_float64(residual):
    double = torch.float64
    values = [torch.randn(3, 7, dtype=double, requires_grad=True), *affine(7, double, True)]
    values += [torch.randn(3, 7, dtype=double, requires_grad=True)] if residual else []

    def op(x, weight, bias, added=None):
        return layer_norm(x, weight, bias, eps=1e-5, residual=added)

    assert torch.autograd.gradcheck(op, values, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_reference_is_as_accurate_as_eager(dtype):
    x, (weight, bias) = torch.randn(4, 5, 40).add(5).to(dtype).requires_grad_(), affine(40, dtype, True)

    def eager(x, weight, bias):
        return F.layer_norm(x, (40,), weight, bias, 1e-5)

    def fast(x, weight, bias):
        return layer_norm(x, weight, bias, eps=1e-5)

    assert_op_as_accurate(fast, eager, [x, weight, bias], [torch.randn(()).expand(4, 5, 40)])


def test_a_frozen_norm_keeps_its_input_and_the_statistics():
    x, (weight, bias), kept = torch.randn(4, 8, 64, requires_grad=True), affine(64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer_norm(x, weight, bias, eps=1e-5)
    fresh = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    for given in (x, weight, bias):
        assert fresh.pop(given.untyped_storage().data_ptr())
    assert sum(fresh.values()) == 2 * 4 * 8 * 4  # mean and rstd, float32


def test_compiled_and_checkpointed_gradients_are_equal():
    x, (weight, bias) = torch.randn(4, 16, requires_grad=True), affine(16, grad=True)

    def block(x, weight, bias):
        total, out = layer_norm(x * 2, weight, bias, eps=1e-5, residual=x)
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
        ({"x": torch.zeros(0, 6)}, r"x must be \(\.\.\., C\) and not empty, got shape \(0, 6\)"),
        ({"x": torch.zeros(1, 16385)}, "last dimension of x must be at most 16384, got 16385"),
        ({"x": torch.zeros(2, 6).int()}, r"x must be of a floating dtype, got torch\.int32"),
        ({"eps": -1.0}, r"eps must be positive, got -1\.0"),
        ({"weight": torch.ones(5)}, r"weight must have shape \(6,\), got \(5,\)"),
        ({"bias": torch.ones(6, device="meta")}, "bias must be on x's device cpu, got meta"),
        ({"residual": torch.ones(6)}, r"residual must have shape \(2, 6\), got \(6,\)"),
        ({"residual": torch.ones(2, 6).half()}, r"residual must have x's dtype torch\.float32, got torch\.float16"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.zeros(2, 6), "weight": torch.ones(6), "bias": torch.ones(6), "eps": 1e-5} | change
    with pytest.raises(ValueError, match=f"layer_norm: .*{message}"):
        layer_norm(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments)
