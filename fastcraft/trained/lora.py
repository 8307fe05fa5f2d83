"""LoRA (Hu et al. 2021, arXiv:2106.09685) on linear layers and convolutions of any model.

PEFT's layer casts its input to the adapter's float32, so three projections of one bfloat16 input keep three float32
copies of it until backward: a third more activations in a UNet. Here the adapters are cast instead, and their input is
kept once. With the same seed the adapters are those of PEFT 0.21's ``init_lora_weights="gaussian"``.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastcraft import remade

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The attention of a CLIP text encoder: TexForce's (arXiv:2311.15657), with rank 16 and alpha 16."""

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention of a diffusers UNet: diffusers' own examples."""

UNET_LINEAR_TARGETS = (*UNET_TARGETS, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
"""Every linear layer and 1x1 convolution inside a UNet's transformers: kohya's default."""

_RESNET = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")

UNET_CONV_TARGETS = (*UNET_LINEAR_TARGETS, *_RESNET, "downsamplers.0.conv", "upsamplers.0.conv")
"""The same and all of the ResNet blocks and of what resamples between them: kohya's with ``conv_dim``."""

LONGALIGN_TARGETS = (*UNET_TARGETS, "ff.net.0.proj", *_RESNET)
"""Attention, the gate of the feed-forward, ResNet blocks: LongAlign's (arXiv:2410.11817), with rank and alpha 32."""


class LoRALayer(nn.Module):
    """``base(x) + lora_B(lora_A(x)) * scaling`` around a frozen layer.

    Kept for backward are ``x``, unless it can be made again (`fastcraft.remade`), the product of width ``rank`` and the
    adapters in ``x``'s dtype. The layer has no ``weight`` of its own on purpose: code that reads a layer's weight
    instead of calling it would lose the adapter.

    Args:
        base: an ``nn.Linear`` or ``nn.Conv2d`` of one group; of any float dtype, which is that of ``x``.
        rank: r, at least 1.
        alpha: the adapter is scaled by ``alpha / rank``.
        rslora: scale by ``alpha / sqrt(rank)`` instead (arXiv:2312.03732).

    Attributes:
        lora_A: float32 weight ``(r, in)``, or ``(r, in, k, k)`` with stride, padding and dilation of ``base``.
        lora_B: float32 weight ``(out, r)``, or ``(out, r, 1, 1)``; zero, so that at first nothing changes.
        enabled: see `adapters_off`.

    Raises:
        ValueError: a rank below 1, or a layer of another kind.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, *, rank: int, alpha: float, rslora: bool = False) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank: must be at least 1, got {rank}")
        self.base = base.requires_grad_(False)  # registered first: a model's dtype is that of its first parameter
        self.rank, self.alpha = rank, alpha
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.lora_A, self.lora_B = _adapter(base, rank)
        nn.init.normal_(self.lora_A.weight, std=1 / rank)
        nn.init.zeros_(self.lora_B.weight)
        self.lora_A.to(base.weight.device)
        self.lora_B.to(base.weight.device)
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """As ``base``: ``(..., in)`` to ``(..., out)``, or ``(N, in, H, W)`` to ``(N, out, H', W')``.

        Raises:
            RuntimeError: the adapters are off and gradients are on.
        """
        if not self.enabled:
            _refuse_gradients()
            return self.base(x)
        out = self.base(x)
        low_rank = self.lora_B(self.lora_A(x))
        return out + (low_rank if self.scaling == 1 else low_rank * self.scaling)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}"


class AdapterLinear(nn.Linear):
    """A float32 weight, applied in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return remade.linear(x, self.weight)


class AdapterConv2d(nn.Conv2d):
    """A float32 weight, applied in the dtype of the input.

    A class of its own also keeps `fastcraft.diffusion.patch` from laying out a trained weight anew.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return self._conv_forward(x, remade.cast(self.weight, x), None)
        geometry: Any = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return remade.conv2d(x, self.weight, **geometry)


def inject_lora(
    model: nn.Module, *, rank: int, alpha: float, targets: Sequence[str], rslora: bool = False
) -> list[str]:
    """Put a `LoRALayer` around layers of a model, in place; everything but the adapters is frozen.

    Args:
        model: has no LoRA yet. Its output stays as it is.
        rank, alpha, rslora: as in `LoRALayer`.
        targets: names of ``nn.Linear`` and ``nn.Conv2d`` modules, whole or what they end in behind a dot.

    Returns:
        Names of the wrapped layers, in module order, in which the adapters are drawn from torch's generator.

    Raises:
        ValueError: a target that is no layer's name, a bad rank, or a model with LoRA.
    """
    if any(isinstance(module, LoRALayer) for module in model.modules()):
        raise ValueError("inject_lora: the model has LoRA layers already")
    layers = {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    for target in targets:
        if not any(_ends_in(name, target) for name in layers):
            known = sorted({_short(name) for name in layers})
            raise ValueError(f"targets: no linear layer or convolution is named {target!r}; there are {known}")
    model.requires_grad_(False)
    names = [name for name in layers if any(_ends_in(name, target) for target in targets)]
    for name in names:
        layer = LoRALayer(layers[name], rank=rank, alpha=alpha, rslora=rslora)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, layer.train(layers[name].training))
    return names


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before `inject_lora`, to the bit, until the block ends; blocks may be nested.

    Only for use without gradient: what a checkpoint recomputes in backward runs after the block, with the adapters on.

    Raises:
        RuntimeError: gradients are on, here or at a call of the model inside the block.
    """
    _refuse_gradients()
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def _adapter(base: nn.Linear | nn.Conv2d, rank: int) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
    """Both factors; each draws its torch initialisation, which PEFT draws too before it overwrites it."""
    if isinstance(base, nn.Linear):
        return (
            AdapterLinear(base.in_features, rank, bias=False, dtype=torch.float32),
            AdapterLinear(rank, base.out_features, bias=False, dtype=torch.float32),
        )
    if not isinstance(base, nn.Conv2d) or base.groups != 1:
        raise ValueError(f"LoRA: the layer must be a Linear, or a Conv2d of one group, got {base}")
    geometry: dict[str, Any] = {name: getattr(base, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    size: Any = base.kernel_size
    down = AdapterConv2d(base.in_channels, rank, size, bias=False, dtype=torch.float32, **geometry)
    return down, AdapterConv2d(rank, base.out_channels, 1, bias=False, dtype=torch.float32)


def _refuse_gradients() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("adapters_off: only for use under torch.no_grad()")


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _short(name: str) -> str:
    """The last part of a module's name, with the one before it where it is a number: ``to_out.0``."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
