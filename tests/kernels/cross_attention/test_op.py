"""Cross-attention on CPU: the op, its gradient, the sums in which gradients of all steps meet."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastcraft_kernels.attention.tiles import HEAD_SPLITS
from fastcraft_kernels.backend import use_backend
from fastcraft_kernels.cross_attention import cross_attention, gather_kv_gradients
from fastcraft_kernels.cross_attention.tiles import (
    FLOAT32,
    FLOAT32_TILES,
    LOOP_TILES,
    TILES,
    key_blocks,
    query_tile,
    split_queries,
)
from fastcraft_kernels.launch import DeviceFacts
from fastcraft_kernels.testing import A100, H200, assert_op_as_accurate


def qkv(seq=6, keys=5, width=40, n=2, kv=2, heads=2, dtype=torch.float64):
    shapes = [(n, seq, heads, width), (kv, keys, heads, width), (kv, keys, heads, width)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def plain(q, k, v):
    k, v = (torch.cat([x[:1].expand(len(q) - len(x), -1, -1, -1), x]) for x in (k, v))
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("width", HEAD_SPLITS)
def test_the_reference_agrees_with_pytorch(width, kv):
    inputs = qkv(seq=9, width=width, kv=kv, dtype=torch.bfloat16)
    assert_op_as_accurate(cross_attention, plain, inputs, [torch.randn(2, 9, 2, width)])


@pytest.mark.parametrize(("n", "num_shared"), [(4, 2), (5, 4), (3, 3), (2, 1)])
def test_the_first_samples_share_one_text(n, num_shared):
    inputs = qkv(seq=9, n=n, kv=n - num_shared + 1, dtype=torch.bfloat16)
    op = partial(cross_attention, num_shared=num_shared)
    assert_op_as_accurate(op, plain, inputs, [torch.randn(n, 9, 2, 40)])


def test_gradcheck_and_opcheck():
    inputs = qkv(n=3, kv=2)
    assert torch.autograd.gradcheck(partial(cross_attention, num_shared=2), inputs, fast_mode=True)
    torch.library.opcheck(torch.ops.fastcraft.cross_attention.default, (*inputs, 0.2, 2, None, None))


def test_the_variant_with_sums_passes_opcheck():
    q, k, v = qkv(n=3)
    sums = (torch.zeros_like(k).detach(), torch.zeros_like(v).detach())
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastcraft.cross_attention.default, (q, k, v, 0.2, 2, *sums), test_utils=tests)
    arguments = (torch.ones_like(q), q, k, v, *sums, 0.2, 2)
    arguments = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    torch.library.opcheck(torch.ops.fastcraft.cross_attention_backward_into.default, arguments, test_utils=tests)


def steps(k, v, queries, *, gathered, attend=cross_attention):
    """Sum of three denoising steps' outputs over one text."""
    if not gathered:
        return sum(attend(q, k, v).square().sum() for q in queries)
    k, v, sums = gather_kv_gradients(k, v)
    return sum(attend(q, k, v, sums=sums).square().sum() for q in queries)


def three_steps(dtype, kv=2):
    _, k, v = qkv(kv=kv, dtype=dtype)
    return k, v, [torch.randn(2, 6 + i, 2, 40, dtype=dtype, requires_grad=True) for i in range(3)]


