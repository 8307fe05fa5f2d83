"""Samplers and grids against diffusers' scheduler."""

import math
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler

from fastcraft.diffusion.samplers import SAMPLERS
from fastcraft.diffusion.samplers.ddim import ddim, step_coefficients
from fastcraft.diffusion.samplers.grid import Grid, StepRow
from fastcraft.diffusion.schedule import NoiseSchedule, timestep_grid
from fastcraft.errors import UserError


def scheduler(prediction_type: str = "epsilon", spacing: str = "trailing", **options) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1,
        prediction_type=prediction_type, timestep_spacing=spacing, **{"clip_sample": False, **options},
    )  # fmt: skip


def test_grids_of_the_papers():
    schedule = NoiseSchedule.from_diffusers(scheduler())
    assert timestep_grid(schedule, 25, "trailing") == tuple(range(999, 38, -40))
    assert timestep_grid(schedule, 50, "trailing") == tuple(range(999, 18, -20))
    assert timestep_grid(schedule, 50, "leading") == tuple(range(981, 0, -20))


@pytest.mark.parametrize("num", [1, 7, 20, 25, 40, 50])
def test_leading_grid_equals_diffusers(num):
    theirs = scheduler(spacing="leading")
    theirs.set_timesteps(num)
    assert list(timestep_grid(NoiseSchedule.from_diffusers(theirs), num, "leading")) == theirs.timesteps.tolist()


def test_trailing_grid_equals_diffusers_for_every_number_of_steps():
    theirs = scheduler()
    schedule = NoiseSchedule.from_diffusers(theirs)
    for num in range(1, 1001):
        theirs.set_timesteps(num)
        expected = theirs.timesteps.tolist()
        assert expected[num:] in ([], [-1])  # arange's rounding: a timestep too many
        assert list(timestep_grid(schedule, num, "trailing")) == expected[:num], num


def test_grid_rejects_bad_input():
    schedule = NoiseSchedule.from_diffusers(scheduler())
    with pytest.raises(UserError, match=r"num_inference_steps must lie in 1\.\.1000, got 0"):
        timestep_grid(schedule, 0, "trailing")
    with pytest.raises(UserError, match="timestep_spacing must be 'trailing' or 'leading', got 'uniform'"):
        timestep_grid(schedule, 5, "uniform")


