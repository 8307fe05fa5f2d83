"""The Triton path: one or two launches each way, chosen by `plan.make_plan`."""

import torch
from torch import Tensor

from fastcraft_kernels.group_norm_silu.kernel_small import small_backward, small_forward
from fastcraft_kernels.group_norm_silu.kernel_split import split_backward, split_forward
from fastcraft_kernels.group_norm_silu.plan import SmallPlan, SplitPlan, make_plan
from fastcraft_kernels.group_norm_silu.rows import empty_rows, from_rows, to_rows
from fastcraft_kernels.launch import device_facts, device_guard


def _plan(x: Tensor, num_groups: int) -> SmallPlan | SplitPlan:
    num_rows = x[0, 0].numel()
    return make_plan(
        device_facts(x.device), x.shape[0], num_rows, x.shape[1], num_groups=num_groups, itemsize=x.element_size()
    )


def _contiguous_channels(shift: Tensor | None) -> Tensor | None:
    """``(N, C)`` whose channels are contiguous; the sample stride may be anything, 0 for a bias shared by all."""
    return shift if shift is None or shift.stride(1) == 1 else shift.contiguous()


def group_norm_silu_forward(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, residual: Tensor | None, num_groups: int,
    eps: float, silu: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `reference.group_norm_silu_forward`; outputs are channels-last."""
    plan = _plan(x, num_groups)
    total = None if residual is None else empty_rows(x)
    y = empty_rows(x)
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=torch.float32) for _ in range(2))
    arguments = (
        to_rows(x), weight.contiguous(), bias.contiguous(), _contiguous_channels(shift),
        None if residual is None else to_rows(residual), total, y, mean, rstd, eps, silu,
    )  # fmt: skip
    with device_guard(x):
        if isinstance(plan, SmallPlan):
            small_forward(plan, *arguments)
        else:
            split_forward(plan, *arguments)
    return None if total is None else from_rows(total, x.shape), from_rows(y, x.shape), mean, rstd


def group_norm_silu_backward(
    d_out: Tensor, d_total: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None,
    mean: Tensor, rstd: Tensor, silu: bool, affine_grad: bool, shift_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """As `reference.group_norm_silu_backward`."""
    plan = _plan(h, mean.shape[1])
    dx = empty_rows(h)
    planes = (to_rows(d_out), None if d_total is None else to_rows(d_total), to_rows(h))
    arguments = (*planes, weight.contiguous(), bias.contiguous(), _contiguous_channels(shift), mean, rstd, dx, silu)
    with device_guard(h):
        if isinstance(plan, SmallPlan):
            parts, d_shift = small_backward(plan, *arguments, affine_grad, shift_grad)
        else:
            parts = split_backward(plan, *arguments, shift_grad)
            d_shift = _shift_gradient(parts.sum(2), weight, rstd, planes[2].shape[1]) if shift_grad else None
    d_bias = d_weight = None
    if affine_grad and parts is not None:
        d_bias, d_weight = (parts[i].flatten(0, -2).sum(0) for i in range(2))
    return from_rows(dx, h.shape), d_weight, d_bias, d_shift


def _shift_gradient(sums: Tensor, weight: Tensor, rstd: Tensor, num_rows: int) -> Tensor:
    """The sum of dx over the plane ``(N, C)``, from the sums that the two launches needed anyway."""
    num_groups = rstd.shape[1]
    width = weight.numel() // num_groups

    def group_mean(values: Tensor) -> Tensor:  # (N, C) -> the mean over group and plane, spread over its channels
        means = values.unflatten(1, (num_groups, width)).mean(2) / num_rows
        return means.repeat_interleave(width, dim=1)

    dz, dz_normal, normal, d_total = sums
    scaled = weight.float() * dz
    inner = scaled - num_rows * group_mean(scaled) - normal * group_mean(weight.float() * dz_normal)
    return rstd.repeat_interleave(width, dim=1) * inner + d_total