def checkpointed(*args, **kwargs):
    return torch.utils.checkpoint.checkpoint(cross_attention, *args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize("attend", [cross_attention, checkpointed])
@pytest.mark.parametrize("kv", [1, 2])
def test_gradients_of_all_steps_meet(kv, attend):
    k, v, queries = three_steps(torch.float64, kv)
    want = torch.autograd.grad(steps(k, v, queries, gathered=False), [k, v, *queries])
    loss = steps(k, v, queries, gathered=True, attend=attend)
    for _ in range(2):  # the second pass over a retained graph starts from zero
        torch.testing.assert_close(torch.autograd.grad(loss, [k, v, *queries], retain_graph=True), want)


def test_a_pass_that_ends_before_the_text_leaves_nothing_in_the_sums():
    k, v, queries = three_steps(torch.float64)
    want = torch.autograd.grad(steps(k, v, queries, gathered=False), [k, v])
    want_q = torch.autograd.grad(steps(k, v, queries, gathered=False), queries)
    loss = steps(k, v, queries, gathered=True)
    torch.testing.assert_close(torch.autograd.grad(loss, queries, retain_graph=True), want_q)
    torch.testing.assert_close(torch.autograd.grad(loss, [k, v]), want)


def test_meeting_in_float32_is_more_accurate():
    text = torch.randn(1, 5, 2, 40, dtype=torch.bfloat16)
    k, v = (text.clone().requires_grad_() for _ in range(2))
    queries = [torch.randn(1, 6, 2, 40, dtype=torch.bfloat16) for _ in range(64)]

    def dv(k, v, queries, gathered):
        if gathered:
            k, v_used, sums = gather_kv_gradients(k, v)
            outs = [cross_attention(q, k, v_used, sums=sums) for q in queries]
        else:
            outs = [cross_attention(q, k, v) for q in queries]
        return torch.autograd.grad(torch.stack(outs).sum(), v)[0].double()

    exact = dv(k.double(), v.detach().double().requires_grad_(), [q.double() for q in queries], False)
    added, met = (dv(k, v, queries, gathered) - exact for gathered in (False, True))
    assert met.norm() < added.norm() / 2


def test_other_uses_of_gathered_keys_count_too():
    k, v, (q, *_) = three_steps(torch.float64)
    want = torch.autograd.grad(cross_attention(q, k, v).sum() + (k * v).sum(), [k, v])
    gathered_k, gathered_v, sums = gather_kv_gradients(k, v)
    loss = cross_attention(q, gathered_k, gathered_v, sums=sums).sum() + (gathered_k * gathered_v).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, [k, v]), want)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_agrees_with_eager(dynamic):
    inputs = qkv(n=4, kv=3, dtype=torch.float32)
    op = partial(cross_attention, num_shared=2)
    options = {"backend": "aot_eager", "fullgraph": True, "dynamic": dynamic}
    compiled = torch.compile(lambda q, k, v: op(q, k, v) * 1.0, **options)
    want, got = (torch.autograd.grad(op(*inputs).square().sum(), inputs) for op in (op, compiled))
    torch.testing.assert_close(got, want)


def test_sums_are_refused_in_a_compiled_graph(monkeypatch):
    q, k, v = qkv()
    k, v, sums = gather_kv_gradients(k, v)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match=r"cross_attention: sums must be None under torch\.compile"):
        cross_attention(q, k, v, sums=sums)


@pytest.mark.parametrize("gathered", [False, True])
def test_q_k_v_are_all_that_is_saved(gathered):
    q, k, v = qkv(dtype=torch.bfloat16)
    sums = None
    if gathered:
        k, v, sums = gather_kv_gradients(k, v)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        cross_attention(q, k, v, sums=sums)
    assert {x.untyped_storage().data_ptr() for x in saved} == {x.untyped_storage().data_ptr() for x in (q, k, v)}


