"""The whole step against naive loops that use no trick: stock UNet, stock scheduler, plain autograd."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from fastcraft.data.order import sample_seed
from fastcraft.memory.policies import POLICIES, make_policy
from fastcraft.objectives.reward_backprop import BackpropSettings
from fastcraft.objectives.truncation import choose_trajectory
from tests.objectives.build import INDICES, PROMPTS, SEED, build, gradients, smooth_reward
from tests.objectives.naive import Naive, assert_same

T = 6


@pytest.mark.parametrize("policy", ["none", "step"])
@pytest.mark.parametrize("depth", [1, 5, T])
def test_textcraftor_equals_the_naive_loop(tiny_parts, depth, policy):
    built = build(tiny_parts, policy=policy, backprop_steps=depth)
    naive = Naive(tiny_parts, built)
    expected = naive.gradients(-naive.reward(naive.last_steps(depth)[0]).mean())
    assert_same(gradients(built.objective, built.trained), expected)


POLICY_NAMES = [
    "none", "step", "step+block", "sac:attention", "sac:conv+linear", "sac:attention+conv+linear+norm", "segment:2",
    "last_k_live:1", "plan:sac:attention,recompute,keep",
]  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"truncation": "spaced", "input_grad": False, "prefix_by": "trained"}])
def test_every_policy_gives_the_same_bits(tiny_parts, settings):
    elsewhere = {"offload", "batched"}  # the last: test_batched_steps.py
    assert {name.partition(":")[0] for name in POLICY_NAMES} == set(POLICIES.names()) - elsewhere
    built = build(tiny_parts, backprop_steps=3, eta=0.7, **settings)
    loss, expected = gradients(built.objective, built.trained)
    assert sum(grad.abs().sum() for grad in expected.values()) > 1e-3
    for name in POLICY_NAMES:
        built.objective.make_plan = make_policy(name).plan
        other_loss, grads = gradients(built.objective, built.trained)
        assert torch.equal(other_loss, loss)
        assert grads.keys() == expected.keys()
        assert all(torch.equal(grads[key], expected[key]) for key in expected), name


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_draft_k_conditions_the_prefix_by_the_trained_encoder(tiny_parts, eta):
    built = build(tiny_parts, backprop_steps=2, prefix_by="trained", eta=eta)
    naive = Naive(tiny_parts, built, eta=eta)
    expected = naive.gradients(-naive.reward(naive.last_steps(2, prefix="trained")[0]).mean())
    assert_same(gradients(built.objective, built.trained), expected)


def test_uncond_by_the_original_encoder(tiny_parts):
    built = build(tiny_parts, backprop_steps=2, uncond_by="original")
    naive = Naive(tiny_parts, built, uncond="original")
    expected = naive.gradients(-naive.reward(naive.last_steps(2)[0]).mean())
    assert_same(gradients(built.objective, built.trained), expected)


def test_alignprop_truncates_every_trajectory_at_random(tiny_parts):
    settings = {"backprop_steps": 3, "truncation": "random", "truncation_std": 1.5, "prefix_by": "trained"}
    built = build(tiny_parts, policy="step", loss_scale=0.01, **settings)
    naive = Naive(tiny_parts, built)
    seeds = [random.Random(sample_seed(SEED, index, 1)) for index in INDICES]
    starts = [min(max(round(rng.gauss(T - 3, 1.5)), 0), T - 1) for rng in seeds]
    assert starts[0] != starts[1]
    ours_loss, ours = gradients(built.objective, built.trained)
    expected = naive.gradients(-naive.reward(naive.from_starts(starts)).mean())
    assert_same((ours_loss * 100, {n: g * 100 for n, g in ours.items()}), expected)


def test_draft_lv_averages_over_fresh_noisings(tiny_parts):
    built = build(tiny_parts, backprop_steps=1, low_variance_draws=3, prefix_by="trained", policy="step")
    naive = Naive(tiny_parts, built)
    assert_same(gradients(built.objective, built.trained), naive.gradients(-naive.noised_again(3)))


def test_refl_ends_at_one_random_step(tiny_parts):
    built = build(
        tiny_parts, guidance=1.0, backprop_steps=4, truncation="single", loss="hinge", hinge_margin=2000.0,
        prefix_by="trained",
    )  # fmt: skip
    naive = Naive(tiny_parts, built, guidance=1.0)
    ends = set()
    for draw in range(3):
        last = random.Random(sample_seed(SEED, draw, 1)).randrange(T - 4, T)
        ends.add(last)
        loss = torch.relu(2000.0 - naive.reward(naive.up_to(last))).mean()
        assert_same(gradients(built.objective, built.trained, draw), naive.gradients(loss))
    assert len(ends) > 1


@pytest.mark.parametrize("policy", ["none", "step"])
def test_drtune_stops_the_gradient_of_inputs(tiny_parts, policy):
    built = build(
        tiny_parts, backprop_steps=2, truncation="spaced", input_grad=False, early_stop_steps=2, prefix_by="trained",
        policy=policy,
    )  # fmt: skip
    naive = Naive(tiny_parts, built)
    seen = set()
    for draw in range(4):
        rng = random.Random(sample_seed(SEED, draw, 1))
        num_steps = T - rng.randint(0, 2)
        grad_steps = [s for s in range(rng.randrange(T // 2), T, T // 2) if s < num_steps][:2]
        seen.add((num_steps, *grad_steps))
        expected = naive.gradients(-naive.reward(naive.spaced(num_steps, grad_steps)).mean())
        assert_same(gradients(built.objective, built.trained, draw), expected)
    assert len(seen) > 1


def test_straight_through_clamp_passes_what_the_clamp_stops(tiny_parts):
    tiny_parts.components.vae.decoder.conv_out.weight.data *= 10
    built = build(tiny_parts, backprop_steps=2)
    stopped = gradients(built.objective, built.trained)[1]
    built.objective.model = replace(built.objective.model, straight_through_clamp=True)
    naive = Naive(tiny_parts, built)
    images = naive.vae.decode(naive.last_steps(2)[0] / naive.vae.config.scaling_factor).sample / 2 + 0.5
    passed = images + (images.clamp(0, 1) - images).detach()
    ours = gradients(built.objective, built.trained)
    assert_same(ours, naive.gradients(-smooth_reward(passed, PROMPTS).total.mean()))
    assert sum((ours[1][name] - stopped[name]).abs().sum() for name in stopped) > 1e-3


def test_anchor_pulls_the_encoder_back(tiny_parts):
    built = build(tiny_parts, backprop_steps=1, anchor_weight=10.0)
    objective = built.objective
    with_anchor = gradients(objective, built.trained)[0]
    objective.settings = BackpropSettings(backprop_steps=1)
    without = gradients(objective, built.trained)[0]
    ids = objective.model.text.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    trained, original = (encoder.model(ids).last_hidden_state for encoder in (built.text, built.original))
    distance = (trained - original).square().mean()
    torch.testing.assert_close(with_anchor - without, 10 * distance.detach(), rtol=1e-3, atol=1e-5)


MODES = ("full", "lora", "frozen")


@pytest.mark.parametrize(("text", "unet"), [pair for pair in itertools.product(MODES, MODES) if {*pair} != {"frozen"}])
def test_frozen_parts_get_no_gradient(tiny_parts, text, unet):
    built = build(tiny_parts, backprop_steps=2, text=text, unet=unet, policy="step")
    gradients(built.objective, built.trained)
    frozen = [*tiny_parts.components.vae.parameters(), *built.original.parameters()]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)
    named = dict(built.trained.named_parameters())
    modes = {"text": text, "unet": unet}
    expected = {n for n in named if modes[n.partition(".")[0]] == ("lora" if "lora_" in n else "full")}
    assert {n for n, p in named.items() if p.requires_grad} == expected
    assert all(named[n].grad is not None for n in expected)
    assert all(named[n].grad is None for n in named if n not in expected)


def test_gradient_is_zero_outside_the_window(tiny_parts):
    """Only the trained encoder's embedding in the window carries gradient: K = 1 reads it once."""
    built = build(tiny_parts, backprop_steps=1)
    seen = []
    unet = tiny_parts.components.unet
    unet.register_forward_hook(lambda module, args, out: seen.append(out[0].requires_grad))
    gradients(built.objective, built.trained)
    assert seen == [False] * (T - 1) + [True]


@pytest.mark.parametrize(
    ("truncation", "expected"),
    [("last", {(T, (4, 5))}), ("single", {(5, (4,)), (6, (5,))}), ("spaced", {(T, (0, 3)), (T, (1, 4)), (T, (2, 5))})],
)
def test_choose_trajectory_covers_what_it_should(truncation, expected):
    seen = set()
    for seed in range(50):
        trajectory = choose_trajectory(truncation, num_inference_steps=T, backprop_steps=2, rng=random.Random(seed))
        seen.add((trajectory.num_steps, trajectory.grad_steps))
    assert seen == expected


def test_unknown_truncation_is_an_error():
    with pytest.raises(ValueError, match="truncation must be"):
        choose_trajectory("first", num_inference_steps=4, backprop_steps=1, rng=random.Random(0))
