"""A sampler's steps as rows of numbers: every deterministic or Gaussian update is linear in what it is given."""

from dataclasses import dataclass

from torch import Tensor

from fastcraft_kernels.guided_step import guided_step


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRow:
    """One denoising step, from latents x, the model's output m and standard normal noise z.

    ``x' = a x + b m + c z`` are the latents after the step and ``x0 = p x + q m`` the estimate of what is below the
    noise. ``c``, at least 0, is the standard deviation of ``x'`` given x, 0 for a deterministic step. The forward
    process makes ``signal x0 + noise z`` at this row. ``time`` is what the network is told: an int for Stable
    Diffusion, whose timesteps are 0..999.
    """

    time: float
    a: float
    b: float
    c: float = 0.0
    p: float
    q: float
    signal: float
    noise: float


@dataclass(frozen=True)
class Grid:
    """What a sampler gives: one row for each step, noisiest first; no state, so a step can be recomputed safely.

    ``initial_scale`` is the standard deviation of the latents that the first step starts from.
    """

    rows: tuple[StepRow, ...]
    initial_scale: float = 1.0

    def __len__(self) -> int:
        """T, the number of steps."""
        return len(self.rows)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The network's time at each step, ints where the rows have ints."""
        return tuple(row.time for row in self.rows)

    @property
    def needs_noise(self) -> bool:
        """Whether any `step` wants fresh noise."""
        return any(row.c > 0 for row in self.rows)

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
            model_output: what the network gave: ``(2B, C, H, W)``, unconditional rows first, or ``(B, C, H, W)`` with a
                ``guidance_scale`` of 1; any float dtype.
            guidance_scale: weight w of ``m_u + w (m_c - m_u)``, at least 1 (Ho and Salimans 2022, arXiv:2207.12598).
            noise: ``(B, C, H, W)`` standard normal, dtype of ``latents``, needed where the row's ``c`` > 0, ignored
                elsewhere; takes no gradient.

        Returns:
            ``(B, C, H, W)``, dtype of ``latents``.

        Raises:
            ValueError: shapes and dtypes that do not fit, or no noise where it is needed.
        """
        row = self.rows[index]
        return guided_step(latents, model_output, a=row.a, b=row.b, c=row.c, guidance_scale=guidance_scale, noise=noise)

    def predict_original(
        self, index: int, latents: Tensor, model_output: Tensor, *, guidance_scale: float = 1.0
    ) -> Tensor:
        """``pred_original_sample`` at step ``index``, the x0 estimate; arguments, shape and errors as for `step`."""
        row = self.rows[index]
        return guided_step(latents, model_output, a=row.p, b=row.q, guidance_scale=guidance_scale)

    def add_noise(self, index: int, original: Tensor, noise: Tensor) -> Tensor:
        """A sample of the forward process at the time of step ``index``, shape and dtype of ``original``."""
        row = self.rows[index]
        return row.signal * original + row.noise * noise
