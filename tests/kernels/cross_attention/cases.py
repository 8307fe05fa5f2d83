"""Cross-attention's Triton source against float64; run by ``tests/kernels/test_cases.py``."""

from functools import partial

import pytest
import torch

from fastcraft_kernels.cross_attention import cross_attention, gather_kv_gradients
from fastcraft_kernels.launch import assume_device
from fastcraft_kernels.testing import A100, H200, assert_op_as_accurate, run

pytestmark = pytest.mark.usefixtures("triton_backend")


def eager(q, k, v, *, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT * scale).softmax(-1) @ v).transpose(1, 2)


def inputs(device, dtype, seq, keys, head_dim, *, n=2, kv=2, heads=1):
    shapes = [(n, seq, heads, head_dim), (kv, keys, heads, head_dim), (kv, keys, heads, head_dim)]
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(
    ("dtype", "seq", "keys", "head_dim", "kv"),
    [
        (torch.bfloat16, 300, 77, 40, 2), (torch.float16, 256, 77, 64, 1), (torch.float16, 130, 77, 80, 2),
        (torch.bfloat16, 64, 77, 160, 1), (torch.float16, 70, 2, 40, 2), (torch.bfloat16, 33, 16, 64, 2),
        (torch.float16, 64, 40, 80, 1), (torch.float16, 64, 128, 40, 2), (torch.bfloat16, 40, 100, 64, 1),
        (torch.bfloat16, 64, 160, 40, 2), (torch.float16, 50, 231, 80, 1), (torch.float16, 2, 130, 160, 2),
        (torch.float32, 50, 77, 40, 2), (torch.float32, 64, 5, 160, 1), (torch.float32, 33, 130, 80, 1),
    ],
    ids=str,
)  # fmt: skip
def test_output_and_gradients(device, dtype, seq, keys, head_dim, kv):
    tensors = inputs(device, dtype, seq, keys, head_dim, kv=kv)
    dout = torch.randn(2, seq, 1, head_dim, device=device)
    with assume_device(H200 if dtype == torch.bfloat16 else A100):
        assert_op_as_accurate(cross_attention, eager, tensors, [dout])


def with_own_rows(attend, num_shared, q, k, v):
    """``attend`` where every sample has a row of keys of its own."""
    return attend(q, *(torch.cat([x[:1].expand(num_shared - 1, -1, -1, -1), x]) for x in (k, v)))


@pytest.mark.parametrize(
    ("dtype", "seq", "keys", "head_dim", "n", "num_shared", "heads"),
    [
        (torch.bfloat16, 140, 77, 40, 4, 2, 1), (torch.float16, 30, 77, 80, 5, 3, 2),
        (torch.float16, 40, 130, 64, 4, 2, 1), (torch.float32, 33, 40, 160, 3, 3, 1),
    ],
    ids=str,
)  # fmt: skip
def test_the_first_samples_share_one_text(device, dtype, seq, keys, head_dim, n, num_shared, heads):
    tensors = inputs(device, dtype, seq, keys, head_dim, n=n, kv=n - num_shared + 1, heads=heads)
    dout = torch.randn(n, seq, heads, head_dim, device=device)
    with assume_device(A100):
        assert_op_as_accurate(
            partial(cross_attention, num_shared=num_shared), partial(with_own_rows, eager, num_shared), tensors, [dout]
        )


def test_one_key_gives_its_value(device):
    q, k, v = inputs(device, torch.float16, 20, 1, 40)
    out, dq, dk, dv = run(cross_attention, [q, k, v], [torch.ones(2, 20, 1, 40, device=device)])
    assert torch.equal(out, v.expand_as(out))
    assert dq.abs().max() <= 1e-6
    assert dk.abs().max() <= 1e-5
    assert torch.equal(dv, torch.full_like(dv, 20))


@pytest.mark.parametrize("kv", ["fused", "expanded", "odd"])
def test_strides_are_those_of_the_caller(device, kv):
    shape = {"fused": (2, 77, 2, 2, 40), "expanded": (1, 77, 2, 2, 40), "odd": (2, 77, 2, 2, 41)}[kv]
    source = torch.randn(shape, device=device).half().requires_grad_()
    q = torch.randn(2, 50, 3, 2, 40, device=device).half().requires_grad_()
    dout = torch.randn(2, 50, 4, 40, device=device)[:, :, 1:3]

    def op(q, source, attend=cross_attention):
        k, v = source[..., -40:].expand(2, -1, -1, -1, -1).unbind(2)
        return attend(q[:, :, 1], k, v)

    assert_op_as_accurate(op, lambda *x: op(*x, eager), [q, source], [dout])


def test_large_scores_and_an_expanded_gradient(device):
    q, k, v = inputs(device, torch.float16, 40, 77, 40)
    scores = [(q.detach() * 16).requires_grad_(), k, v]
    dout = torch.ones((), device=device).expand(2, 40, 1, 40)
    assert_op_as_accurate(lambda *x: cross_attention(*x, scale=0.3), lambda *x: eager(*x, scale=0.3), scores, [dout])


@pytest.mark.parametrize(("n", "kv"), [(2, 2), (2, 1), (4, 3)])
def test_gradients_of_all_steps_meet_in_float32(device, n, kv):
    _, k, v = inputs(device, torch.float16, 1, 77, 40, kv=kv)
    queries = [torch.randn(n, 40 + 30 * i, 1, 40, device=device).half().requires_grad_() for i in range(3)]
    num_shared = n - kv + 1
    douts = [torch.randn(q.shape, device=device) for q in queries]

    def steps(k, v, *queries, attend=cross_attention):
        if attend is eager:
            return tuple(with_own_rows(eager, num_shared, q, k, v) for q in queries)
        k, v, sums = gather_kv_gradients(k, v)
        return tuple(attend(q, k, v, num_shared=num_shared, sums=sums) for q in queries)

    assert_op_as_accurate(steps, lambda *x: steps(*x, attend=eager), [k, v, *queries], douts)


@pytest.mark.parametrize("needs", ["q", "kv"])
def test_frozen_inputs_get_no_gradient(device, needs):
    q, k, v = (
        x.requires_grad_(name in needs)
        for name, x in zip("qkv", inputs(device, torch.float16, 40, 77, 40), strict=True)
    )
    assert_op_as_accurate(cross_attention, eager, [q, k, v], [torch.randn(q.shape, device=device)])


def test_two_runs_are_bit_equal(device):
    tensors = inputs(device, torch.bfloat16, 300, 77, 40, kv=1)
    dout = torch.randn(2, 300, 1, 40, device=device)
    with assume_device(H200):
        first, second = run(cross_attention, tensors, [dout]), run(cross_attention, tensors, [dout])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