def test_frozen_keys_cost_no_gradient():
    q, k, v = qkv()
    cross_attention(q, k.detach(), v.detach()).sum().backward()
    assert q.grad is not None
    backward = torch.ops.fastcraft.cross_attention_backward(torch.ones_like(q), q, k, v, 0.2, 1, False)
    assert [x.numel() for x in backward] == [q.numel(), 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 6, 40)}, r"q must be \(N, S, H, D\) and not empty, got shape \(2, 6, 40\)"),
        ({"q": torch.zeros(2, 6, 2, 48)}, "head width of q must be one of 40, 64, 80, 160, got 48"),
        ({"q": torch.zeros(2, 6, 2, 40, dtype=torch.int32)}, "q must be float16, .* got torch.int32"),
        ({"k": torch.zeros(3, 5, 2, 40)}, r"k must be \(2 or 1, L, 2, 40\) to fit q, got shape \(3, 5, 2, 40\)"),
        ({"k": torch.zeros(2, 513, 2, 40)}, "k must hold 1 to 512 keys, got 513"),
        ({"k": torch.zeros(2, 0, 2, 40)}, "k must hold 1 to 512 keys, got 0"),
        ({"v": torch.zeros(1, 5, 2, 40)}, r"v must have k's shape \(2, 5, 2, 40\), got \(1, 5, 2, 40\)"),
        ({"v": torch.zeros(2, 5, 2, 40).half()}, "v must be torch.float32 on cpu like q, got torch.float16 on cpu"),
        ({"k": torch.zeros(2, 5, 2, 40, device="meta")}, "k must be torch.float32 on cpu like q, got .* on meta"),
        ({"num_shared": 2}, r"k must be \(1 or 1, L, 2, 40\) to fit q, got shape \(2, 5, 2, 40\)"),
        ({"num_shared": 3}, "num_shared must be 1 to 2, the samples of q, got 3"),
        ({"num_shared": 0}, "num_shared must be 1 to 2, the samples of q, got 0"),
        ({"scale": -1.0}, "scale must be positive and finite, got -1.0"),
        (
            {"sums": (torch.zeros(2, 5, 2, 40).half(),) * 2},
            "sums must be contiguous torch.float32 .* got torch.float16",
        ),
        ({"sums": (torch.zeros(1, 5, 2, 40),) * 2}, r"sums must be .* of shape \(2, 5, 2, 40\) .* \(1, 5, 2, 40\)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_illegal_input_is_named(change, message):
    arguments = {"q": torch.zeros(2, 6, 2, 40)} | {name: torch.zeros(2, 5, 2, 40) for name in "kv"} | change
    with pytest.raises(ValueError, match=f"cross_attention: {message}"):
        cross_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_gathering_unlike_tensors_is_an_error():
    with pytest.raises(ValueError, match=r"gather_kv_gradients: k and v must be of one float dtype and shape, got"):
        gather_kv_gradients(torch.zeros(1, 5, 2, 40), torch.zeros(1, 4, 2, 40))


def test_the_triton_backend_is_refused_on_cpu():
    with use_backend("triton"), pytest.raises(ValueError, match="cross_attention: backend triton was asked for"):
        cross_attention(*qkv(dtype=torch.float32))


def test_keys_are_cut_into_powers_of_two():
    def cut(keys, kernel="forward", dtype=torch.bfloat16, head_dim=40, arch=80):
        blocks = key_blocks(keys, kernel=kernel, arch=arch, head_dim=head_dim, dtype=dtype)
        return blocks.count, blocks.first, blocks.rest

    assert [cut(n) for n in (1, 16, 17, 40, 64)] == [(1, 16, 0), (1, 16, 0), (1, 32, 0), (1, 32, 16), (1, 64, 0)]
    assert [cut(n) for n in (77, 81, 97, 128)] == [(1, 64, 16), (1, 64, 32), (1, 64, 64), (1, 64, 64)]
    assert [cut(n) for n in (129, 231, 512)] == [(3, 64, 0), (4, 64, 0), (8, 64, 0)]
    assert cut(77, dtype=torch.float32) == (3, 32, 0)
    assert [cut(77, "dq", head_dim=160, arch=arch) for arch in (80, 90, 120)] == [(2, 64, 0), (1, 64, 16), (1, 64, 16)]
    assert [cut(n, "dkdv", head_dim=40) for n in (77, 97, 231)] == [(1, 64, 16), (1, 128, 0), (2, 128, 0)]
    assert [cut(n, "dkdv", head_dim=80) for n in (16, 40, 77, 231)] == [
        (1, 16, 0), (1, 64, 0), (1, 128, 0), (2, 128, 0)
    ]  # fmt: skip
    for keys in range(1, 513):
        for kernel, arch in (("forward", 80), ("dq", 80), ("dq", 90), ("dkdv", 90)):
            for head_dim in HEAD_SPLITS:
                blocks = key_blocks(keys, kernel=kernel, arch=arch, head_dim=head_dim, dtype=torch.float16)
                size = blocks.first + blocks.rest
                assert (blocks.count - 1) * size + blocks.first * (blocks.rest > 0) < keys <= blocks.count * size
                assert blocks.rest_full == (keys % size == 0)


def test_queries_are_split_until_the_device_is_full():
    rule = {"num_heads": 16, "blocks": 1, "rows": 32}
    assert split_queries(H200, num_queries=4096, **rule) == (8, 512)
    assert split_queries(A100, num_queries=256, **rule) == (2, 128)
    assert split_queries(A100, num_queries=300, **rule) == (2, 160)
    assert split_queries(A100, num_queries=4096, **rule | {"num_heads": 128}) == (1, 4096)
    assert split_queries(DeviceFacts(arch=0, num_sms=2), num_queries=7, **rule) == (1, 32)


def test_tiles():
    def tile(kernel, arch, head_dim, dtype=torch.float16, num_blocks=1):
        return query_tile(kernel, arch=arch, head_dim=head_dim, dtype=dtype, num_blocks=num_blocks)

    assert tile("dq", 120, 40) is TILES[90][40]["dq"]
    assert tile("forward", 80, 160) is TILES[80][160]["forward"]
    assert tile("forward", 80, 160, num_blocks=2) is LOOP_TILES[80, "forward", 160]
    assert tile("dq", 80, 40, torch.float32) is FLOAT32
    assert tile("dkdv", 90, 80, torch.float32) is FLOAT32_TILES["dkdv", 80]
