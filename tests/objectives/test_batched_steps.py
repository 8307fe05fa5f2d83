"""Independent steps taken backward in batches: the gradient of the whole graph, for every way that a run can end."""

from dataclasses import replace

import pytest
import torch

from fastcraft.families.unet import UNetNetwork
from fastcraft.memory.plan import RECOMPUTE, CheckpointPlan
from fastcraft.memory.policies import make_policy
from fastcraft.records import TextEmbeds, Trajectory
from tests.objectives.build import flat, gradients, one_loss

T = 6
STOP = {"backprop_steps": 3, "truncation": "spaced", "input_grad": False, "prefix_by": "trained"}


def run(built, policy, *, micro_batch=0, draw=0):
    """(loss, gradient) in float64, but for the latents."""
    built.objective.make_plan = lambda depth: make_policy(policy).plan(depth, decode_micro_batch=micro_batch)
    loss, found = gradients(built.objective, built.trained, draw)
    return loss, flat(found)


@pytest.fixture
def make(tiny_objective):
    def build(**options):
        built = tiny_objective(num_steps=T, **options)
        model = built.objective.model
        built.trained.double()
        built.original.double()
        network = UNetNetwork(module=model.network.module.double())
        built.objective.model = replace(model, network=network, vae=model.vae.double())
        return built

    return build


@pytest.mark.parametrize(
    ("settings", "micro_batch"),
    [
        ({}, 0),
        ({"early_stop_steps": 4, "eta": 0.7}, 0),
        ({"guidance": 1.0}, 0),
        ({"uncond_grad": False}, 1),
        ({"truncation": "last", "backprop_steps": 5, "prefix_by": "original"}, 0),
        ({"truncation": "random", "truncation_std": 1.5, "backprop_steps": 4, "eta": 1.0}, 1),
    ],
    ids=["drtune", "early-stop", "unguided", "uncond-and-head-first", "last", "rows-of-their-own"],
)
def test_the_gradient_is_that_of_keeping_everything(make, settings, micro_batch):
    built = make(**(STOP | settings))
    calls = []
    built.objective.model.network.module.register_forward_hook(lambda module, args, out: calls.append(len(out[0])))
    for draw in (0, 1):
        loss, expected = run(built, "none", micro_batch=micro_batch, draw=draw)
        assert expected.abs().max() > 1e-3
        for policy in ("batched:1", "batched:2", "batched:9"):
            calls.clear()
            other, gradient = run(built, policy, micro_batch=micro_batch, draw=draw)
            assert torch.equal(other, loss)
            assert (gradient - expected).norm() < 1e-12 * expected.norm(), policy
            if policy == "batched:1":
                assert torch.equal(gradient, expected)
            else:
                assert max(calls) > min(calls)  # several steps in one call


def test_a_chain_that_starts_late_sends_the_gradient_of_the_steps_it_runs(make):
    model = make(**STOP).objective.model
    grads = []
    for policy in ("step", "batched:3"):
        embeds = model.encode(["a"], by="original")
        cond = embeds.cond.sequence.detach().double().requires_grad_()
        text = model.condition(replace(embeds, cond=TextEmbeds(sequence=cond)))
        end = model.denoise(
            model.noise([1])[0], text, start=T - 1, plan=make_policy(policy).plan(3),
            trajectory=Trajectory(num_steps=T, grad_steps=(T - 3, T - 2, T - 1), input_grad=False),
        )  # fmt: skip
        grads += torch.autograd.grad(end.sum(), cond, allow_unused=True)
    assert grads[0].abs().max() > 0
    assert torch.equal(*grads)


def test_a_second_pass_is_refused(make):
    """It would end with steps still waiting for others."""
    objective = make(**STOP).objective
    objective.make_plan = make_policy("batched:2").plan
    loss = one_loss(objective).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="go backward once"):
        loss.backward()


def test_a_chain_with_gradient_through_its_latents_is_refused(make):
    model = make(**STOP).objective.model
    text = model.condition(model.encode(["a"], by="original"))
    with pytest.raises(ValueError, match=r"plan\.batched needs a trajectory with input_grad = False, got 2"):
        model.denoise(
            model.noise([1])[0], text, trajectory=Trajectory(num_steps=T, grad_steps=(4, 5)),
            plan=CheckpointPlan(steps=(RECOMPUTE,) * 2, batched=2),
        )  # fmt: skip
