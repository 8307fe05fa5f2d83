"""What one step costs, counted without running it: FLOPs of a callable under fake tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


def count_flops(
    call: Callable[[Tensor], Tensor], shape: tuple[int, ...], *, device: torch.device | str = "cpu"
) -> tuple[int, int]:
    """FLOPs of ``call`` on a float32 input of ``shape``: (forward, backward to the input).

    A multiply-add counts as two. Nothing is computed: weights are read as fake tensors, so this takes about a second
    for Stable Diffusion's UNet on any machine.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(shape, device=device, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            output = call(x)
        with FlopCounterMode(display=False) as backward:
            output.float().sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def step_flops(
    unet: tuple[int, int], decode: tuple[int, int], *, samples: int, num_inference_steps: int, backprop_steps: int,
    guided: bool, recompute: bool,
) -> dict[str, int]:  # fmt: skip
    """FLOPs of one optimiser step by phase.

    Args:
        unet: forward and backward of one UNet call on one latent.
        decode: forward and backward of one decode.
        samples: pictures of the step, over all micro-steps of one rank.
        num_inference_steps: T.
        backprop_steps: K.
        guided: whether every step calls the UNet on two latents.
        recompute: whether the K steps and the decode run forward a second time.
    """
    calls = samples * (2 if guided else 1)
    forwards = 2 if recompute else 1
    return {
        "prefix": calls * (num_inference_steps - backprop_steps) * unet[0],
        "steps with gradient": calls * backprop_steps * (forwards * unet[0] + unet[1]),
        "decode": samples * (forwards * decode[0] + decode[1]),
    }


def parameter_counts(*modules: Any) -> tuple[int, int]:
    """(trainable, frozen) parameters of ``modules``."""
    trainable = frozen = 0
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                trainable += parameter.numel()
            else:
                frozen += parameter.numel()
    return trainable, frozen
