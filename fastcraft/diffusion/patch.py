"""Put the fused ops into a diffusers UNet or VAE or a reward's image tower, and take them out again.

A module keeps its class, its parameters and its name; only its ``forward`` (or its attention processor) is replaced on
the instance, so checkpointing, ``torch.compile``, eval and train mode, and state dicts work as before. Convolution
weights are laid out channels-last meanwhile. What does not meet the guards of its rule (in `patch_rules` or
`tower_rules`) is left as it is, and `Patch.swaps` says why.

Linear layers stay: PyTorch's own keep nothing of their input while the weight is frozen.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastcraft.diffusion.patch_rules import RULES, Replacement, embeds_patches, refusal
from fastcraft.diffusion.tower_rules import TOWER_RULES
from fastcraft.errors import UserError
from fastcraft.registry import suggestion
from fastcraft_kernels import flops  # noqa: F401 - a patched model's FLOPs can be counted
from fastcraft_kernels.backend import BACKENDS, current_backend, set_backend, triton_refusal

ALL_RULES = RULES | TOWER_RULES


@dataclass(frozen=True, kw_only=True)
class Swap:
    """What becomes of one module: the ``ops`` that run in it, or the ``reason`` why it is left as it is."""

    module: str
    kind: str
    ops: str = ""
    reason: str = ""


class Patch:
    """Context manager that swaps the fused ops into models and out again.

    Args:
        models: a ``UNet2DConditionModel``, an ``AutoencoderKL``, the image half of a ``CLIPModel`` or a
            ``BlipVisionModel``, each on one device and in one dtype; one that is named twice is patched once.
        backend: who computes the ops while the patch is on: ``"reference"`` (plain PyTorch), ``"triton"`` (the kernels,
            or an error), ``"auto"`` (the kernels on CUDA, plain PyTorch elsewhere).

    Attributes:
        swaps: for each model, one `Swap` per module that a rule knows, in module order; there before the patch is on.

    Raises:
        UserError: an unknown backend, or ``"triton"`` where the kernels cannot run.

    The backend belongs to the process while a patch is on, so backward must run inside the block too.
    """

    def __init__(self, *models: nn.Module, backend: str = "auto") -> None:
        if backend not in BACKENDS:
            raise UserError(f"backend: unknown name {backend!r}{suggestion(backend, BACKENDS)}")
        if backend == "triton":
            for model in models:
                parameter = next(model.parameters())
                if reason := triton_refusal(parameter.device, parameter.dtype):
                    raise UserError(f"backend: 'triton' cannot serve {type(model).__name__}: {reason}")
        self.backend = backend
        self.models = tuple(dict.fromkeys(models))
        plans = [_plan(model) for model in self.models]
        self.swaps: list[list[Swap]] = [swaps for swaps, _ in plans]
        self._replacements = [replacement for _, replacements in plans for replacement in replacements]
        self._stack: ExitStack | None = None

    def apply(self) -> "Patch":
        """Put the ops in.

        Raises:
            ValueError: they are in already.
        """
        if self._stack is not None:
            raise ValueError("Patch.apply: this patch is on already")
        with ExitStack() as stack:
            stack.callback(set_backend, current_backend())  # a plain call: a patch may outlive its `Patch`
            set_backend(self.backend)
            for model in self.models:
                _use_channels_last(model, stack)
            for owner, name, value in self._replacements:
                stack.callback(_restore, owner, name, owner.__dict__.get(name))
                owner.__dict__[name] = value
            self._stack = stack.pop_all()
        return self

    def undo(self) -> None:
        """Take the ops out: every forward, processor, weight layout and the process's backend are as before."""
        if self._stack is not None:
            self._stack.close()
            self._stack = None

    def __enter__(self) -> "Patch":
        return self.apply()

    def __exit__(self, *_: object) -> None:
        self.undo()

    def summary(self) -> str:
        """One line a model: how many modules run which ops, how many are left as they are."""
        lines = []
        for model, swaps in zip(self.models, self.swaps, strict=True):
            counts = Counter(swap.ops for swap in swaps if swap.ops)
            parts = [f"{number} x {ops}" for ops, number in counts.most_common()]
            if refused := sum(1 for swap in swaps if swap.reason):
                parts.append(f"{refused} left as they are")
            lines.append(f"{type(model).__name__}: {', '.join(parts)}")
        return "\n".join(lines)


def _plan(model: nn.Module) -> tuple[list[Swap], list[Replacement]]:
    """Decide, touching nothing."""
    swaps: list[Swap] = []
    replacements: list[Replacement] = []
    absorbed: set[int] = set()
    for name, module in model.named_modules():  # parents before their children
        kind = type(module).__name__
        rule = ALL_RULES.get((type(module).__module__.partition(".")[0], kind))
        if rule is None or id(module) in absorbed:
            continue
        reason = refusal(module, rule)
        label = f"{name}.{rule.label}".strip(".")
        swaps.append(Swap(module=label, kind=kind, ops="" if reason else rule.ops(module), reason=reason))
        if not reason:
            absorbed |= {id(getattr(module, child)) for child in rule.absorbs}
            replacements += rule.replace(module, name)
    return swaps, replacements


def _use_channels_last(model: nn.Module, stack: ExitStack) -> None:
    """Lay out convolution weights channels-last until ``stack`` closes."""
    for module in model.modules():
        if type(module) is not nn.Conv2d or embeds_patches(module):
            continue
        if not module.weight.is_contiguous(memory_format=torch.channels_last):
            stack.callback(_lay_out, module.weight, module.weight.stride())
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def _lay_out(weight: torch.Tensor, stride: tuple[int, ...]) -> None:
    data = torch.empty_strided(weight.shape, stride, dtype=weight.dtype, device=weight.device)
    weight.data = data.copy_(weight.data)


def _restore(owner: Any, name: str, value: Any) -> None:
    if value is None:
        del owner.__dict__[name]
    else:
        owner.__dict__[name] = value
