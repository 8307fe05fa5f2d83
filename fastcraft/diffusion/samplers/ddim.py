"""DDIM (Song et al. 2020, arXiv:2010.02502, Eq. 12), as a pure function of its arguments."""

from torch import Tensor

from fastcraft.diffusion.schedule import NoiseSchedule, timestep_grid
from fastcraft_kernels.guided_step import guided_step


class DDIMSampler:
    """Denoising steps with coefficients fixed in advance; holds no state, so a step can be recomputed safely.

    Args:
        schedule: the model's noise schedule.
        num_inference_steps: T.
        eta: noise weight in [0, 1]; 0 is deterministic.
        spacing: timestep grid, see `timestep_grid`.
    """

    def __init__(
        self, schedule: NoiseSchedule, *, num_inference_steps: int, eta: float = 0.0, spacing: str = "trailing"
    ) -> None:
        self.schedule = schedule
        self.eta = eta
        self.timesteps = timestep_grid(schedule, num_inference_steps, spacing)
        self.stride = schedule.num_train_timesteps // num_inference_steps

    @property
    def needs_noise(self) -> bool:
        """Whether `step` wants fresh noise."""
        return self.eta > 0

    def step(
        self,
        index: int,
        latents: Tensor,
        model_output: Tensor,
        *,
        guidance_scale: float = 1.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Latents after step ``index``: guidance and update in one pass, which keeps nothing for backward.

        Args:
            index: 0 is the noisiest step.
            latents: ``(B, C, H, W)`` float32, before the step.
            model_output: epsilon or v: ``(2B, C, H, W)``, unconditional rows first, or ``(B, C, H, W)`` with a
                ``guidance_scale`` of 1; any float dtype.
            guidance_scale: weight w of ``e_u + w (e_c - e_u)``, at least 1 (Ho and Salimans 2022, arXiv:2207.12598).
            noise: ``(B, C, H, W)`` standard normal, dtype of ``latents``, needed when ``eta`` > 0; takes no gradient.

        Returns:
            ``(B, C, H, W)``, dtype of ``latents``.

        Raises:
            ValueError: shapes and dtypes that do not fit, or no noise where it is needed.
        """
        previous = self.schedule.alpha_cumprod(self.timesteps[index] - self.stride)
        return self._to_level(previous, index, latents, model_output, guidance_scale, self.eta, noise)

    def predict_original(
        self, index: int, latents: Tensor, model_output: Tensor, *, guidance_scale: float = 1.0
    ) -> Tensor:
        """``pred_original_sample`` at step ``index``, the x0 estimate: a step that ends without any noise."""
        return self._to_level(1.0, index, latents, model_output, guidance_scale, 0.0, None)

    def add_noise(self, index: int, original: Tensor, noise: Tensor) -> Tensor:
        """A sample of the forward process at the timestep of step ``index``."""
        alpha_cumprod = self.schedule.alpha_cumprod(self.timesteps[index])
        return alpha_cumprod**0.5 * original + (1 - alpha_cumprod) ** 0.5 * noise

    def _to_level(
        self,
        level: float,
        index: int,
        latents: Tensor,
        output: Tensor,
        guidance_scale: float,
        eta: float,
        noise: Tensor | None,
    ) -> Tensor:
        """From the timestep of step ``index`` to the squared signal level ``level``."""
        return guided_step(
            latents,
            output,
            alpha_cumprod=self.schedule.alpha_cumprod(self.timesteps[index]),
            previous_alpha_cumprod=level,
            guidance_scale=guidance_scale,
            eta=eta,
            noise=noise,
            prediction_type=self.schedule.prediction_type,
        )
