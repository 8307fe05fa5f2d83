"""A trained UNet, alone and beside the text encoder, whole or by adapters: every gradient against the naive loops."""

import random

import pytest
import torch

from fastcraft.data.order import sample_seed
from fastcraft.diffusion.patch import Patch
from fastcraft.memory.policies import POLICIES, make_policy
from tests.objectives.build import INDICES, SEED, build, gradients
from tests.objectives.naive import Naive, assert_same

T = 4
MODES = [("frozen", "lora"), ("frozen", "full"), ("full", "lora"), ("full", "full"), ("lora", "lora")]
"""Of text encoder and UNet."""

POLICY_NAMES = [
    "none", "step", "step+block", "sac:attention", "sac:conv+linear", "sac:attention+conv+linear+norm", "segment:2",
    "last_k_live:1", "plan:sac:attention,recompute,keep",
]  # fmt: skip


def last(naive, *, depth, prefix="original", input_grad=True):
    return -naive.reward(naive.last_steps(depth, prefix=prefix, input_grad=input_grad)[0]).mean()


def at_random(naive):
    rngs = [random.Random(sample_seed(SEED, index, 1)) for index in INDICES]
    starts = [min(max(round(rng.gauss(0, 1.5)), 0), T - 1) for rng in rngs]
    assert starts[0] != starts[1]
    return -naive.reward(naive.from_starts(starts)).mean()


def single(naive):
    return -naive.reward(naive.up_to(random.Random(sample_seed(SEED, 0, 1)).randrange(T - 3, T))).mean()


def spaced(naive, *, input_grad):
    rng = random.Random(sample_seed(SEED, 0, 1))
    num_steps = T - rng.randint(0, 1)
    grad_steps = [s for s in range(rng.randrange(T // 2), T, T // 2) if s < num_steps][:2]
    return -naive.reward(naive.spaced(num_steps, grad_steps, input_grad=input_grad)).mean()


SPACED = {"backprop_steps": 2, "truncation": "spaced", "early_stop_steps": 1, "prefix_by": "trained"}
METHODS = {
    "K = 1": ({"backprop_steps": 1}, lambda naive: last(naive, depth=1)),
    "K = 3": ({"backprop_steps": 3}, lambda naive: last(naive, depth=3)),
    "K = T": ({"backprop_steps": T}, lambda naive: last(naive, depth=T)),
    "eta": ({"backprop_steps": 2, "eta": 0.7}, lambda naive: last(naive, depth=2)),
    "unguided": ({"backprop_steps": 2, "guidance": 1.0}, lambda naive: last(naive, depth=2)),
    "draft": ({"backprop_steps": 2, "prefix_by": "trained"}, lambda naive: last(naive, depth=2, prefix="trained")),
    "no input grad": (
        {"backprop_steps": 3, "input_grad": False}, lambda naive: last(naive, depth=3, input_grad=False),
    ),
    "uncond by the original": ({"backprop_steps": 2, "uncond_by": "original"}, lambda naive: last(naive, depth=2)),
    "no uncond grad": ({"backprop_steps": 2, "uncond_grad": False}, lambda naive: last(naive, depth=2)),
    "alignprop": (
        {"backprop_steps": T, "truncation": "random", "truncation_std": 1.5, "prefix_by": "trained"}, at_random,
    ),
    "refl": ({"backprop_steps": 3, "truncation": "single", "prefix_by": "trained"}, single),
    "spaced": (SPACED, lambda naive: spaced(naive, input_grad=True)),
    "drtune": ({**SPACED, "input_grad": False}, lambda naive: spaced(naive, input_grad=False)),
    "draft-lv": ({"backprop_steps": 1, "low_variance_draws": 3}, lambda naive: -naive.noised_again(3, "original")),
}  # fmt: skip


def naive_of(parts, built, options):
    return Naive(
        parts, built, num_steps=T, guidance=options.get("guidance", 3.0), eta=options.get("eta", 0.0),
        uncond=options.get("uncond_by", "trained"), uncond_grad=options.get("uncond_grad", True),
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("text", "unet"), MODES)
def test_every_method_equals_its_naive_loop(tiny_parts, text, unet, method):
    options, loss = METHODS[method]
    built = build(tiny_parts, num_steps=T, text=text, unet=unet, **options)
    naive = naive_of(tiny_parts, built, options)
    ours = gradients(built.objective, built.trained)
    assert {name for name, p in built.trained.named_parameters() if p.requires_grad} == ours[1].keys()
    assert_same(ours, naive.gradients(loss(naive)))


@pytest.mark.parametrize("method", ["K = 3", "drtune"])
@pytest.mark.parametrize(("text", "unet"), [("frozen", "lora"), ("full", "lora"), ("frozen", "full")])
def test_every_policy_gives_the_bits_of_keeping_everything(tiny_parts, text, unet, method):
    """Which are the naive loop's, up to rounding."""
    refused = {"batched"}  # below
    assert {name.partition(":")[0] for name in POLICY_NAMES} | refused | {"offload"} == set(POLICIES.names())
    options, loss = METHODS[method]
    built = build(tiny_parts, num_steps=T, text=text, unet=unet, **options)
    naive = naive_of(tiny_parts, built, options)
    want_loss, expected = gradients(built.objective, built.trained)
    assert_same((want_loss, expected), naive.gradients(loss(naive)))
    for name in POLICY_NAMES:
        if name.startswith("plan:") and method == "drtune":
            name = "plan:sac:attention,recompute"
        built.objective.make_plan = make_policy(name).plan
        other_loss, grads = gradients(built.objective, built.trained)
        assert torch.equal(other_loss, want_loss)
        assert grads.keys() == expected.keys()
        assert all(torch.equal(grads[key], expected[key]) for key in expected), name


@pytest.mark.parametrize("policy", ["none", "step", "step+block"])
@pytest.mark.parametrize(("text", "unet"), MODES)
def test_the_fused_ops_send_the_same_gradients(tiny_parts, text, unet, policy):
    built = build(tiny_parts, num_steps=T, text=text, unet=unet, policy=policy, backprop_steps=2)
    naive = naive_of(tiny_parts, built, {})
    with Patch(tiny_parts.components.unet, tiny_parts.components.vae, backend="reference") as patch:
        assert any(swap.ops for swap in patch.swaps[0])
        ours = gradients(built.objective, built.trained)
    assert_same(ours, naive.gradients(last(naive, depth=2)))


@pytest.mark.parametrize("text", ["frozen", "full"])
@pytest.mark.parametrize("unet", ["lora", "full"])
def test_steps_in_batches_are_refused(tiny_parts, text, unet):
    """They differentiate the text alone."""
    options = {"backprop_steps": 2, "input_grad": False, "policy": "batched:2"}
    built = build(tiny_parts, num_steps=T, text=text, unet=unet, **options)
    with pytest.raises(ValueError, match=r"would lose a trained network's gradient, got 2"):
        gradients(built.objective, built.trained)


def test_the_head_first_sends_the_same_gradients(tiny_parts):
    built = build(tiny_parts, num_steps=T, text="full", unet="lora", backprop_steps=2)
    naive = naive_of(tiny_parts, built, {})
    built.objective.make_plan = lambda depth: make_policy("step").plan(depth, decode_micro_batch=1)
    assert_same(gradients(built.objective, built.trained), naive.gradients(last(naive, depth=2)))
