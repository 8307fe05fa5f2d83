"""Data that the floors hand to each other: no behaviour beyond shape checks.

Shape letters: B prompts, S segments of a prompt, R texts, L text length, D and P embedding widths.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
class TextEmbeds:
    """What a family's encoders say of R texts.

    ``sequence`` ``(R, L, D)`` is read token by token, ``pooled`` ``(R, P)`` as a whole, where the family has such;
    ``mask`` ``(R, L)`` is true at tokens to be read, None = at all of them.
    """

    sequence: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptEmbeds:
    """Encoded prompts: ``cond`` of B prompts, ``uncond`` of the empty prompt (one row), None without guidance."""

    cond: TextEmbeds
    uncond: TextEmbeds | None = None


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
    row_starts: tuple[int, ...] = ()  # of each sample, its first step with gradient; empty = the first of grad_steps

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
class Loss:
    """One loss to minimise: ``loss`` is a scalar tensor, ``metrics`` are detached scalars, left on the device.

    An update of the weights is made from one loss or more: ``share`` is the factor of this one's gradient in it (1 / n
    for a mean over n), and the last one says ``closes_update``.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    share: float = 1.0
    closes_update: bool = True
