"""DDIM (Song et al. 2020, arXiv:2010.02502, Eq. 12), as a pure function of its arguments."""

from torch import Tensor

from fastcraft.diffusion.schedule import NoiseSchedule, timestep_grid


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

    def step(self, index: int, latents: Tensor, model_output: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents after step ``index``.

        Args:
            index: 0 is the noisiest step.
            latents: ``(B, C, H, W)`` float32, before the step.
            model_output: ``(B, C, H, W)``, the guided prediction (epsilon or v).
            noise: ``(B, C, H, W)`` standard normal, needed when ``eta`` > 0.

        Returns:
            ``(B, C, H, W)`` float32.
        """
        timestep = self.timesteps[index]
        alpha_cumprod = self.schedule.alpha_cumprod(timestep)
        previous = self.schedule.alpha_cumprod(timestep - self.stride)
        pred_original_sample, noise_pred = self._split(index, latents, model_output)
        variance = (1 - previous) / (1 - alpha_cumprod) * (1 - alpha_cumprod / previous)
        sigma = self.eta * variance**0.5
        latents = previous**0.5 * pred_original_sample + (1 - previous - sigma**2) ** 0.5 * noise_pred
        if sigma == 0:
            return latents
        if noise is None:
            raise ValueError(f"DDIMSampler.step: eta = {self.eta} needs noise, got None")
        return latents + sigma * noise

    def predict_original(self, index: int, latents: Tensor, model_output: Tensor) -> Tensor:
        """``pred_original_sample`` at step ``index``: the x0 estimate, same shape as ``latents``."""
        return self._split(index, latents, model_output)[0]

    def add_noise(self, index: int, original: Tensor, noise: Tensor) -> Tensor:
        """A sample of the forward process at the timestep of step ``index``."""
        alpha_cumprod = self.schedule.alpha_cumprod(self.timesteps[index])
        return alpha_cumprod**0.5 * original + (1 - alpha_cumprod) ** 0.5 * noise

    def _split(self, index: int, latents: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, epsilon) from either kind of prediction."""
        alpha_cumprod = self.schedule.alpha_cumprod(self.timesteps[index])
        alpha, sigma = alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
        if self.schedule.prediction_type == "epsilon":
            return (latents - sigma * model_output) / alpha, model_output
        return alpha * latents - sigma * model_output, alpha * model_output + sigma * latents
