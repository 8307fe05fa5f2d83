"""The loop itself: regions of a plan, the prefix, and what a step is called with."""

import pytest
import torch

from fastcraft.diffusion.samplers.ddim import ddim
from fastcraft.diffusion.unroll import _regions, denoise
from fastcraft.families.image_model import ImageModel
from fastcraft.families.unet import UNetNetwork
from fastcraft.memory.plan import KEEP, RECOMPUTE, CheckpointPlan
from fastcraft.memory.policies import make_policy
from fastcraft.records import Trajectory
from tests.diffusion.texts import condition, embeds


def model(parts, **options):
    components = parts.components
    return ImageModel(
        network=UNetNetwork(module=components.unet), vae=components.vae, guidance_scale=2.0,
        latent_shape=components.latent_shape, device=torch.device("cpu"),
        sampler=ddim(components.schedule, num_inference_steps=4, eta=0.5), **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("grad_steps", "segments", "expected"),
    [
        ((4, 5), (), [([2], False), ([3], False), ([4], False), ([5], False)]),
        ((2, 3, 4, 5), (1, 3), [([2], True), ([3, 4, 5], True)]),
        ((2, 4, 5), (2, 1), [([2, 3, 4], True), ([5], True)]),
        ((3, 4), (1, 1), [([2], False), ([3], True), ([4], True), ([5], False)]),
    ],
)
def test_regions_cover_every_step_once(grad_steps, segments, expected):
    trajectory = Trajectory(num_steps=6, grad_steps=grad_steps)
    plan = CheckpointPlan(steps=(KEEP,) * len(grad_steps), segments=segments)
    assert [(list(steps), together) for steps, together in _regions(trajectory, plan, 2)] == expected


def test_a_run_in_two_parts_gives_the_bits_of_one(tiny_parts):
    images = model(tiny_parts)
    torch.manual_seed(0)
    with torch.no_grad():
        text = images.condition(embeds(torch.randn(2, 77, 32), torch.randn(1, 77, 32)))
    latents, noises = images.noise([1, 2])
    options = {"trajectory": Trajectory(num_steps=4, grad_steps=(2, 3)), "plan": CheckpointPlan(steps=(KEEP,) * 2)}
    whole = images.denoise(latents, text, noises=noises, **options)
    begun = images.prefix(latents, text, num_steps=2, noises=noises)
    assert not begun.is_inference()
    assert torch.equal(images.denoise(begun, text, noises=noises, start=2, **options), whole)


def test_the_prefix_runs_in_inference_mode_and_the_rest_does_not(tiny_parts):
    seen, calls = [], []
    images = model(tiny_parts, on_step=lambda: calls.append(1))
    images.network.module.register_forward_hook(lambda module, args, out: seen.append(out[0].is_inference()))
    text = images.condition(embeds(torch.randn(1, 77, 32), torch.randn(1, 77, 32)))
    latents, noises = images.noise([1])
    images.denoise(
        latents, text, noises=noises, trajectory=Trajectory(num_steps=4, grad_steps=(3,)),
        plan=CheckpointPlan(steps=(KEEP,)),
    )  # fmt: skip
    assert seen == [True, True, True, False]
    assert len(calls) == 4


def test_a_plan_of_another_length_is_refused(tiny_parts):
    images = model(tiny_parts)
    text = images.condition(embeds(torch.randn(1, 77, 32), torch.randn(1, 77, 32)))
    with pytest.raises(ValueError, match="plan has 2 steps, trajectory 1"):
        images.denoise(
            images.noise([1])[0], text, trajectory=Trajectory(num_steps=4, grad_steps=(3,)),
            plan=CheckpointPlan(steps=(KEEP, KEEP)),
        )  # fmt: skip


def test_batches_of_steps_with_a_trained_network_are_refused(tiny_parts):
    images = model(tiny_parts)
    images.network.module.conv_in.bias.requires_grad_()
    text = images.condition(embeds(torch.randn(1, 77, 32), torch.randn(1, 77, 32)))
    with pytest.raises(ValueError, match=r"would lose a trained network's gradient, got 2"):
        images.denoise(
            images.noise([1])[0], text, plan=CheckpointPlan(steps=(RECOMPUTE,), batched=2),
            trajectory=Trajectory(num_steps=4, grad_steps=(3,), input_grad=False),
        )  # fmt: skip


