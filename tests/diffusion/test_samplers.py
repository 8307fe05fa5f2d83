"""Samplers and grids against diffusers' scheduler."""

from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler

from fastcraft.diffusion.samplers import SAMPLERS
from fastcraft.diffusion.schedule import NoiseSchedule, timestep_grid
from fastcraft.errors import UserError


def scheduler(prediction_type: str = "epsilon", spacing: str = "trailing") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1,
        clip_sample=False, prediction_type=prediction_type, timestep_spacing=spacing,
    )  # fmt: skip


def test_grids_of_the_papers():
    schedule = NoiseSchedule.from_diffusers(scheduler())
    assert timestep_grid(schedule, 25, "trailing") == tuple(range(999, 38, -40))
    assert timestep_grid(schedule, 50, "trailing") == tuple(range(999, 18, -20))
    assert timestep_grid(schedule, 50, "leading") == tuple(range(981, 0, -20))


@pytest.mark.parametrize("num", [1, 7, 20, 25, 40, 50])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_grid_equals_diffusers(num, spacing):
    theirs = scheduler(spacing=spacing)
    theirs.set_timesteps(num)
    assert list(timestep_grid(NoiseSchedule.from_diffusers(theirs), num, spacing)) == theirs.timesteps.tolist()


def test_grid_rejects_bad_input():
    schedule = NoiseSchedule.from_diffusers(scheduler())
    with pytest.raises(UserError, match=r"num_inference_steps must lie in 1\.\.1000, got 0"):
        timestep_grid(schedule, 0, "trailing")
    with pytest.raises(UserError, match="timestep_spacing must be 'trailing' or 'leading', got 'uniform'"):
        timestep_grid(schedule, 5, "uniform")


@pytest.mark.parametrize("name", SAMPLERS.names())
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_step_equals_diffusers(name, spacing, eta, prediction_type):
    theirs = scheduler(prediction_type, spacing)
    theirs.set_timesteps(20)
    ours = SAMPLERS.get(name)(NoiseSchedule.from_diffusers(theirs), num_inference_steps=20, eta=eta, spacing=spacing)
    generator = torch.Generator().manual_seed(0)
    for index, timestep in enumerate(theirs.timesteps):
        latents, output, noise = torch.randn(3, 2, 4, 8, 8, generator=generator).unbind(0)
        expected = theirs.step(output, timestep, latents, eta=eta, variance_noise=noise)
        torch.testing.assert_close(
            ours.step(index, latents, output, noise=noise), expected.prev_sample, rtol=2e-5, atol=2e-5
        )
        torch.testing.assert_close(
            ours.predict_original(index, latents, output), expected.pred_original_sample, rtol=2e-5, atol=2e-5
        )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_step_is_differentiable_in_latents_and_prediction(prediction_type, guidance_scale):
    schedule = NoiseSchedule.from_diffusers(scheduler(prediction_type))
    sampler = SAMPLERS.get("ddim")(schedule, num_inference_steps=5, eta=1)
    x, noise = torch.randn(2, 1, 2, 2, 2, dtype=torch.float64)
    output = torch.randn(1 if guidance_scale == 1 else 2, 2, 2, 2, dtype=torch.float64)
    inputs = x.requires_grad_(), output.requires_grad_()
    for index in range(5):
        for call in (partial(sampler.step, index, noise=noise), partial(sampler.predict_original, index)):
            assert torch.autograd.gradcheck(partial(call, guidance_scale=guidance_scale), inputs)


def test_a_schedule_that_begins_in_pure_noise():
    """Of a v-prediction with zero signal at the first step, rescaled as in arXiv:2305.08891."""
    theirs = scheduler("v_prediction")
    theirs.alphas_cumprod[-1] = 0.0
    theirs.set_timesteps(4)
    sampler = SAMPLERS.get("ddim")(NoiseSchedule.from_diffusers(theirs), num_inference_steps=4, eta=1)
    latents, output, noise = torch.randn(3, 2, 4, 8, 8).unbind(0)
    for eta in (0.0, 0.5):
        sampler.eta = eta
        expected = theirs.step(output, theirs.timesteps[0], latents, eta=eta, variance_noise=noise)
        ours = sampler.step(0, latents, output, noise=noise)
        torch.testing.assert_close(ours, expected.prev_sample, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(sampler.predict_original(0, latents, output), -output)
    # with eta = 1 nothing is left of the predicted noise
    level = sampler.schedule.alpha_cumprod(sampler.timesteps[1])
    sampler.eta = 1.0
    expected_latents = -(level**0.5) * output + (1 - level) ** 0.5 * noise
    torch.testing.assert_close(sampler.step(0, latents, output, noise=noise), expected_latents, rtol=1e-5, atol=1e-5)


def test_noise_is_demanded_when_eta_is_positive():
    sampler = SAMPLERS.get("ddim")(NoiseSchedule.from_diffusers(scheduler()), num_inference_steps=5, eta=0.3)
    with pytest.raises(ValueError, match=r"noise is needed with eta = 0\.3, got None"):
        sampler.step(0, torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))


def test_add_noise_equals_diffusers():
    theirs = scheduler()
    ours = SAMPLERS.get("ddim")(NoiseSchedule.from_diffusers(theirs), num_inference_steps=25)
    original, noise = torch.randn(2, 3, 4, 8, 8).unbind(0)
    expected = theirs.add_noise(original, noise, torch.tensor([39] * 3))
    torch.testing.assert_close(ours.add_noise(24, original, noise), expected)


def test_unknown_prediction_type_is_refused():
    with pytest.raises(UserError, match="prediction_type must be 'epsilon' or 'v_prediction', got 'sample'"):
        NoiseSchedule.from_diffusers(scheduler("sample"))
