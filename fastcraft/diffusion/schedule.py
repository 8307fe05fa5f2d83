"""The noise schedule and the timestep grids: numbers only, no network."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fastcraft.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseSchedule:
    """Variance-preserving forward process.

    ``alphas_cumprod[t]`` is the squared signal level after timestep t; ``final_alpha_cumprod`` is the level after the
    last denoising step (1, or ``alphas_cumprod[0]`` for Stable Diffusion, whose ``set_alpha_to_one`` is false).
    The levels lie in (0, 1) and never rise with t; the last one alone may be 0, pure noise (zero terminal SNR,
    arXiv:2305.08891), where an epsilon says nothing about the picture and ``prediction_type`` must be v_prediction.

    Raises:
        UserError: levels or a prediction type outside the above.
    """

    alphas_cumprod: tuple[float, ...]
    final_alpha_cumprod: float
    prediction_type: str = "epsilon"
    steps_offset: int = 1

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"scheduler: prediction_type must be 'epsilon' or 'v_prediction', got {self.prediction_type!r}"
            )
        levels = (self.final_alpha_cumprod, *self.alphas_cumprod)
        falls = all(before >= after for before, after in pairwise((1.0, *levels)))
        if not falls or len(levels) < 2 or levels[1] >= 1 or levels[-2] <= 0 or levels[-1] < 0:
            raise UserError(
                "scheduler: final_alpha_cumprod and alphas_cumprod must fall from at most 1 to above 0, of which the "
                f"last may be 0, got {', '.join(f'{level:.4g}' for level in levels[:2])} to {levels[-1]:.4g}"
            )
        if levels[-1] == 0 and self.prediction_type == "epsilon":
            raise UserError(
                "scheduler: rescale_betas_zero_snr (alphas_cumprod that end in 0) needs prediction_type "
                "'v_prediction', got 'epsilon'"
            )

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> "NoiseSchedule":
        """The schedule of a diffusers ``DDIMScheduler``.

        Raises:
            UserError: it clips or thresholds its x0 estimate, or as for the class.
        """
        config = scheduler.config
        for key in ("clip_sample", "thresholding"):
            if config[key]:
                raise UserError(f"scheduler: {key} must be false, got {config[key]!r}")
        return cls(
            alphas_cumprod=tuple(scheduler.alphas_cumprod.tolist()),
            final_alpha_cumprod=float(scheduler.final_alpha_cumprod),
            prediction_type=config.prediction_type,
            steps_offset=config.steps_offset,
        )

    @property
    def num_train_timesteps(self) -> int:
        """1000 for every Stable Diffusion model."""
        return len(self.alphas_cumprod)

    def alpha_cumprod(self, timestep: int) -> float:
        """Squared signal level at ``timestep``; below 0 it is the final one."""
        return self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha_cumprod


def timestep_grid(schedule: NoiseSchedule, num_inference_steps: int, spacing: str) -> tuple[int, ...]:
    """Timesteps visited, noisiest first: those of diffusers' ``DDIMScheduler``, for every number of steps.

    ``trailing`` gives 999, 959, ..., 39 for 25 steps (TextCraftor) and 999, 979, ..., 19 for 50 (LongAlign);
    ``leading`` gives 981, 961, ..., 1 for 50 (TexForce, and diffusers' default for Stable Diffusion 1.x). Some trailing
    grids of diffusers, such as that of 61 steps, end in one timestep too many, -1, by rounding; it is left out here.

    Raises:
        UserError: more steps than train timesteps, or an unknown spacing.
    """
    total = schedule.num_train_timesteps
    if not 1 <= num_inference_steps <= total:
        raise UserError(f"num_inference_steps must lie in 1..{total}, got {num_inference_steps}")
    if spacing == "trailing":
        step = (total - total / num_inference_steps) - total  # rounded as in `numpy.arange`, which decides the halves
        return tuple(round(total + i * step) - 1 for i in range(num_inference_steps))
    if spacing == "leading":
        stride = total // num_inference_steps
        first = (num_inference_steps - 1) * stride + schedule.steps_offset
        if first >= total:
            raise UserError(
                f"num_inference_steps: {num_inference_steps} 'leading' steps begin at timestep {first}, "
                f"above the model's {total - 1}"
            )
        return tuple(first - i * stride for i in range(num_inference_steps))
    raise UserError(f"timestep_spacing must be 'trailing' or 'leading', got {spacing!r}")
