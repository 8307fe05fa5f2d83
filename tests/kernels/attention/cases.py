"""Self-attention's Triton source against float64; run by ``tests/kernels/test_cases.py``."""

import pytest
import torch

from fastcraft_kernels.attention import attention
from fastcraft_kernels.launch import assume_device
from fastcraft_kernels.testing import A100, H200, assert_op_as_accurate, run

pytestmark = pytest.mark.usefixtures("triton_backend")


def eager(q, k, v, *, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT * scale).softmax(-1) @ v).transpose(1, 2)


def inputs(device, dtype, seq, head_dim, *, n=1, heads=2):
    return [torch.randn(n, seq, heads, head_dim, device=device).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize(
    ("facts", "dtype", "seq", "head_dim"),
    [
        (A100, torch.float16, 256, 40), (A100, torch.bfloat16, 200, 40), (A100, torch.bfloat16, 128, 64),
        (A100, torch.float16, 70, 80), (A100, torch.bfloat16, 65, 160), (A100, torch.float32, 64, 40),
        (A100, torch.float32, 33, 160), (A100, torch.float32, 7, 80), (A100, torch.float32, 40, 64),
        (H200, torch.bfloat16, 256, 40), (H200, torch.float16, 200, 40), (H200, torch.float16, 130, 64),
        (H200, torch.bfloat16, 128, 80), (H200, torch.float16, 65, 160), (H200, torch.float16, 2, 64),
    ],
    ids=str,
)  # fmt: skip
def test_output_and_gradients(device, facts, dtype, seq, head_dim):
    q, k, v = inputs(device, dtype, seq, head_dim)
    dout = torch.randn(1, seq, 2, head_dim, device=device)
    with assume_device(facts):
        assert_op_as_accurate(attention, eager, [q, k, v], [dout])


@pytest.mark.parametrize("facts", [A100, H200], ids=["pointers", "descriptors"])
def test_slices_of_one_projection_and_of_a_cat(device, facts):
    fused = torch.randn(2, 96, 3, 2, 40, device=device).half().requires_grad_()
    dout = torch.randn(2, 96, 4, 40, device=device)[:, :, 1:3]

    def op(x, attend=attention):
        return attend(*x.unbind(2))

    with assume_device(facts):
        assert_op_as_accurate(op, lambda x: op(x, eager), [fused], [dout])


def test_unlike_and_unaligned_strides_and_an_expanded_gradient(device):
    q = torch.randn(1, 2, 40, 64, device=device).half().transpose(1, 2).requires_grad_()
    k = torch.randn(1, 40, 2, 65, device=device).half()[..., 1:].requires_grad_()
    v = torch.randn(1, 40, 64, 2, device=device).half().mT.requires_grad_()
    with assume_device(H200):
        assert_op_as_accurate(attention, eager, [q, k, v], [torch.ones((), device=device).expand(1, 40, 2, 64)])


def test_large_scores_and_a_scale_of_ones_own(device):
    q, k, v = inputs(device, torch.float16, 70, 40)
    scores = [(q.detach() * 16).requires_grad_(), k, v]
    dout = torch.randn(1, 70, 2, 40, device=device)
    assert_op_as_accurate(lambda *x: attention(*x, scale=0.3), lambda *x: eager(*x, scale=0.3), scores, [dout])


def test_a_backward_pass_takes_another_providers_forward_pass(device):
    q, k, v = inputs(device, torch.float16, 70, 80)
    dout = torch.randn(1, 70, 2, 80, device=device)

    def mixed(q, k, v):
        return torch.ops.fastcraft.attention(q, k, v, 80**-0.5, "reference", "triton")[0]

    assert_op_as_accurate(mixed, eager, [q, k, v], [dout])


def test_an_older_triton_takes_whole_tails(device, monkeypatch):
    monkeypatch.setattr("fastcraft_kernels.attention.launcher.has_narrow_group_products", lambda: False)
    tensors = inputs(device, torch.float16, 70, 40)
    with assume_device(H200):
        assert_op_as_accurate(attention, eager, tensors, [torch.randn(1, 70, 2, 40, device=device)])


def test_two_runs_are_bit_equal(device):
    q, k, v = inputs(device, torch.bfloat16, 200, 40)
    dout = torch.randn(1, 200, 2, 40, device=device)
    first, second = run(attention, [q, k, v], [dout]), run(attention, [q, k, v], [dout])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
