"""DDIM (Song et al. 2020, arXiv:2010.02502, Eq. 12) for networks that predict epsilon or v."""

from fastcraft.diffusion.samplers.grid import Grid, StepRow
from fastcraft.diffusion.schedule import NoiseSchedule, timestep_grid
from fastcraft.errors import UserError


def ddim(schedule: NoiseSchedule, *, num_inference_steps: int, eta: float = 0.0, spacing: str = "trailing") -> Grid:
    """The rows of diffusers' ``DDIMScheduler``.

    As there, a step ends at the level of ``timestep - num_train_timesteps // num_inference_steps``, for every spacing.
    Where ``num_inference_steps`` divides ``num_train_timesteps`` that is the grid's next timestep; elsewhere, in a
    trailing grid, it is the next timestep or the one above it.

    Args:
        schedule: the model's noise schedule.
        num_inference_steps: T, 1..num_train_timesteps.
        eta: noise weight in [0, 1]; 0 is deterministic.
        spacing: timestep grid, see `timestep_grid`.

    Raises:
        UserError: an argument outside the above.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta must lie in [0, 1], got {eta}")
    timesteps = timestep_grid(schedule, num_inference_steps, spacing)
    stride = schedule.num_train_timesteps // num_inference_steps
    return Grid(tuple(_row(schedule, timestep, timestep - stride, eta) for timestep in timesteps))


def step_coefficients(
    alpha_cumprod: float, previous_alpha_cumprod: float, *, eta: float, prediction_type: str
) -> tuple[float, float, float]:
    """``(a, b, c)`` of a step from signal level ``alpha_cumprod`` to ``previous_alpha_cumprod``, both squared.

    For a v-prediction, x0 and epsilon are those of Salimans and Ho 2022 (arXiv:2202.00512, appendix D), which hold in
    pure noise (``alpha_cumprod`` 0) too.
    """
    signal, noise = alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
    variance = (1 - previous_alpha_cumprod) / (1 - alpha_cumprod) * (1 - alpha_cumprod / previous_alpha_cumprod)
    sigma = eta * variance**0.5
    of_original = previous_alpha_cumprod**0.5
    of_epsilon = max(1 - previous_alpha_cumprod - sigma**2, 0.0) ** 0.5  # rounding may leave less than 0
    if prediction_type == "epsilon":
        of_latents = of_original / signal
        return of_latents, of_epsilon - of_latents * noise, sigma
    return of_original * signal + of_epsilon * noise, of_epsilon * signal - of_original * noise, sigma


def _row(schedule: NoiseSchedule, timestep: int, previous: int, eta: float) -> StepRow:
    level, kind = schedule.alpha_cumprod(timestep), schedule.prediction_type
    a, b, c = step_coefficients(level, schedule.alpha_cumprod(previous), eta=eta, prediction_type=kind)
    p, q, _ = step_coefficients(level, 1.0, eta=0.0, prediction_type=kind)  # a step that ends without any noise
    return StepRow(time=timestep, a=a, b=b, c=c, p=p, q=q, signal=level**0.5, noise=(1 - level) ** 0.5)
