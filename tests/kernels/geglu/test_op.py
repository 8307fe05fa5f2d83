"""The public op on CPU: registration, gradients, what it keeps, what it refuses."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastcraft_kernels.geglu import geglu
from fastcraft_kernels.testing import assert_op_as_accurate


def eager(x):
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def test_registration():
    x = torch.randn(3, 2, 10).transpose(0, 1).requires_grad_()
    torch.library.opcheck(torch.ops.fastcraft.geglu.default, (x,))


def test_gradients_in_float64():
    x = torch.randn(3, 4, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(geglu, (x,), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_reference_is_as_accurate_as_eager(dtype):
    x = (3 * torch.randn(4, 5, 34)).to(dtype).requires_grad_()
    assert_op_as_accurate(geglu, eager, [x], [torch.randn(4, 5, 20)[..., 2:19]])


def test_only_the_input_is_kept():
    x, kept = torch.randn(4, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        geglu(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_compiled_and_checkpointed_gradients_are_equal():
    x = torch.randn(4, 64, requires_grad=True)

    def block(x):
        return (geglu(x * 2) ** 2).sum()

    (expected,) = torch.autograd.grad(block(x), x)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for loss in (compiled(x), checkpoint(block, x, use_reentrant=False)):
        assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 5), r"last dimension of x must be even, got shape \(3, 5\)"),
        (torch.zeros(0, 4), r"not empty, got shape \(0, 4\)"),
        (torch.zeros(()), r"must be \(\.\.\., 2F\) and not empty, got shape \(\)"),
        (torch.zeros(4, dtype=torch.int64), r"floating dtype, got torch\.int64"),
    ],
    ids=str,
)
def test_bad_input_is_named(x, message):
    with pytest.raises(ValueError, match=rf"geglu: .*{message}"):
        geglu(x)
