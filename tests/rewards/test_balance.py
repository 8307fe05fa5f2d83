"""Gradient shares, and what a mix shares between rewards."""

import pytest
import torch

from fastcraft.errors import UserError
from fastcraft.rewards import RewardSpec, build_rewards
from fastcraft.rewards.base import Reward
from fastcraft.rewards.brightness import BrightnessReward
from fastcraft.rewards.clip_tower import Towers
from fastcraft.rewards.mix import WeightedRewards

PROMPTS = ["a red cube", "a blue ball", "two stars"]


class ContrastReward(Reward):
    """Spread of an image: no linear function of it."""

    name = "contrast"
    uses_prompt = False
    score_range = "[0, 1]"

    def forward(self, images, prompts):
        return 50 * images.float().var(dim=(1, 2, 3))


class FlatReward(ContrastReward):
    """A gradient of zero everywhere."""

    def forward(self, images, prompts):
        return 0 * super().forward(images, prompts)


def pictures(*, num=3, size=32):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(0)).requires_grad_()


def shares_of(weights, **more):
    rewards = {"brightness": BrightnessReward(), "contrast": ContrastReward(), **more}
    return WeightedRewards(
        [(name, rewards[name], weight) for name, weight in weights.items()], normalize="gradient_share"
    )


def rms_norm(gradient):
    return gradient.flatten(1).norm(dim=1).square().mean().sqrt().item()


def test_each_reward_pulls_with_its_stated_share():
    weights = {"brightness": 3.0, "contrast": -1.0}
    images = pictures()
    mix = shares_of(weights)
    output = mix(images, PROMPTS)
    (got,) = torch.autograd.grad(output.total.sum(), images)
    expected, value = torch.zeros_like(got), torch.zeros(3)
    for reward, share in ((BrightnessReward(), 0.75), (ContrastReward(), -0.25)):
        scores = reward(images, PROMPTS)
        (own,) = torch.autograd.grad(scores.sum(), images)
        expected += share * own / rms_norm(own)
        value += share * scores.detach() / rms_norm(own)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(output.total.detach(), value, rtol=1e-5, atol=1e-6)
    alone = shares_of({"contrast": 7.0})
    (own,) = torch.autograd.grad(alone(images, PROMPTS).total.sum(), images)
    assert rms_norm(own) == pytest.approx(1.0, rel=1e-5)


def test_shares_do_not_depend_on_units():
    images = pictures()
    (first,) = torch.autograd.grad(shares_of({"brightness": 1, "contrast": 1})(images, PROMPTS).total.sum(), images)

    class Louder(ContrastReward):
        def forward(self, images, prompts):
            return 1000 * super().forward(images, prompts)

    mix = shares_of({"brightness": 1, "contrast": 1}, contrast=Louder())
    (second,) = torch.autograd.grad(mix(images, PROMPTS).total.sum(), images)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-7)


def test_upstream_gradient_reaches_each_image():
    images = pictures()
    total = shares_of({"brightness": 1, "contrast": 1})(images, PROMPTS).total
    (both,) = torch.autograd.grad(total.sum(), images, retain_graph=True)
    (got,) = torch.autograd.grad((total * torch.tensor([1.0, 0.0, -2.0])).sum(), images)
    torch.testing.assert_close(got[0], both[0])
    assert got[1].abs().sum() == 0
    torch.testing.assert_close(got[2], -2 * both[2])


def test_a_reward_without_pull_contributes_nothing():
    images = pictures()
    total = shares_of({"brightness": 1, "contrast": 1}, contrast=FlatReward())(images, PROMPTS).total
    (got,) = torch.autograd.grad(total.sum(), images)
    assert torch.isfinite(got).all()
    assert rms_norm(got) == pytest.approx(0.5, rel=1e-5)


def test_without_gradient_the_weights_are_plain():
    mix = shares_of({"brightness": 3.0, "contrast": -1.0})
    images = pictures().detach()
    output = mix(images, PROMPTS)
    expected = 3 * BrightnessReward()(images, PROMPTS) - ContrastReward()(images, PROMPTS)
    torch.testing.assert_close(output.total, expected)
    assert torch.equal(output.parts["contrast"], ContrastReward()(images, PROMPTS))


