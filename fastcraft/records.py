"""Data that the floors hand to each other: no behaviour beyond shape checks.

Shape letters: B prompts, S segments of a prompt, L text length, D embedding width, K steps with gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch:
    """Prompts of one micro-batch on one rank.

    ``indices`` are global sample numbers (they count every sample of the run over all ranks and steps), from which
    the noise of a sample is seeded: the same sample has the same noise at any world size.
    """

    prompts: list[str]
    indices: list[int]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """Token ids of B prompts.

    ``input_ids`` is ``(B, S, 77)`` int64; ``num_truncated`` counts the prompts that lost tokens.
    """

    input_ids: Tensor
    num_truncated: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptEmbeds:
    """Encoded prompts: ``cond`` ``(B, L, D)``, ``uncond`` ``(1, L, D)`` of the empty prompt, None without guidance."""

    cond: Tensor
    uncond: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextKV:
    """Keys and values of every cross-attention layer, projected once per prompt.

    ``layers`` maps the layer's module name in the UNet to ``(key, value)``, each ``(R, L, C)``. Of the UNet's N samples
    (2B with guidance, unconditional ones first) the first N - R + 1 read row 0, each of the others a row of its own. So
    R = N is a row each, and with R = B + 1 the unconditional samples share one.

    ``sums`` has, for layers that add the gradients of all denoising steps up themselves, the float32 tensors that they
    are added to, in the shapes of key and value.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]
    sums: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def flat(self) -> list[Tensor]:
        """Every tensor in layer order: key, value, key, value, ..."""
        return [tensor for pair in self.layers.values() for tensor in pair]

    def unflatten(self, flat: Sequence[Tensor], *, with_sums: bool = False) -> "TextKV":
        """Other tensors in the places of these; the inverse of `flat`.

        ``with_sums`` is for tensors whose gradient reaches these very ones in the pass that computes it. Copies (a
        graph's static inputs, say) go without, and get their gradient from autograd.
        """
        layers = dict(zip(self.layers, zip(flat[::2], flat[1::2], strict=True), strict=True))
        return TextKV(layers=layers, sums=self.sums if with_sums else {})

    def repeat(self, times: int, *, num_samples: int) -> "TextKV":
        """For a batch of ``num_samples`` that is stacked ``times`` over: every branch's rows, as often in turn.

        A row that the unconditional samples share stays one. There are no ``sums``: these rows are copies.
        """

        def rows(tensor: Tensor) -> Tensor:
            shared, own = tensor.split([len(tensor) % num_samples, len(tensor) // num_samples * num_samples])
            branches = own.unflatten(0, (-1, 1, num_samples)).expand(-1, times, -1, -1, -1)
            return torch.cat([shared, branches.flatten(0, 2)])

        return TextKV(layers={name: (rows(key), rows(value)) for name, (key, value) in self.layers.items()})

    def detach(self) -> "TextKV":
        """The same numbers, cut off from the text encoder."""
        return TextKV(layers={name: (key.detach(), value.detach()) for name, (key, value) in self.layers.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """Which denoising steps run and which of them carry gradient.

    ``num_steps`` steps are executed, counted from the noisiest; ``grad_steps`` are indices below it, ascending.
    """

    num_steps: int
    grad_steps: tuple[int, ...] = ()
    predict_original: bool = False  # the last executed step gives its x0 estimate instead of the next latents
    input_grad: bool = True  # False: stop-gradient on the latents that enter the UNet
    uncond_grad: bool = True  # False: stop-gradient on the unconditional prediction
    row_starts: tuple[
        int, ...
    ] = ()  # per sample, its first step with gradient; empty = the first of grad_steps for all

    def __post_init__(self) -> None:
        if list(self.grad_steps) != sorted(set(self.grad_steps)) or any(
            not 0 <= index < self.num_steps for index in self.grad_steps
        ):
            raise ValueError(
                f"Trajectory: grad_steps must ascend within 0..{self.num_steps - 1}, got {self.grad_steps}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardOutput:
    """Scores of B images: ``total`` ``(B,)`` float32 carries the gradient; ``parts`` are raw scores by reward name."""

    total: Tensor
    parts: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """One loss to minimise: ``loss`` is a scalar tensor; ``metrics`` are detached scalars, left on the device."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
