"""Gradients to the image against finite differences in float64, and agreement of half precision with float32."""

import pytest
import torch

from fastcraft.rewards import REWARDS
from fastcraft.rewards.clip_tower import Towers

PROMPTS = ["a red cube", "two dogs. one cat"]
DIFFERENTIABLE = [name for name in REWARDS.names() if name not in ("face", "hand", "jpeg_size")]


@pytest.fixture(scope="module")
def towers(bundled):
    return {dtype: Towers(device="cpu", dtype=dtype, bundled=bundled) for dtype in (torch.float64, torch.bfloat16)}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("options", [{}, {"resize": "area"}], ids=str)
def test_gradient_is_the_slope(name, options, towers, standins):
    path, own = standins[name]
    if options and not REWARDS.get(name).loads_weights:
        pytest.skip("has no preprocessing")
    reward = REWARDS.get(name).build(path, towers=towers[torch.float64], **own, **options)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 48, 40, generator=generator, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    # Luma and a user's function are computed in float32, linear in the image: a wide step costs them nothing.
    step = 1e-5 if REWARDS.get(name).loads_weights else 1.0
    for _ in range(3):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ends = [reward(images + sign * step * direction, PROMPTS).double().sum() for sign in (1, -1)]
        slope = ((ends[0] - ends[1]) / (2 * step)).item()
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-6)


TOLERANCES = {"pickscore": 0.4, "imagereward": 0.05, "aesthetic": 0.05}


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if REWARDS.get(name).loads_weights])
def test_bfloat16_agrees_with_float64(name, towers, standins):
    """Within 0.02 of a cosine; ImageReward and aesthetic within 0.05, PickScore, which is scaled, within 0.4."""
    path, own = standins[name]
    images = torch.rand(8, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    prompts = [f"{i} red cubes" for i in range(8)]
    low, high = (
        REWARDS.get(name).build(path, towers=tower, **own) for tower in (towers[torch.bfloat16], towers[torch.float64])
    )
    with torch.no_grad():
        rough, exact = low(images, prompts), high(images, prompts).float()
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0, atol=TOLERANCES.get(name, 0.02))


def test_the_logit_scale_is_exact_in_bfloat16(towers, standins):
    path, _ = standins["pickscore"]
    scales = [tower.clip(path).logit_scale for tower in towers.values()]
    assert scales[0] == scales[1]
    hps = towers[torch.bfloat16].clip(f"{standins['hpsv2'][0]}/HPS_v2_compressed.pt", head_width=80)
    assert hps.logit_scale == pytest.approx(100.0, rel=1e-4), "4.6052, which bfloat16 would make 98.8"
