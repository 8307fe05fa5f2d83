"""The estimate: one rule of counting for real, fake and meta tensors; and a sum of phases that meets the whole step."""

import pytest
import torch
from torch import nn

from fastcraft.diffusion.image_model import ImageModel
from fastcraft.diffusion.samplers.ddim import DDIMSampler
from fastcraft.forecast.networks import Networks
from fastcraft.forecast.phases import TREATMENTS, estimate_step
from fastcraft.memory.cards import CARDS
from fastcraft.memory.tracker import AllocationTracker
from fastcraft.objectives.reward_backprop import BackpropSettings, RewardBackprop
from fastcraft.records import KEEP, RECOMPUTE, CheckpointPlan, PromptBatch, RewardOutput
from fastcraft.text.encoder import split_encoders
from fastcraft.text.prompt_encoder import PromptEncoder

MIB = 2**20
PLANS = [
    (KEEP,), (KEEP,) * 4, (RECOMPUTE, RECOMPUTE, KEEP), ("sac:attention", "sac:attention+conv"),
    *((name,) * 3 for name in TREATMENTS),
]  # fmt: skip


class Smooth(nn.Module):
    """A reward with something to save for backward."""

    def forward(self, images, prompts):
        return RewardOutput(total=(images * images).sigmoid().mean(dim=(1, 2, 3)), parts={})


@pytest.fixture
def tiny(tiny_parts):
    """Networks for the estimate, and an objective over the same ones for the truth."""
    parts = tiny_parts.components
    trained, original = split_encoders(parts.text_encoder, train="full", dtype=torch.float32)
    networks = Networks(
        name="tiny", unet=parts.unet, vae=parts.vae, text_encoders=[trained], rewards=Smooth(),
        latent_shape=parts.latent_shape, pixels_per_latent=parts.pixels_per_latent, dtype=torch.float32,
    )  # fmt: skip

    def objective(depth, make_plan):
        model = ImageModel(
            unet=parts.unet, vae=parts.vae, sampler=DDIMSampler(parts.schedule, num_inference_steps=depth + 2),
            guidance_scale=3.0, latent_shape=parts.latent_shape, device=torch.device("cpu"),
        )  # fmt: skip
        text = PromptEncoder(
            parts.tokenizer, trained=trained, original=original, device=torch.device("cpu"), guided=True
        )
        settings = BackpropSettings(backprop_steps=depth)
        return RewardBackprop(text, model, rewards=networks.rewards, make_plan=make_plan, settings=settings, seed=0)

    weights = [t for m in (parts.unet, parts.vae, trained, original) for t in (*m.parameters(), *m.buffers())]
    return networks, objective, weights


@pytest.fixture
def estimate(tiny):
    return estimate_step(tiny[0], guided=True, on_cpu=True)


def true_peak(tiny, plan, batch_size):
    """Bytes above the weights at the highest point of a micro-step, on real tensors."""
    _, objective, weights = tiny
    loss = objective(len(plan.steps), lambda _: plan)
    batch = PromptBatch(prompts=["red cat"] * batch_size, indices=list(range(batch_size)))
    with AllocationTracker(weights) as tracker:
        (output,) = loss.losses(batch, draw=0)
        output.loss.backward()
    return tracker.peak


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_sum_of_phases_meets_a_real_step(tiny, estimate, batch_size):
    plans = [CheckpointPlan(steps=steps, decode=KEEP) for steps in PLANS]
    plans += [CheckpointPlan(steps=(KEEP,) * 4, segments=(2, 2)), CheckpointPlan(steps=(KEEP,), decode_micro_batch=2)]
    for plan in plans:
        predicted = estimate.predict(
            plan, batch_size=batch_size, num_inference_steps=len(plan.steps) + 2, card=CARDS["h200"]
        )
        measured = true_peak(tiny, plan, batch_size)
        above_weights = predicted.peak_bytes - estimate.static_bytes
        # gradients of the text keys are counted beside a step's highest point, which they may come after
        spare = estimate.kv_bytes.at(batch_size)
        assert 0.99 * measured <= above_weights <= 1.02 * measured + spare, plan