def test_shared_tower_under_shares_equals_apart(bundled):
    towers = Towers(device="cpu", dtype=torch.float32, bundled=bundled)
    specs = [RewardSpec("clip", 1.0, "shapes"), RewardSpec("aesthetic", 1.0, "shapes")]
    calls = []
    towers.clip("shapes").model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    images = pictures()
    both = build_rewards(specs, towers=towers, normalize="gradient_share")
    (got,) = torch.autograd.grad(both(images, PROMPTS).total.sum(), images)
    assert len(calls) == 1, "one forward serves both"
    expected = 0
    for spec in specs:
        alone = build_rewards([spec], towers=towers, normalize="gradient_share")
        (own,) = torch.autograd.grad(alone(images, PROMPTS).total.sum(), images)
        expected = expected + own / 2
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_rewards_of_one_size_share_the_preprocessing(bundled, standins, monkeypatch):
    from fastcraft.rewards import tower

    sizes = []
    original = tower.resize_normalize

    def counted(images, size, **options):
        sizes.append((size, options["resize"]))
        return original(images, size, **options)

    monkeypatch.setattr(tower, "resize_normalize", counted)
    names = ["clip", "hpsv2", "imagereward", "aesthetic"]
    specs = [RewardSpec(name, 1.0, *standins[name]) for name in names]
    towers = Towers(device="cpu", dtype=torch.float32, bundled=bundled)
    mix = build_rewards(specs, towers=towers)
    images = pictures(size=48)
    together = mix(images, PROMPTS)
    assert sizes == [(32, "bicubic")], "three towers, one size, once"
    (got,) = torch.autograd.grad(together.total.sum(), images)
    expected = sum(mix.rewards[i](images, PROMPTS) for i in range(4))
    assert len(sizes) == 5, "each by itself preprocesses for itself"
    torch.testing.assert_close(together.total, expected)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), images)[0], rtol=1e-4, atol=1e-5)
    area = [RewardSpec("clip", 1.0, "shapes"), RewardSpec("hpsv2", 1.0, standins["hpsv2"][0], {"resize": "area"})]
    sizes.clear()
    build_rewards(area, towers=towers)(images, PROMPTS)
    assert sorted(sizes) == [(32, "area"), (32, "bicubic")]


def test_two_mixes_share_their_towers(bundled):
    towers = Towers(device="cpu", dtype=torch.float32, bundled=bundled)
    trained = build_rewards([RewardSpec("clip", 1.0, "shapes")], towers=towers)
    held_out = build_rewards([RewardSpec("aesthetic", path="shapes")], towers=towers, require_grad=False)
    assert trained.rewards[0].tower is held_out.rewards[0].tower


def test_one_reward_twice_needs_a_label(bundled):
    towers = Towers(device="cpu", dtype=torch.float32, bundled=bundled)
    specs = [RewardSpec("clip", 1.0, "shapes"), RewardSpec("clip", 1.0, "shapes", {"scale": 2.0})]
    with pytest.raises(UserError, match="'clip' is named twice"):
        build_rewards(specs, towers=towers)
    mix = build_rewards([specs[0], specs[1]._replace(label="double")], towers=towers)
    parts = mix(pictures(), PROMPTS).parts
    torch.testing.assert_close(parts["double"], 2 * parts["clip"])


def test_the_clamp_option_reaches_the_images(bundled):
    towers = Towers(device="cpu", dtype=torch.float32, bundled=bundled)
    free, clamped = (
        build_rewards([RewardSpec("clip", 1.0, "shapes", {"clamp": clamp})], towers=towers) for clamp in (False, True)
    )
    bright = (3 * pictures(size=48)).detach().requires_grad_()
    assert not torch.allclose(free(bright, PROMPTS).total, clamped(bright, PROMPTS).total, atol=1e-4)
    inside = torch.full((1, 3, 48, 48), 0.5)
    assert torch.equal(free(inside, [""]).total, clamped(inside, [""]).total)
