"""Every registered reward meets the contract, a new one before its author writes a test."""

import pytest
import torch

from fastcraft.errors import UserError
from fastcraft.registry import Registry
from fastcraft.rewards import REWARDS, RewardSpec, build_rewards
from fastcraft.rewards.base import Reward
from fastcraft.rewards.clip_tower import Towers
from fastcraft.rewards.mix import WeightedRewards

PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def towers(bundled):
    return Towers(device="cpu", dtype=torch.float32, bundled=bundled)


@pytest.fixture(params=REWARDS.names())
def reward(request, towers, standins, mediapipe):
    path, options = standins[request.param]
    return REWARDS.get(request.param).build(path, towers=towers, **options)


def test_scores_each_image_by_itself(reward):
    images = torch.rand(2, 3, 64, 48, requires_grad=reward.differentiable)
    scores = reward(images, PROMPTS)
    assert scores.shape == (2,)
    assert scores.dtype == torch.float32
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-6)
    if reward.differentiable:
        (grad,) = torch.autograd.grad(scores[0], images)
        assert grad[0].abs().sum() > 0, "reward must be differentiable in its own image"
        assert grad[1].abs().sum() == 0, "reward must not mix images of the batch"
    else:
        assert not scores.requires_grad


def test_prompt_matters_exactly_when_declared(reward):
    images = torch.rand(2, 3, 64, 64)
    same = torch.equal(reward(images, PROMPTS), reward(images, ["two green cubes", "the sea"]))
    assert same != reward.uses_prompt


def test_accepts_bfloat16(reward):
    images = torch.rand(2, 3, 64, 64)
    scores = reward(images.bfloat16(), PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(images, PROMPTS), rtol=0.05, atol=0.05)


def test_is_frozen_and_stays_in_evaluation_mode(reward):
    images = torch.rand(2, 3, 32, 32, requires_grad=reward.differentiable)
    reward.train()
    assert not any(module.training for module in reward.modules())
    scores = reward(images, PROMPTS)
    if reward.differentiable:
        scores.sum().backward()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in reward.parameters())


def test_says_what_it_is(reward):
    assert REWARDS.get(reward.name) is type(reward)
    assert reward.score_range
    assert all(isinstance(value, (str, int, float, bool)) for value in reward.settings.values())


def test_brightness_is_luma_in_range(towers):
    reward = REWARDS.get("brightness").build("", towers=towers)
    images = torch.stack(
        [torch.zeros(3, 4, 4), torch.ones(3, 4, 4), torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 4, 4)]
    )
    torch.testing.assert_close(reward(images, [""] * 3), torch.tensor([0.0, 1.0, 0.299]))


class ThresholdReward(Reward):
    """A user's own reward, with an option that it needs and no weights."""

    name = "threshold"
    uses_prompt = False
    score_range = "[0, 1]"

    def __init__(self, threshold, *, slope=1.0):
        super().__init__()
        self.threshold, self.slope = threshold, slope
        self.dropout = torch.nn.Dropout(0.5)
        self.offset = torch.nn.Parameter(torch.zeros(()))  # and it forgot to call freeze

    def forward(self, images, prompts):
        return self.dropout(
            torch.sigmoid(self.slope * (images.float().mean(dim=(1, 2, 3)) - self.threshold + self.offset))
        )


def build(specs, *, bundled=None):
    towers = Towers(device="cpu", dtype=torch.float32, bundled=bundled)
    return build_rewards([RewardSpec(*spec) for spec in specs], towers=towers)


def test_a_users_class_needs_no_change_here(monkeypatch):
    monkeypatch.setitem(REWARDS.entries, "mine", f"{__name__}:ThresholdReward")
    monkeypatch.setattr(Registry, "get", lambda self, name: ThresholdReward)
    mix = build([("my_package.module:ThresholdReward", 2.0, "", {"threshold": 0.5})])
    output = mix(torch.full((1, 3, 8, 8), 0.5), ["x"])
    assert list(output.parts) == ["threshold"]
    assert output.total.item() == pytest.approx(1.0), "weight 2 times sigmoid(0), and dropout is off"
    assert not output.total.requires_grad, "the mix freezes what its author forgot to"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (("cilp", 1.0, "", {}), "unknown reward 'cilp'; did you mean 'clip'"),
        (("brightness", 1.0, "x.pth", {}), "'brightness' loads no weights, so path must be empty, got 'x.pth'"),
        (("brightness", 1.0, "", {"slope": 1}), "'brightness' has no option 'slope'; it takes none"),
        (("clip", 1.0, "shapes", {"scal": 1}), "'clip' has no option 'scal'; did you mean 'scale'"),
        (("clip", 1.0, "shapes", {"scale": "a"}), "option scale of 'clip' must be a finite number, got 'a'"),
        (("clip", 1.0, "shapes", {"resize": "nearest"}), "resize of 'clip' must be 'bicubic' or 'area', got 'nearest'"),
        (("clip", float("nan"), "shapes", {}), "option weight of 'clip' must be a finite number, got nan"),
        (("clip", 0.0, "shapes", {}), "at least one weight must not be 0"),
        (
            ("aesthetic", 1.0, "shapes", {"clip_pth": "x"}),
            "no option 'clip_pth'; did you mean 'clip_path'",
        ),
        (
            ("pathlib:Path", 1.0, "", {}),
            "'pathlib:Path' must be a subclass of fastcraft.rewards.base.Reward; a function is",
        ),
    ],
)
def test_recipe_mistakes_are_one_line(spec, message, bundled):
    with pytest.raises(UserError) as error:
        build([spec], bundled=bundled)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", ["total", "file", "prompt"])
def test_a_label_must_not_be_reserved(label, bundled):
    message = f"rewards: label must not be {label!r}, which is the "
    with pytest.raises(UserError, match=message) as error:
        build([("brightness", 1.0, "", {}, label), ("clip", 1.0, "/nowhere", {})], bundled=bundled)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        WeightedRewards([(label, ThresholdReward(0.5), 1.0)])
    assert list(build([("brightness", 1.0, "", {}, f"{label}s")])(torch.rand(1, 3, 8, 8), [""]).parts) == [f"{label}s"]


def test_a_users_class_must_not_be_called_total(monkeypatch):
    monkeypatch.setattr(Registry, "get", lambda self, name: ThresholdReward)
    monkeypatch.setattr(ThresholdReward, "name", "total")
    with pytest.raises(UserError, match="label must not be 'total', which is the weighted sum of all rewards; give"):
        build([("a:B", 1.0, "", {"threshold": 0.5})])
    assert build([("a:B", 1.0, "", {"threshold": 0.5}, "mine")]).names == ["mine"]


def test_shapes_needs_the_bundled_folder(tmp_path):
    with pytest.raises(UserError, match="path 'shapes' needs the bundled reward model"):
        build([("clip", 1.0, "shapes", {})], bundled=tmp_path / "nothing")


def test_a_needed_option_is_named(monkeypatch):
    monkeypatch.setattr(Registry, "get", lambda self, name: ThresholdReward)
    with pytest.raises(UserError, match="'a:B' needs option 'threshold'"):
        build([("a:B", 1.0, "", {})])
