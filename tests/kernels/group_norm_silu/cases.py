"""The Triton source of group_norm_silu against float64; see `fastcraft_kernels.testing` for how cases are run."""

import pytest
import torch
from torch.nn import functional as F

from fastcraft_kernels.group_norm_silu import group_norm_silu
from fastcraft_kernels.group_norm_silu.plan import SmallPlan, SplitPlan, make_plan
from fastcraft_kernels.launch import INTERPRETER, assume_device, device_facts, is_interpreting
from fastcraft_kernels.testing import H200, assert_op_as_accurate, run

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    # Rows outside the plane hold zeros, far from the mean: the interpreter's sigmoid overflows to its limit, 0.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]

SMALL, SPLIT = SmallPlan, SplitPlan
LAST = torch.channels_last
FOLDS = {"none": (False, False), "shift": (True, False), "residual": (False, True), "both": (True, True)}


def op(num_groups, eps, silu):
    def fast(x, weight, bias, shift, residual):
        return group_norm_silu(
            x, weight, bias, num_groups=num_groups, eps=eps, silu=silu, shift=shift, residual=residual
        )

    def eager(x, weight, bias, shift, residual):
        h = x if shift is None else x + shift.reshape(*shift.shape, *[1] * (x.ndim - 2))
        h = h if residual is None else h + residual
        y = F.group_norm(h, num_groups, weight, bias, eps)
        y = F.silu(y) if silu else y
        return y if residual is None else (h, y)

    return fast, eager


def inputs(shape, dtype, device, *, folds="none", affine=True, ratio=3.0, layout=LAST):
    """Values around a different mean for each channel, whose mean is ``ratio`` standard deviations from zero."""
    n, c = shape[:2]

    def make(*size, scale=1.0):
        return torch.randn(*size, device=device) * scale

    has_shift, has_residual = FOLDS[folds]
    x = make(*shape) + ratio + make(1, c, *[1] * (len(shape) - 2), scale=0.3)
    x = x.to(dtype).contiguous(memory_format=layout if len(shape) == 4 else torch.contiguous_format)
    residual = make(*shape).to(dtype) if has_residual else None
    shift = make(n, c).to(dtype) if has_shift else None
    weight, bias = (1 + make(c, scale=0.3)).to(dtype), make(c).to(dtype)
    for tensor in (x, shift, residual, *((weight, bias) if affine else ())):
        if tensor is not None:
            tensor.requires_grad_()
    return [x, weight, bias, shift, residual]


def cotangents(shape, dtype, device, *, total=False, kind="dense"):
    if kind == "expanded":
        dy = torch.full((), 0.37, dtype=dtype, device=device).expand(shape)
    elif kind == "slice of a cat":
        dy = torch.randn(shape[0], shape[1] + 5, *shape[2:], dtype=dtype, device=device)[:, 3 : 3 + shape[1]]
    else:
        dy = torch.randn(shape, dtype=dtype, device=device)
    return [torch.randn(shape, dtype=dtype, device=device).transpose(-1, -2).contiguous().transpose(-1, -2), dy][
        0 if total else 1 :
    ]


def planned(x, num_groups):
    return make_plan(
        device_facts(x.device), x.shape[0], x[0, 0].numel(), x.shape[1],
        num_groups=num_groups, itemsize=x.element_size(),
    )  # fmt: skip


CASES = [
    # shape, groups, form, dtype, folds, SiLU, trainable affine, gradient, mean / std, layout, eps
    ((2, 96, 17, 19), 8, SPLIT, torch.float32, "none", True, False, "dense", 3.0, LAST, 1e-5),
    ((2, 96, 17, 19), 8, SPLIT, torch.float32, "none", True, True, "dense", 100.0, torch.contiguous_format, 1e-6),
    ((2, 96, 17, 19), 8, SPLIT, torch.bfloat16, "shift", True, True, "slice of a cat", 3.0, LAST, 1e-5),
    ((2, 96, 17, 19), 8, SPLIT, torch.float16, "both", False, True, "expanded", 3.0, LAST, 1e-6),
    ((1, 160, 15, 18), 2, SPLIT, torch.float32, "both", True, True, "slice of a cat", 10.0, LAST, 1e-5),
    ((1, 160, 15, 18), 2, SPLIT, torch.bfloat16, "residual", True, False, "dense", 3.0, LAST, 1e-5),
    ((1, 7, 19, 17), 7, SPLIT, torch.float32, "residual", True, True, "dense", 100.0, LAST, 1e-5),
    ((1, 64, 32, 48), 32, SPLIT, torch.bfloat16, "none", True, False, "expanded", 30.0, LAST, 1e-6),
    ((2, 80, 8, 8), 8, SMALL, torch.float32, "both", True, True, "dense", 100.0, LAST, 1e-5),
    ((2, 80, 7, 9), 8, SMALL, torch.bfloat16, "shift", True, True, "slice of a cat", 3.0, LAST, 1e-5),
    ((3, 36, 5, 1), 6, SMALL, torch.float16, "residual", False, False, "expanded", 3.0, LAST, 1e-6),
    ((2, 24, 11), 3, SMALL, torch.float32, "none", True, True, "dense", 10.0, LAST, 1e-5),
    ((4, 24), 4, SMALL, torch.float32, "shift", True, True, "dense", 1.0, LAST, 1e-5),
]
REAL = [
    ((2, 320, 64, 64), 32, SPLIT, torch.bfloat16, "both", True, True, "dense", 3.0, LAST, 1e-5),
    ((8, 960, 64, 64), 32, SPLIT, torch.bfloat16, "none", True, False, "dense", 3.0, LAST, 1e-5),
    ((2, 1920, 32, 32), 32, SPLIT, torch.float16, "shift", True, True, "slice of a cat", 3.0, LAST, 1e-5),
    ((2, 640, 64, 64), 32, SPLIT, torch.bfloat16, "none", False, False, "dense", 3.0, LAST, 1e-6),
    ((1, 128, 512, 512), 32, SPLIT, torch.bfloat16, "none", True, False, "expanded", 3.0, LAST, 1e-6),
    ((2, 2560, 8, 8), 32, SMALL, torch.bfloat16, "both", True, True, "dense", 3.0, LAST, 1e-5),
    ((16, 1920, 16, 16), 32, SMALL, torch.bfloat16, "shift", True, False, "dense", 3.0, LAST, 1e-5),
    ((2, 320, 64, 64), 32, SPLIT, torch.float32, "both", True, True, "dense", 100.0, LAST, 1e-5),
]