@pytest.mark.parametrize("name", SAMPLERS.names())
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("num", [1, 7, 25])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_sampler_gives_a_grid(name, spacing, num, prediction_type):
    """The contract: T falling integer times, finite rows, the forward process of the schedule."""
    schedule = NoiseSchedule.from_diffusers(scheduler(prediction_type))
    grid = SAMPLERS.get(name)(schedule, num_inference_steps=num, eta=0.5, spacing=spacing)
    assert isinstance(grid, Grid)
    assert len(grid) == num
    assert grid.timesteps == timestep_grid(schedule, num, spacing)
    assert all(type(time) is int for time in grid.timesteps)
    x, original, noise = torch.randn(3, 1, 2, 3, 3, dtype=torch.float64).unbind(0)
    for index, row in enumerate(grid.rows):
        numbers = row.a, row.b, row.c, row.p, row.q, row.signal, row.noise
        assert all(type(number) is float and math.isfinite(number) for number in numbers)
        assert row.c >= 0
        assert row.signal == schedule.alpha_cumprod(row.time) ** 0.5
        assert row.signal**2 + row.noise**2 == pytest.approx(1)
        exact = noise if prediction_type == "epsilon" else row.signal * noise - row.noise * original
        x = grid.add_noise(index, original, noise)
        torch.testing.assert_close(grid.predict_original(index, x, exact), original, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num", [1, 20, 30, 48, 61])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_step_of_ddim_equals_diffusers(num, spacing, eta, prediction_type):
    theirs = scheduler(prediction_type, spacing)
    theirs.set_timesteps(num)
    ours = ddim(NoiseSchedule.from_diffusers(theirs), num_inference_steps=num, eta=eta, spacing=spacing)
    generator = torch.Generator().manual_seed(0)
    for index, timestep in enumerate(theirs.timesteps[:num]):
        latents, output, noise = torch.randn(3, 2, 4, 8, 8, generator=generator).unbind(0)
        expected = theirs.step(output, timestep, latents, eta=eta, variance_noise=noise)
        torch.testing.assert_close(
            ours.step(index, latents, output, noise=noise), expected.prev_sample, rtol=2e-5, atol=2e-5
        )
        torch.testing.assert_close(
            ours.predict_original(index, latents, output), expected.pred_original_sample, rtol=2e-5, atol=2e-5
        )


def test_c_is_the_standard_deviation_of_the_step():
    """Eq. 16 of arXiv:2010.02502 at eta = 1, the posterior's of DDPM."""
    schedule = NoiseSchedule.from_diffusers(scheduler())
    grid = ddim(schedule, num_inference_steps=50, eta=1.0)
    for row in grid.rows:
        level, previous = schedule.alpha_cumprod(row.time), schedule.alpha_cumprod(row.time - 20)
        assert row.c**2 == pytest.approx((1 - previous) / (1 - level) * (1 - level / previous))


def test_a_row_is_what_a_step_computes():
    row = StepRow(time=0.75, a=0.5, b=-2.0, c=0.25, p=3.0, q=-1.0, signal=0.25, noise=0.75)
    grid = Grid((row,), initial_scale=2.0)
    x, uncond, cond, noise = torch.randn(4, 1, 2, 3, 3, dtype=torch.float64).unbind(0)
    guided, output = 3 * cond - 2 * uncond, torch.cat([uncond, cond])
    step = grid.step(0, x, output, guidance_scale=3.0, noise=noise)
    torch.testing.assert_close(step, 0.5 * x - 2 * guided + 0.25 * noise)
    torch.testing.assert_close(grid.predict_original(0, x, output, guidance_scale=3.0), 3 * x - guided)
    torch.testing.assert_close(grid.add_noise(0, x, noise), 0.25 * x + 0.75 * noise)
    assert (len(grid), grid.timesteps, grid.needs_noise, grid.initial_scale) == (1, (0.75,), True, 2.0)


@pytest.mark.parametrize(("eta", "needs"), [(0.0, False), (0.1, True)])
def test_only_a_stochastic_grid_wants_noise(eta, needs):
    assert ddim(NoiseSchedule.from_diffusers(scheduler()), num_inference_steps=5, eta=eta).needs_noise == needs


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_step_is_differentiable_in_latents_and_prediction(prediction_type, guidance_scale):
    schedule = NoiseSchedule.from_diffusers(scheduler(prediction_type))
    sampler = ddim(schedule, num_inference_steps=5, eta=1)
    x, noise = torch.randn(2, 1, 2, 2, 2, dtype=torch.float64)
    output = torch.randn(1 if guidance_scale == 1 else 2, 2, 2, 2, dtype=torch.float64)
    inputs = x.requires_grad_(), output.requires_grad_()
    for index in range(5):
        for call in (partial(sampler.step, index, noise=noise), partial(sampler.predict_original, index)):
            assert torch.autograd.gradcheck(partial(call, guidance_scale=guidance_scale), inputs)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_schedule_that_begins_in_pure_noise(eta):
    """Zero terminal SNR, arXiv:2305.08891."""
    theirs = scheduler("v_prediction", rescale_betas_zero_snr=True)
    theirs.set_timesteps(4)
    schedule = NoiseSchedule.from_diffusers(theirs)
    assert schedule.alpha_cumprod(999) == 0
    grid = ddim(schedule, num_inference_steps=4, eta=eta)
    for index, timestep in enumerate(theirs.timesteps):
        latents, output, noise = torch.randn(3, 2, 4, 8, 8).unbind(0)
        ours = grid.step(index, latents, output, noise=noise)
        if index == 0 and eta == 1:  # nothing is left of the predicted noise; diffusers takes a root of 0 to rounding
            level = schedule.alpha_cumprod(749)
            expected = -(level**0.5) * output + (1 - level) ** 0.5 * noise
        else:
            expected = theirs.step(output, timestep, latents, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)
        if index == 0:
            torch.testing.assert_close(grid.predict_original(0, latents, output), -output)


def test_nothing_of_the_predicted_noise_is_left():
    """From noise alone with eta = 1: what is under the root is 0 to rounding, above or below."""
    for previous in torch.linspace(0.01, 0.99, 99).tolist():
        numbers = step_coefficients(0.0, previous, eta=1.0, prediction_type="v_prediction")
        assert all(type(number) is float for number in numbers)  # a root of less than 0 would be complex
        assert numbers[0] == pytest.approx(0, abs=1e-7)
        assert numbers[1:] == pytest.approx((-(previous**0.5), (1 - previous) ** 0.5))


def test_noise_is_demanded_when_eta_is_positive():
    sampler = ddim(NoiseSchedule.from_diffusers(scheduler()), num_inference_steps=5, eta=0.3)
    with pytest.raises(ValueError, match=r"noise is needed with c = 0\.\d+, got None"):
        sampler.step(0, torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))


def test_eta_is_checked():
    with pytest.raises(UserError, match=r"eta must lie in \[0, 1\], got 1\.5"):
        ddim(NoiseSchedule.from_diffusers(scheduler()), num_inference_steps=5, eta=1.5)


def test_add_noise_equals_diffusers():
    theirs = scheduler()
    ours = ddim(NoiseSchedule.from_diffusers(theirs), num_inference_steps=25)
    original, noise = torch.randn(2, 3, 4, 8, 8).unbind(0)
    expected = theirs.add_noise(original, noise, torch.tensor([39] * 3))
    torch.testing.assert_close(ours.add_noise(24, original, noise), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prediction_type": "sample"},
            "scheduler: prediction_type must be 'epsilon' or 'v_prediction', got 'sample'",
        ),
        ({"rescale_betas_zero_snr": True}, "needs prediction_type 'v_prediction', got 'epsilon'"),
        ({"clip_sample": True}, "scheduler: clip_sample must be false, got True"),
        ({"thresholding": True}, "scheduler: thresholding must be false, got True"),
        ({"trained_betas": [0.1, 0.2, -0.1]}, "must fall from at most 1 to above 0"),
    ],
    ids=str,
)
def test_a_scheduler_is_refused(options, message):
    with pytest.raises(UserError) as raised:
        NoiseSchedule.from_diffusers(scheduler(**options))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("final", "levels"),
    [
        (0.8, (0.9, 0.5)), (1.1, (0.9, 0.5)), (1.0, (1.0, 0.5)), (1.0, (0.5, 0.6)), (1.0, (0.5, 0.0, 0.0)),
        (1.0, (0.5, -0.1)), (1.0, ()), (1.0, (float("nan"), 0.5)),
    ],
    ids=str,
)  # fmt: skip
def test_levels_that_no_forward_process_has(final, levels):
    with pytest.raises(UserError, match="final_alpha_cumprod and alphas_cumprod must fall"):
        NoiseSchedule(alphas_cumprod=levels, final_alpha_cumprod=final, prediction_type="v_prediction")