def plain_loop(unet, x, cond, uncond, noises, *, levels, eta, guidance_scale, trajectory):
    """The run written out with diffusers' UNet, the text given to every step; 4 steps of a trailing grid."""
    batch = len(x)
    for index in range(trajectory.num_steps):
        with torch.set_grad_enabled(index in trajectory.grad_steps):
            inputs = x if trajectory.input_grad else x.detach()
            timestep = 999 - 250 * index
            prediction = unet(inputs, timestep, encoder_hidden_states=cond).sample
            if guidance_scale != 1:
                without = unet(inputs, timestep, encoder_hidden_states=uncond.expand(batch, -1, -1)).sample
                without = without if trajectory.uncond_grad else without.detach()
                prediction = without + guidance_scale * (prediction - without)
        if trajectory.row_starts:
            rows = zip(prediction, trajectory.row_starts, strict=True)
            prediction = torch.stack([row if index >= start else row.detach() for row, start in rows])
        level, previous = levels.alpha_cumprod(timestep), levels.alpha_cumprod(timestep - 250)
        original = (x - (1 - level) ** 0.5 * prediction) / level**0.5
        if trajectory.predict_original and index == trajectory.num_steps - 1:
            return original
        sigma = eta * ((1 - previous) / (1 - level) * (1 - level / previous)) ** 0.5
        x = previous**0.5 * original + (1 - previous - sigma**2) ** 0.5 * prediction + sigma * noises[index]
    return x


@pytest.mark.parametrize(
    ("options", "guidance_scale", "eta", "policy"),
    [
        ({"grad_steps": (2, 3)}, 7.5, 0.0, "none"),
        ({"grad_steps": (1, 2, 3), "uncond_grad": False}, 7.5, 1.0, "step"),
        ({"grad_steps": (0, 2), "input_grad": False, "predict_original": True}, 3.0, 0.0, "step+block"),
        ({"grad_steps": (1, 2, 3), "row_starts": (3, 1), "uncond_grad": False}, 3.0, 0.5, "segment:2"),
        ({"grad_steps": (1, 2, 3), "row_starts": (2, 1)}, 1.0, 1.0, "last_k_live:1"),
        ({"grad_steps": (2,), "num_steps": 3, "predict_original": True}, 1.0, 0.0, "sac:attention+conv"),
    ],
    ids=["last", "uncond", "spaced", "rows", "unguided", "original"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)], ids=str)
def test_equals_the_loop_written_out(tiny_parts, options, guidance_scale, eta, policy, dtype, tolerance):
    torch.manual_seed(0)
    unet, stock = tiny_parts.components.unet.to(dtype), tiny_parts.stock.to(dtype)
    trajectory = Trajectory(**{"num_steps": 4, **options})
    schedule = tiny_parts.components.schedule
    sampler = ddim(schedule, num_inference_steps=4, eta=eta)
    noise, *noises = torch.randn(5, 2, 4, 8, 8, dtype=dtype).unbind(0)
    cond = torch.randn(2, 7, 32, dtype=dtype, requires_grad=True)
    uncond = torch.randn(1, 7, 32, dtype=dtype, requires_grad=True)
    guided = guidance_scale != 1

    def ours():
        text = condition(unet, cond, uncond if guided else None)
        return denoise(
            UNetNetwork(module=unet), noise, text, sampler=sampler, guidance_scale=guidance_scale,
            trajectory=trajectory, plan=make_policy(policy).plan(len(trajectory.grad_steps)), noises=noises,
        )  # fmt: skip

    def plain():
        return plain_loop(
            stock, noise, cond, uncond, noises, levels=schedule, eta=eta, guidance_scale=guidance_scale,
            trajectory=trajectory,
        )  # fmt: skip

    results = []
    for run in (ours, plain):
        latents = run()
        weight = torch.linspace(-1, 1, latents.numel(), dtype=dtype).view(latents.shape)
        grads = torch.autograd.grad((latents * weight).sum(), (cond, uncond), materialize_grads=True)
        assert grads[1].any() == (guided and trajectory.uncond_grad)
        results.append([latents, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())
