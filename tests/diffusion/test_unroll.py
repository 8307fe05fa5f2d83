"""The loop itself: regions of a plan, the prefix, and what a step is called with."""

import pytest
import torch

from fastcraft.diffusion.image_model import ImageModel
from fastcraft.diffusion.samplers.ddim import DDIMSampler
from fastcraft.diffusion.unroll import _regions
from fastcraft.records import KEEP, CheckpointPlan, PromptEmbeds, Trajectory


def model(parts, **options):
    components = parts.components
    return ImageModel(
        unet=components.unet, vae=components.vae, guidance_scale=2.0, latent_shape=components.latent_shape,
        sampler=DDIMSampler(components.schedule, num_inference_steps=4, eta=0.5), device=torch.device("cpu"), **options,
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
        kv, prefix_kv = (
            images.text_kv(PromptEmbeds(cond=torch.randn(2, 77, 32), uncond=torch.randn(1, 77, 32))) for _ in range(2)
        )
    latents, noises = images.noise([1, 2])
    options = {"trajectory": Trajectory(num_steps=4, grad_steps=(2, 3)), "plan": CheckpointPlan(steps=(KEEP,) * 2)}
    whole = images.denoise(latents, text_kv=kv, prefix_kv=prefix_kv, noises=noises, **options)
    begun = images.prefix(latents, prefix_kv=prefix_kv, num_steps=2, noises=noises)
    assert not begun.is_inference()
    assert torch.equal(images.denoise(begun, text_kv=kv, prefix_kv=kv, noises=noises, start=2, **options), whole)


def test_the_prefix_runs_in_inference_mode_and_the_rest_does_not(tiny_parts):
    seen, calls = [], []
    images = model(tiny_parts, on_step=lambda: calls.append(1))
    images.unet.register_forward_hook(lambda module, args, out: seen.append(out[0].is_inference()))
    kv = images.text_kv(PromptEmbeds(cond=torch.randn(1, 77, 32), uncond=torch.randn(1, 77, 32)))
    latents, noises = images.noise([1])
    images.denoise(
        latents, text_kv=kv, prefix_kv=kv.detach(), noises=noises, trajectory=Trajectory(num_steps=4, grad_steps=(3,)),
        plan=CheckpointPlan(steps=(KEEP,)),
    )  # fmt: skip
    assert seen == [True, True, True, False]
    assert len(calls) == 4


def test_a_plan_of_another_length_is_refused(tiny_parts):
    images = model(tiny_parts)
    kv = images.text_kv(PromptEmbeds(cond=torch.randn(1, 77, 32), uncond=torch.randn(1, 77, 32)))
    with pytest.raises(ValueError, match="plan has 2 steps, trajectory 1"):
        images.denoise(
            images.noise([1])[0], text_kv=kv, prefix_kv=kv, trajectory=Trajectory(num_steps=4, grad_steps=(3,)),
            plan=CheckpointPlan(steps=(KEEP, KEEP)),
        )  # fmt: skip
