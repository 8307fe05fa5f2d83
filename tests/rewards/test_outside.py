"""Rewards from outside torch: MediaPipe's detectors and a user's function."""

import gc
import sys

import pytest
import torch

from fastcraft.errors import MissingDependencyError, UserError
from fastcraft.rewards import REWARDS, RewardSpec, build_rewards
from fastcraft.rewards.clip_tower import Towers


@pytest.fixture
def towers():
    return Towers(device="cpu", dtype=torch.float32)


def shades(*levels):
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


@pytest.mark.parametrize("name", ["face", "hand"])
def test_nothing_found_is_the_floor_and_is_counted(name, towers, standins, mediapipe):
    reward = REWARDS.get(name).build(standins[name][0], towers=towers, threshold=0.4, floor=-1.0)
    scores = reward(shades(0.0, 0.6, 0.2), [""] * 3)
    torch.testing.assert_close(scores, torch.tensor([-1.0, 0.6, -1.0]))
    reward(shades(0.8), [""])
    assert reward.counts == {"scored": 4, "none found": 2}
    assert reward.settings["floor"] == -1.0


def test_a_detector_is_closed_with_its_reward(towers, standins, mediapipe):
    reward = REWARDS.get("face").build(standins["face"][0], towers=towers)
    detector = reward.detector
    assert not detector.is_closed
    del reward
    gc.collect()
    assert detector.is_closed


def test_the_mix_hands_counts_on(towers, standins, mediapipe):
    specs = [RewardSpec("face", path=standins["face"][0]), RewardSpec("brightness")]
    mix = build_rewards(specs, towers=towers, require_grad=False)
    mix(shades(0.1, 0.9), ["", ""])
    assert mix.counts == {"face": {"scored": 2, "none found": 1}}


def test_the_package_is_an_extra(towers, standins, monkeypatch):
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(MissingDependencyError, match=r"'face' needs the package mediapipe: pip install .*detectors"):
        REWARDS.get("face").build(standins["face"][0], towers=towers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, r"threshold of 'face' must lie in \(0, 1\), got 0"),
        ({"floor": "low"}, "floor of 'face' must be a finite number, got 'low'"),
    ],
)
def test_detection_options_are_checked(options, message, towers, standins, mediapipe):
    with pytest.raises(UserError, match=message):
        REWARDS.get("face").build(standins["face"][0], towers=towers, **options)


def test_a_model_that_mediapipe_refuses_is_one_line(towers, tmp_path, mediapipe):
    (tmp_path / "face.tflite").write_bytes(b"bad")
    with pytest.raises(UserError, match=r"'face' cannot use '.*face.tflite' as its model: Unable to init") as error:
        REWARDS.get("face").build(str(tmp_path / "face.tflite"), towers=towers)
    assert "\n" not in str(error.value)


def as_list(images, prompts):
    assert not images.requires_grad
    return [len(prompt) for prompt in prompts]


def build_callable(**options):
    return build_rewards(
        [RewardSpec("callable", options=options)], towers=Towers(device="cpu", dtype=torch.float32), require_grad=False
    )


def test_a_function_may_return_a_list():
    parts = build_callable(function=as_list)(shades(0.1, 0.2).clone().requires_grad_(), ["one", "three"]).parts
    assert parts["callable"].tolist() == [3.0, 5.0]


def test_a_function_is_named_by_its_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def dark(images, prompts):\n    return 1 - images.mean(dim=(1, 2, 3))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    towers = Towers(device="cpu", dtype=torch.float32)
    spec = RewardSpec("callable", options={"function": "my_rewards:dark", "differentiable": True}, label="dark")
    mix = build_rewards([spec], towers=towers)
    images = shades(0.25).clone().requires_grad_()
    output = mix(images, [""])
    assert output.parts["dark"].item() == pytest.approx(0.75)
    output.total.sum().backward()
    assert images.grad.sum().item() == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "'callable' needs option 'function'"),
        ({"function": "nowhere:x"}, "cannot load 'nowhere:x'"),
        ({"function": "nothing"}, r"expected 'package.module:name', got 'nothing'"),
        ({"function": "math:pi"}, "must be a function, got 'math:pi'"),
        ({"function": as_list, "differentiable": 1}, "differentiable of 'callable' must be true or false, got 1"),
    ],
)
def test_callable_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        build_callable(**options)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images, prompts: 1.0, r"must return 2 numbers, one for each image, got shape \(\)"),
        (lambda images, prompts: torch.ones(2, 2), r"got shape \(2, 2\)"),
        (lambda images, prompts: "high", "must return numbers, got str"),
        (lambda images, prompts: [None, None], "must return numbers, got list"),
    ],
)
def test_what_a_function_returns_is_checked(function, message):
    with pytest.raises(UserError, match=message):
        build_callable(function=function)(shades(0.1, 0.2), ["", ""])


def test_a_gradient_that_was_promised_must_come():
    images = shades(0.1).clone().requires_grad_()
    mix = build_callable(function=lambda images, prompts: images.detach().mean(dim=(1, 2, 3)), differentiable=True)
    with pytest.raises(UserError, match="is declared differentiable, but no gradient comes through it"):
        mix(images, [""])
