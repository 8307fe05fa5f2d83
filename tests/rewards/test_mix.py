"""The weighted mix: its arithmetic, what it computes once, its running statistics and their resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcraft.errors import UserError
from fastcraft.rewards import RewardSpec, build_rewards
from fastcraft.rewards.base import Reward
from fastcraft.rewards.brightness import BrightnessReward
from fastcraft.rewards.clip_tower import Towers
from fastcraft.rewards.mix import WeightedRewards

PROMPTS = ["a red cube", "a blue ball", "two stars"]


class RedReward(Reward):
    """Mean of the red channel."""

    name = "red"
    uses_prompt = False
    score_range = "[0, 1]"

    def forward(self, images, prompts):
        return 10 * images[:, 0].float().mean(dim=(1, 2))


class CountReward(RedReward):
    """Number of bright pixels: no gradient."""

    name = "count"
    differentiable = False

    def forward(self, images, prompts):
        return (images.detach() > 0.5).float().sum(dim=(1, 2, 3))


def pictures(seed=0, *, num=3):
    generator = torch.Generator().manual_seed(seed)
    levels = 0.2 + 0.8 * torch.rand(num, 1, 1, 1, generator=generator)
    return (levels * torch.rand(num, 3, 32, 32, generator=generator)).requires_grad_()


def built(specs, bundled, **options):
    towers = options.pop("towers", None) or Towers(device="cpu", dtype=torch.float32, bundled=bundled)
    return build_rewards([RewardSpec(*spec) for spec in specs], towers=towers, **options)


def mix_of(**options):
    return WeightedRewards([("brightness", BrightnessReward(), 2.0), ("red", RedReward(), -0.5)], **options)


def test_total_is_the_weighted_sum():
    images = pictures()
    output = mix_of()(images, PROMPTS)
    bright, red = BrightnessReward()(images, PROMPTS), RedReward()(images, PROMPTS)
    torch.testing.assert_close(output.total, 2.0 * bright - 0.5 * red)
    assert list(output.parts) == ["brightness", "red"]
    assert torch.equal(output.parts["red"], red)
    assert not output.parts["red"].requires_grad
    assert output.total.dtype == torch.float32
    (got,) = torch.autograd.grad(output.total.sum(), images)
    (expected,) = torch.autograd.grad((2.0 * bright - 0.5 * red).sum(), images)
    torch.testing.assert_close(got, expected)


def test_shared_tower_runs_once_and_gives_the_same_as_apart(bundled):
    def build(*names):
        specs = [(name, weight, "shapes", {}) for name, weight in (("clip", 3.0), ("aesthetic", 0.5)) if name in names]
        return built(specs, bundled)

    both = build("clip", "aesthetic")
    calls = []
    both.rewards[0].tower.model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    images = pictures()
    output = both(images, PROMPTS)
    assert len(calls) == 1
    total = build("clip")(images, PROMPTS).total + build("aesthetic")(images, PROMPTS).total
    torch.testing.assert_close(output.total, total)
    (got,) = torch.autograd.grad(output.total.sum(), images)
    (expected,) = torch.autograd.grad(total.sum(), images)
    torch.testing.assert_close(got, expected)
    tower = both.rewards[0].tower
    assert not tower.features._kept, "no graph is kept between steps"
    assert not tower.pixels._kept
    both(images, PROMPTS)
    assert len(calls) == 2


def test_a_watched_reward_costs_no_gradient_and_no_second_pass(bundled):
    specs = [("clip", 0.0, "shapes", {}), ("aesthetic", 1.0, "shapes", {})]
    mix = built(specs, bundled)
    calls = []
    mix.rewards[0].tower.model.vision_model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    images = pictures()
    output = mix(images, PROMPTS)
    assert calls == [True], "the reward with gradient went first, the watched one used its features"
    assert list(output.parts) == ["clip", "aesthetic"]
    output.total.sum().backward()
    assert images.grad.abs().sum() > 0


def test_running_std_equals_numpy():
    mix = mix_of(normalize="running_std")
    seen = {"brightness": [], "red": []}
    for step in range(4):
        images = pictures(step, num=2 + step)
        output = mix(images, ["x"] * (2 + step))
        if step % 2:  # the numbers do not depend on when the scores are merged
            mix.synchronize()
        for name, scores in seen.items():
            scores.extend(output.parts[name].tolist())
        expected = sum(
            weight * output.parts[name].numpy() / np.std(np.array(seen[name]))
            for name, weight in (("brightness", 2.0), ("red", -0.5))
        )
        np.testing.assert_allclose(output.total.detach().numpy(), expected, rtol=1e-5)


def test_running_std_carries_no_gradient():
    images = pictures()
    output = mix_of(normalize="running_std")(images, PROMPTS)
    (got,) = torch.autograd.grad(output.total[0], images)
    assert got[1:].abs().sum() == 0, "the statistics must not mix images"
    std = {name: scores.double().std(correction=0).item() for name, scores in output.parts.items()}
    bright, red = BrightnessReward()(images, PROMPTS)[0], RedReward()(images, PROMPTS)[0]
    (expected,) = torch.autograd.grad(2.0 / std["brightness"] * bright - 0.5 / std["red"] * red, images)
    torch.testing.assert_close(got, expected)


def test_running_std_does_not_lose_small_spreads():
    mix = WeightedRewards([("red", RedReward(), 1.0)], normalize="running_std", std_floor=1e-9)
    for step in range(50):
        offset = torch.tensor([0.5, 0.5 + 1e-5]).view(2, 1, 1, 1) + 1e-6 * step
        images = offset.expand(2, 3, 4, 4).clone().requires_grad_()
        output = mix(images, ["", ""])
    scores = [10 * float(np.float32(base + 1e-6 * step)) for step in range(50) for base in (0.5, 0.5 + 1e-5)]
    got = (output.parts["red"] / output.total.detach())[0].item()
    assert got == pytest.approx(np.std(scores), rel=0.05)


def test_floor_and_first_score():
    mix = WeightedRewards([("red", RedReward(), 1.0)], normalize="running_std", std_floor=0.25)
    grey = torch.full((1, 3, 4, 4), 0.3).requires_grad_()
    assert mix(grey, [""]).total.item() == pytest.approx(3.0), "one score has no spread: divided by 1"
    assert mix(grey, [""]).total.item() == pytest.approx(3.0 / 0.25), "no spread at all: divided by the floor"


def test_resume_continues_the_statistics():
    straight, first = mix_of(normalize="running_std"), mix_of(normalize="running_std")
    for step in range(3):
        straight(pictures(step), PROMPTS)
        first(pictures(step), PROMPTS)
        straight.synchronize()
        first.synchronize()
    state = first.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {"brightness": (3,), "red": (3,)}
    resumed = mix_of(normalize="running_std")
    resumed.load_state_dict(state)
    for step in range(3, 6):
        images = pictures(step)
        assert torch.equal(resumed(images, PROMPTS).total, straight(images, PROMPTS).total)
        straight.synchronize()
        resumed.synchronize()
    fresh = mix_of(normalize="running_std")
    assert not torch.equal(fresh(images, PROMPTS).total, straight(images, PROMPTS, update_statistics=False).total)


def test_state_of_other_rewards_is_refused():
    with pytest.raises(UserError, match=r"saved statistics are of \['brightness', 'red'\], this mix has \[\]"):
        mix_of().load_state_dict(mix_of(normalize="running_std").state_dict())
    assert mix_of().state_dict() == {}


def test_evaluation_leaves_the_statistics_alone():
    mix = mix_of(normalize="running_std")
    mix(pictures(0), PROMPTS)
    mix.synchronize()
    before = {name: value.clone() for name, value in mix.state_dict().items()}
    with torch.no_grad():
        mix(pictures(1), PROMPTS)
    mix(pictures(2).detach(), PROMPTS)
    mix.synchronize()
    assert before["red"][0] == 3
    assert all(torch.equal(before[name], value) for name, value in mix.state_dict().items())
    with torch.no_grad():
        mix(pictures(1), PROMPTS, update_statistics=True)
    mix.synchronize()
    assert mix.state_dict()["red"][0] == 6, "count, on request"


def test_nan_does_not_spoil_the_statistics():
    mix = mix_of(normalize="running_std")
    mix(pictures(0), PROMPTS)
    bad = pictures(1).detach()
    bad[1] = float("nan")
    output = mix(bad.requires_grad_(), PROMPTS)
    assert output.total.isnan().tolist() == [False, True, False], "the bad score itself is not hidden"
    mix.synchronize()
    assert mix.state_dict()["red"][0] == 5
    assert torch.isfinite(mix(pictures(2), PROMPTS).total).all()


def test_a_state_holds_only_what_all_ranks_know():
    mix = mix_of(normalize="running_std")
    mix(pictures(0), PROMPTS)
    assert mix.state_dict()["red"].tolist() == [0, 0, 0], "a step that was stopped midway leaves nothing behind"
    mix.load_state_dict(mix.state_dict())
    mix.synchronize()
    assert mix.state_dict()["red"].tolist() == [0, 0, 0]


def shared_pictures(step):
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def one_rank(rank, store):
    """What one of two processes sees, as JSON; this file run as a script."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mix = mix_of(normalize="running_std")
    totals = []
    for step in range(3):
        totals.append(mix(shared_pictures(step)[2 * rank : 2 * rank + 2].requires_grad_(), ["", ""]).total.tolist())
        mix.synchronize()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    print(json.dumps([rank, totals, {name: value.tolist() for name, value in mix.state_dict().items()}]))


