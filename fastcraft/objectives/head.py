"""The head of a step (decode and rewards) taken backward first, part by part, before the denoising steps.

At larger batches the decode's activations are the peak. They depend on the final latents alone, so dL/d(latents) can be
made for a few pictures at a time and freed; the steps' backward then starts from it. The gradient is the same, since a
reward never looks at another picture of the batch and the loss is a mean over samples.

Shape letters: B samples; C, h, w of the latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcraft.records import RewardOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """What the head gave: ``output`` is detached; ``loss`` is a scalar whose backward goes on into the latents."""

    output: RewardOutput
    loss: Tensor


def head_first(
    latents: Tensor,
    prompts: list[str],
    *,
    decode: Callable[[Tensor], Tensor],
    rewards: Callable[..., RewardOutput],
    loss: Callable[[Tensor], Tensor],
    micro_batch: int,
) -> Head:
    """Decode, score and differentiate ``micro_batch`` pictures at a time.

    Rewards with running statistics (a ``statistics`` attribute that is not None) divide by numbers that depend on the
    whole batch. They are scored once more in advance, without gradient, so that every part sees the same divisors.

    Args:
        latents: ``(B, C, h, w)`` float32, with the graph of the denoising steps.
        prompts: B strings.
        decode: latents to pictures.
        rewards: (pictures, prompts) to scores; nothing trained inside.
        loss: totals ``(b,)`` to a scalar that adds up over parts of the batch.
        micro_batch: b, pictures at once.
    """
    parts = [(slice(i, i + micro_batch), prompts[i : i + micro_batch]) for i in range(0, len(prompts), micro_batch)]
    options: dict[str, Any] = {}
    if getattr(rewards, "statistics", None) is not None:
        with torch.no_grad():
            for rows, texts in parts:
                rewards(decode(latents[rows]), texts, update_statistics=True)
        options["update_statistics"] = False
    outputs, gradients, value = [], [], torch.zeros((), device=latents.device)
    for rows, texts in parts:
        leaf = latents[rows].detach().requires_grad_()
        output = rewards(decode(leaf), texts, **options)
        part = loss(output.total)
        (gradient,) = torch.autograd.grad(part, leaf)
        value = value + part.detach()
        gradients.append(gradient)
        outputs.append(output)
    return Head(
        output=RewardOutput(
            total=torch.cat([output.total.detach() for output in outputs]),
            parts={name: torch.cat([output.parts[name].detach() for output in outputs]) for name in outputs[0].parts},
        ),
        loss=_Attached.apply(latents, value, torch.cat(gradients)),
    )


class _Attached(torch.autograd.Function):
    """The value of a loss, with a gradient that is known already."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None