@pytest.mark.parametrize(
    ("shape", "groups", "form", "dtype", "folds", "silu", "affine", "kind", "ratio", "layout", "eps"),
    CASES if is_interpreting() else CASES + REAL,
    ids=str,
)
def test_against_float64(shape, groups, form, dtype, folds, silu, affine, kind, ratio, layout, eps, device):
    values = inputs(shape, dtype, device, folds=folds, affine=affine, ratio=ratio, layout=layout)
    grads = cotangents(shape, dtype, device, total=FOLDS[folds][1], kind=kind)
    fast, eager = op(groups, eps, silu)
    with assume_device(H200 if form is SPLIT else INTERPRETER):  # several splits; several groups a program
        assert isinstance(planned(values[0], groups), form)
        assert_op_as_accurate(fast, eager, values, grads)


def test_two_runs_are_bit_equal(device):
    shape = (2, 64, 17, 19)
    values = inputs(shape, torch.bfloat16, device, folds="both")
    grads = cotangents(shape, torch.bfloat16, device, total=True)
    fast, _ = op(32, 1e-5, True)
    with assume_device(H200):
        first, second = run(fast, values, grads), run(fast, values, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(1, 32, 17, 19), (2, 32, 8, 8)], ids=["split", "small"])
def test_statistics_far_from_zero(shape, device):
    """Plain sums of squares would leave an error near 1e-3 here; only the rounding of the mean itself remains."""
    x = (torch.randn(shape, device=device) + 100).contiguous(memory_format=LAST)
    one = torch.ones(32, device=device)
    with assume_device(H200):
        _, out, mean, rstd = torch.ops.fastcraft.group_norm_silu(x, one, one, None, None, 4, 1e-5, False)
    groups = x.double().reshape(shape[0], 4, -1)
    exact = (groups.var(2, correction=0) + 1e-5).rsqrt()
    torch.testing.assert_close(mean.double(), groups.mean(2), rtol=2e-7, atol=0)
    torch.testing.assert_close(rstd.double(), exact, rtol=2e-6, atol=0)
    wanted = F.group_norm(x.double(), 4, one.double(), one.double(), 1e-5)
    assert (out.double() - wanted).abs().max() < 100 * 2**-22  # a mean rounded to float32, in standard deviations


def test_outputs_are_channels_last(device):
    x, weight, bias, _, _ = inputs((2, 64, 4, 4), torch.float32, device, layout=torch.contiguous_format)
    total, out = group_norm_silu(x, weight, bias, num_groups=32, eps=1e-5, residual=x.detach())
    assert total.is_contiguous(memory_format=LAST)
    assert out.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("shape", [(1, 64, 17, 19), (1, 64, 4, 4)], ids=["split", "small"])
def test_a_float32_affine_over_16_bit_planes(shape, device):
    x, weight, bias, _, _ = inputs(shape, torch.bfloat16, device)
    fast, _ = op(32, 1e-5, True)
    dy = torch.randn(shape, device=device)
    narrow = run(fast, [x, weight, bias, None, None], [dy])
    wide = [value.detach().float().requires_grad_() for value in (weight, bias)]
    mixed = run(fast, [x, *wide, None, None], [dy])
    assert torch.equal(mixed[0], narrow[0])
    assert torch.equal(mixed[1], narrow[1])
    assert mixed[2].dtype == mixed[3].dtype == torch.float32
    assert torch.equal(mixed[2].bfloat16(), narrow[2])


def test_only_the_sum_is_used(device):
    shape = (2, 64, 4, 4)
    values = inputs(shape, torch.float32, device, folds="both")
    fast, _ = op(32, 1e-5, True)
    _, _, dx, d_weight, d_bias, d_shift, d_residual = run_unused(fast, values, torch.ones(shape, device=device))
    assert torch.equal(dx, torch.ones_like(dx))
    assert torch.equal(d_residual, dx)
    assert torch.equal(d_shift, torch.full((2, 64), 16.0, device=device))
    assert d_weight is None
    assert d_bias is None


def run_unused(fast, values, d_total):
    leaves = [value.detach().requires_grad_() for value in values]
    total, out = fast(*leaves)
    return total, out, *torch.autograd.grad(total, leaves, d_total, allow_unused=True)