def test_statistics_are_those_of_all_ranks(tmp_path):
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "store")], env=environment, stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    results = [json.loads(process.communicate(timeout=120)[0]) for process in ranks]
    single = mix_of(normalize="running_std")
    scores = [single(shared_pictures(step).requires_grad_(), [""] * 4).parts for step in range(3)]
    single.synchronize()
    for _, _, state in results:
        for name, value in single.state_dict().items():
            np.testing.assert_allclose(state[name], value.tolist(), rtol=1e-9)
    for rank, totals, _ in results:
        for step in range(3):
            expected = 0.0
            for name, weight in (("brightness", 2.0), ("red", -0.5)):
                own = scores[step][name].numpy()[2 * rank : 2 * rank + 2]
                seen = np.concatenate([*(scores[earlier][name].numpy() for earlier in range(step)), own])
                expected = expected + weight * own / seen.astype(np.float64).std().clip(1e-3)
            np.testing.assert_allclose(totals[step], expected, rtol=1e-4, err_msg="all ranks before, this rank now")


def test_a_reward_without_gradient_may_only_be_watched():
    with pytest.raises(UserError, match=r"'count' has no gradient, so its weight must be 0 here, got 1\.0"):
        WeightedRewards([("count", CountReward(), 1.0)])
    watched = WeightedRewards([("count", CountReward(), 0.0), ("red", RedReward(), 1.0)])
    images = pictures()
    output = watched(images, PROMPTS)
    assert output.parts["count"].max() > 0
    torch.testing.assert_close(output.total, RedReward()(images, PROMPTS))
    scored = WeightedRewards([("count", CountReward(), 1.0)], require_grad=False)
    assert torch.equal(scored(images, PROMPTS).total, output.parts["count"])


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ([], {}, "at least one is needed, got none"),
        ([("a", RedReward(), 1.0), ("a", RedReward(), 1.0)], {}, "'a' is named twice"),
        ([("a", RedReward(), 0.0)], {}, "at least one weight must not be 0"),
        ([("a", RedReward(), float("inf"))], {}, "weight of 'a' must be a finite number, got inf"),
        (
            [("a", RedReward(), 1.0)],
            {"normalize": "std"},
            "one of 'none', 'running_std', 'gradient_share', got 'std'",
        ),
    ],
)
def test_mistakes_are_refused(rewards, options, message):
    with pytest.raises(UserError, match=message):
        WeightedRewards(rewards, **options)


