"""The estimate where the UNet is trained too: its weights' gradients, and what its layers keep for them."""

import pytest
import torch
from torch import nn

from fastcraft.forecast.cards import CARDS
from fastcraft.forecast.networks import Networks
from fastcraft.forecast.phases import estimate_step
from fastcraft.forecast.tracker import AllocationTracker
from fastcraft.memory.plan import KEEP, RECOMPUTE, CheckpointPlan
from fastcraft.records import RewardOutput
from tests.objectives.build import batch_of, build

BATCH_SIZE = 3


class Smooth(nn.Module):
    """A reward with something to save for backward."""

    def forward(self, images, prompts):
        return RewardOutput(total=(images * images).sigmoid().mean(dim=(1, 2, 3)), parts={})


@pytest.mark.parametrize(("text", "unet"), [("frozen", "lora"), ("full", "full")])
def test_the_sum_of_phases_meets_a_real_step(tiny_parts, text, unet):
    components = tiny_parts.components
    built = build(tiny_parts, text=text, unet=unet, rewards=Smooth(), backprop_steps=3)
    objective = built.objective
    objective.batches = batch_of(["red cat"] * BATCH_SIZE, range(BATCH_SIZE))
    networks = Networks(
        name="tiny", unet=components.unet, vae=components.vae, text_encoders=[built.text], rewards=objective.rewards,
        latent_shape=components.latent_shape, pixels_per_latent=components.pixels_per_latent, dtype=torch.float32,
        text_copies=1,
    )  # fmt: skip
    assert networks.trains_unet
    estimate = estimate_step(networks, guided=True, on_cpu=True, treatments=(KEEP, RECOMPUTE))
    trained = [p for p in components.unet.parameters() if p.requires_grad]
    assert estimate.weight_gradient_bytes == sum(p.nbytes for p in trained) > 0
    assert estimate.static["trained weights, unet"] == estimate.weight_gradient_bytes
    weights = [t for m in (built.trained, components.vae, built.original) for t in (*m.parameters(), *m.buffers())]
    for steps in [(KEEP,) * 3, (RECOMPUTE, RECOMPUTE, KEEP), (RECOMPUTE,) * 3]:
        plan = CheckpointPlan(steps=steps, decode=KEEP)
        objective.make_plan = lambda _, plan=plan: plan
        built.trained.zero_grad()
        with AllocationTracker(weights) as tracker:
            next(objective.round(0)).loss.backward()
        predicted = estimate.predict(plan, batch_size=BATCH_SIZE, num_inference_steps=6, card=CARDS["h200"])
        above_weights = predicted.peak_bytes - estimate.static_bytes
        # gradients of the text keys are counted beside a step's highest point, which they may come after
        spare = estimate.kv_bytes.at(BATCH_SIZE)
        assert 0.99 * tracker.peak <= above_weights <= 1.02 * tracker.peak + spare, plan
