"""Independent steps taken backward in batches: the gradient of the whole graph, for every way that a run can end."""

from dataclasses import replace

import pytest
import torch

from fastcraft.diffusion.samplers.ddim import ddim
from fastcraft.families.image_model import ImageModel
from fastcraft.memory.plan import RECOMPUTE, CheckpointPlan
from fastcraft.memory.policies import make_policy
from fastcraft.records import PromptBatch, Trajectory

T = 6
STOP = {"backprop_steps": 3, "truncation": "spaced", "input_grad": False, "prefix_encoder": "trained"}


def run(objective, trained, policy, *, micro_batch=0, draw=0):
    """(loss, gradient) in float64, but for the latents."""
    objective.make_plan = lambda depth: make_policy(policy).plan(depth, decode_micro_batch=micro_batch)
    trained.zero_grad()
    (output,) = objective.losses(PromptBatch(prompts=["a red cat", "a dog"], indices=[4, 5]), draw=draw)
    output.loss.backward()
    return output.loss.detach(), torch.cat([p.grad.flatten() for p in trained.parameters() if p.grad is not None])


@pytest.fixture
def make(tiny_objective, tiny_parts):
    def build(*, eta=0.0, guidance=3.0, **settings):
        objective, trained = tiny_objective(**settings)
        model, text = objective.model, objective.text
        text.guided = guidance != 1
        objective.model = ImageModel(
            unet=model.unet.double(), vae=model.vae.double(), guidance_scale=guidance, latent_shape=model.latent_shape,
            sampler=ddim(tiny_parts.components.schedule, num_inference_steps=T, eta=eta), device=model.device,
        )  # fmt: skip
        return objective, trained.double()

    return build


@pytest.mark.parametrize(
    ("settings", "micro_batch"),
    [
        ({}, 0),
        ({"early_stop_steps": 4, "eta": 0.7}, 0),
        ({"guidance": 1.0}, 0),
        ({"uncond_grad": False}, 1),
        ({"truncation": "last", "backprop_steps": 5, "prefix_encoder": "original"}, 0),
        ({"truncation": "random", "truncation_std": 1.5, "backprop_steps": 4, "eta": 1.0}, 1),
    ],
    ids=["drtune", "early-stop", "unguided", "uncond-and-head-first", "last", "rows-of-their-own"],
)
def test_the_gradient_is_that_of_keeping_everything(make, settings, micro_batch):
    objective, trained = make(**(STOP | settings))
    calls = []
    objective.model.unet.register_forward_hook(lambda module, args, out: calls.append(len(out[0])))
    for draw in (0, 1):
        loss, expected = run(objective, trained, "none", micro_batch=micro_batch, draw=draw)
        assert expected.abs().max() > 1e-3
        for policy in ("batched:1", "batched:2", "batched:9"):
            calls.clear()
            other, gradient = run(objective, trained, policy, micro_batch=micro_batch, draw=draw)
            assert torch.equal(other, loss)
            assert (gradient - expected).norm() < 1e-12 * expected.norm(), policy
            if policy == "batched:1":
                assert torch.equal(gradient, expected)
            else:
                assert max(calls) > min(calls)  # several steps in one call


def test_a_chain_that_starts_late_sends_the_gradient_of_the_steps_it_runs(make):
    objective, _ = make(**STOP)
    model = objective.model
    grads = []
    for policy in ("step", "batched:3"):
        embeds = objective.text.original(["a"])
        cond = embeds.cond.detach().double().requires_grad_()
        kv = model.text_kv(replace(embeds, cond=cond))
        end = model.denoise(
            model.noise([1])[0], text_kv=kv, prefix_kv=kv, start=T - 1, plan=make_policy(policy).plan(3),
            trajectory=Trajectory(num_steps=T, grad_steps=(T - 3, T - 2, T - 1), input_grad=False),
        )  # fmt: skip
        grads += torch.autograd.grad(end.sum(), cond, allow_unused=True)
    assert grads[0].abs().max() > 0
    assert torch.equal(*grads)


def test_a_second_pass_is_refused(make):
    """It would end with steps still waiting for others."""
    objective, _ = make(**STOP)
    objective.make_plan = make_policy("batched:2").plan
    (output,) = objective.losses(PromptBatch(prompts=["a red cat"], indices=[4]), draw=0)
    output.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="go backward once"):
        output.loss.backward()


def test_a_chain_with_gradient_through_its_latents_is_refused(make):
    objective, _ = make(**STOP)
    model = objective.model
    kv = model.text_kv(objective.text.original(["a"]))
    with pytest.raises(ValueError, match=r"plan\.batched needs a trajectory with input_grad = False, got 2"):
        model.denoise(
            model.noise([1])[0], text_kv=kv, prefix_kv=kv, trajectory=Trajectory(num_steps=T, grad_steps=(4, 5)),
            plan=CheckpointPlan(steps=(RECOMPUTE,) * 2, batched=2),
        )  # fmt: skip