class MatrixReward(RedReward):
    """The classic mistake: every image against every prompt."""

    def forward(self, images, prompts):
        return super().forward(images, prompts)[:, None].expand(-1, len(prompts))


class HalfReward(RedReward):
    """Scores in the dtype of the tower."""

    def forward(self, images, prompts):
        return super().forward(images, prompts).bfloat16()


@pytest.mark.parametrize("reward", [MatrixReward(), HalfReward()], ids=lambda reward: type(reward).__name__)
def test_a_broken_contract_is_caught(reward):
    with pytest.raises(ValueError, match=r"'red' must return float32 of shape \(3,\), got"):
        WeightedRewards([("red", reward, 1.0)])(pictures(), PROMPTS)


def test_every_image_needs_its_prompt():
    with pytest.raises(ValueError, match="3 images but 2 prompts"):
        mix_of()(pictures(), PROMPTS[:2])


def test_records_what_a_score_must_be_quoted_with(bundled):
    specs = [("clip", 3.0, "shapes", {"scale": 100}), ("brightness", 1.0, "", {})]
    mix = built(specs, bundled)
    assert mix.settings["clip"] == {
        "weight": 3.0,
        "backbone": str(bundled),
        "prefix": "",
        "scale": 100.0,
        "resize": "bicubic",
        "clamp": False,
    }
    assert mix.settings["brightness"] == {"weight": 1.0}


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), sys.argv[2])
