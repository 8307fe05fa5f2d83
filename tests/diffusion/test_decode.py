"""Latents to pictures: the clamp, and the gradient of what it cuts off."""

import pytest
import torch

from fastcraft.build.model import build_model
from fastcraft.config import load_recipe
from fastcraft.diffusion.decode import decode
from fastcraft.memory.plan import KEEP, RECOMPUTE, CheckpointPlan


@pytest.fixture
def loud_vae(tiny_parts):
    """A decoder of which a part of the pixels lies outside [0, 1], on both sides."""
    vae = tiny_parts.components.vae
    vae.decoder.conv_out.weight.data *= 10
    return vae


def run(vae, latents, upstream, **options):
    """The pictures, and the gradient of ``upstream . pictures`` at the latents."""
    leaf = latents.clone().requires_grad_()
    pictures = decode(vae, leaf, CheckpointPlan(steps=(), decode=RECOMPUTE, decode_micro_batch=2), **options)
    return pictures.detach(), torch.autograd.grad((pictures * upstream).sum(), leaf)[0]


def test_straight_through_gives_the_same_pictures_and_the_gradient_of_no_clamp(loud_vae):
    torch.manual_seed(0)
    latents = torch.randn(3, 4, 8, 8)
    leaf = latents.clone().requires_grad_()
    unclamped = loud_vae.decode(leaf / loud_vae.config.scaling_factor).sample / 2 + 0.5
    upstream = torch.randn(unclamped.shape)
    assert (unclamped < 0).float().mean() > 0.1
    assert (unclamped > 2).any(), "beyond 2, x + (1 - x) is not 1 in float32"
    (expected,) = torch.autograd.grad((unclamped * upstream).sum(), leaf)
    pictures, clamped_gradient = run(loud_vae, latents, upstream)
    same, gradient = run(loud_vae, latents, upstream, straight_through=True)
    assert torch.equal(same, pictures)
    torch.testing.assert_close(gradient, expected)
    assert not torch.allclose(clamped_gradient, expected, rtol=0.1)


def test_where_everything_is_saturated_only_straight_through_has_a_gradient(loud_vae):
    loud_vae.decoder.conv_out.bias.data += 1e4
    latents, upstream = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16, 16)
    assert run(loud_vae, latents, upstream)[1].abs().max() == 0
    assert run(loud_vae, latents, upstream, straight_through=True)[1].abs().max() > 0


@pytest.mark.parametrize(("setting", "expected"), [([], False), (["objective.straight_through_clamp=true"], True)])
def test_a_recipe_reaches_it(setting, expected):
    images = build_model(load_recipe("shapes", setting), device=torch.device("cpu")).images
    leaf = torch.randn(1, 4, 8, 8, requires_grad=True)
    images.vae.decoder.conv_out.bias.data += 1e4
    images.to_images(leaf, CheckpointPlan(steps=(), decode=KEEP)).sum().backward()
    assert bool(leaf.grad.abs().max() > 0) is expected
