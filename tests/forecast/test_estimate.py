"""The estimate: one rule of counting for real, fake and meta tensors; and a sum of phases that meets the whole step."""

import contextlib
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from benchmarks.saved_bytes import RESULTS, total_mb
from fastcraft.diffusion.offload import offload_contexts
from fastcraft.diffusion.patch import Patch
from fastcraft.diffusion.samplers.ddim import ddim
from fastcraft.diffusion.treatments import is_one_of
from fastcraft.families.components import load_components
from fastcraft.families.image_model import ImageModel
from fastcraft.families.unet import UNetNetwork, use_text_kv
from fastcraft.forecast.architectures import MODELS, towers_of
from fastcraft.forecast.cache import _digest, cached_estimate
from fastcraft.forecast.cards import CARDS
from fastcraft.forecast.estimate import StepEstimate
from fastcraft.forecast.networks import Networks, networks_from_configs
from fastcraft.forecast.phases import OFFLOADS, TREATMENTS, estimate_step, hollow, keep_differentiable
from fastcraft.forecast.tracker import AllocationTracker, bytes_of
from fastcraft.memory.plan import KEEP, RECOMPUTE, CheckpointPlan
from fastcraft.objectives.reward_backprop import BackpropSettings, RewardBackprop
from fastcraft.records import PromptBatch, RewardOutput
from fastcraft.rewards.brightness import BrightnessReward
from fastcraft.rewards.mix import WeightedRewards
from fastcraft.text.encoder import TextEncoder
from fastcraft.text.prompt_encoder import PromptEncoder
from fastcraft.trained.trained_set import frozen_copy
from tests.diffusion.texts import condition

MIB = 2**20
PLANS = [
    (KEEP,), (KEEP,) * 4, (RECOMPUTE, RECOMPUTE, KEEP), ("sac:attention", "sac:attention+conv"),
    *((name,) * 3 for name in TREATMENTS),
]  # fmt: skip


class Smooth(nn.Module):
    """A reward with something to save for backward."""

    def forward(self, images, prompts):
        return RewardOutput(total=(images * images).sigmoid().mean(dim=(1, 2, 3)), parts={})


@pytest.fixture(scope="module")
def tiny(tiny_pipeline):
    """Networks for the estimate, and an objective over the same ones for the truth."""
    parts = load_components(tiny_pipeline, dtype=torch.float32, device=torch.device("cpu"))
    use_text_kv(parts.unet)
    original = TextEncoder(frozen_copy(parts.text_encoder, torch.float32))
    trained = TextEncoder(parts.text_encoder.requires_grad_())
    networks = Networks(
        name="tiny", unet=parts.unet, vae=parts.vae, text_encoders=[trained], rewards=Smooth(),
        latent_shape=parts.latent_shape, pixels_per_latent=parts.pixels_per_latent, dtype=torch.float32,
    )  # fmt: skip

    def objective(plan, batch_size, **settings):
        depth = len(plan.steps)
        text = PromptEncoder(
            parts.tokenizer, trained=trained, original=original, device=torch.device("cpu"), guided=True
        )
        model = ImageModel(
            text=text, network=UNetNetwork(module=parts.unet), vae=parts.vae, guidance_scale=3.0,
            sampler=ddim(parts.schedule, num_inference_steps=depth + 2), latent_shape=parts.latent_shape,
            device=torch.device("cpu"),
        )  # fmt: skip
        batch = PromptBatch(prompts=["red cat"] * batch_size, indices=list(range(batch_size)))
        return RewardBackprop(
            model, rewards=networks.rewards, batches=lambda first: batch, samples_per_micro=batch_size,
            make_plan=lambda _: plan, settings=BackpropSettings(backprop_steps=depth, **settings), seed=0,
        )  # fmt: skip

    weights = [t for m in (parts.unet, parts.vae, trained, original) for t in (*m.parameters(), *m.buffers())]
    return networks, objective, weights


@pytest.fixture(scope="module")
def estimate(tiny):
    return estimate_step(tiny[0], guided=True, on_cpu=True, treatments=(*TREATMENTS, *OFFLOADS))


def true_peak(tiny, plan, batch_size, **settings):
    """Bytes above the weights at the highest point of a micro-step, on real tensors."""
    _, objective, weights = tiny
    one = objective(plan, batch_size, **settings)
    with AllocationTracker(weights) as tracker:
        (output,) = one.round(0)
        output.loss.backward()
    return tracker.peak


def test_the_sum_of_phases_meets_a_real_step(tiny, estimate):
    batch_size = 3
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


@pytest.mark.parametrize("size", [1, 2, 3])
def test_steps_in_batches_take_what_is_predicted_whatever_their_number(tiny, estimate, size):
    peaks = []
    for depth in (7, 12):  # more than one full batch, so that gradients of the text keys wait in both
        plan = CheckpointPlan(steps=(RECOMPUTE,) * depth, batched=size, decode=RECOMPUTE, decode_micro_batch=1)
        predicted = estimate.predict(
            plan, batch_size=3, num_inference_steps=depth + 2, card=CARDS["h200"], input_grad=False
        )
        peaks.append(true_peak(tiny, plan, 3, input_grad=False))
        above_weights = predicted.peak_bytes - estimate.static_bytes
        assert 0.99 * peaks[-1] <= above_weights <= 1.02 * peaks[-1] + estimate.kv_bytes.at(3), depth
    latent = 3 * 4 * 4 * 8 * 8  # bytes
    assert 0 < peaks[1] - peaks[0] <= 2 * 5 * latent  # a step more takes its input and nothing else


def test_what_is_offloaded_is_what_lies_on_the_host(tiny, estimate):
    """Counted on real tensors; the copies stay on the CPU here."""
    unet = tiny[0].unet
    with torch.no_grad():
        text = condition(unet, torch.randn(1, 77, 32), torch.randn(1, 77, 32))
    text = text.unflatten([tensor.requires_grad_() for tensor in text.flat()])
    for ops in (("attention", "conv"), ("attention",)):
        contexts = offload_contexts(partial(is_one_of, ops))
        checkpoint(
            lambda x: UNetNetwork(module=unet).predict(x, torch.tensor(9), text, guided=True),
            torch.randn(1, 4, 8, 8), use_reentrant=False, context_fn=lambda contexts=contexts: contexts,
        )  # fmt: skip
        kept = tree_leaves([out for _, out in contexts[0].kept])
        cost = estimate.steps["offload:" + "+".join(ops)]
        assert cost.host.each == pytest.approx(sum(copy.host.nbytes for copy in kept if copy is not None), rel=0.01)
        assert cost.held == estimate.steps[RECOMPUTE].held


def test_offloaded_steps_wait_for_the_host_and_not_for_each_others_memory(estimate):
    sac, moved = estimate.steps["sac:attention+conv"], estimate.steps["offload:attention+conv"]
    assert moved.flops == pytest.approx(sac.flops, rel=1e-3)
    peaks, slow = [], replace(CARDS["h200"], host_bandwidth=1e6)
    for depth in (3, 8):
        plan = CheckpointPlan(steps=("offload:attention+conv",) * depth, decode=KEEP)
        options = {"batch_size": 2, "num_inference_steps": depth}
        near, far = (estimate.predict(plan, card=card, **options) for card in (CARDS["h200"], slow))
        assert near.host_bytes == 2 * depth * moved.host.each
        there_and_back = 2 * near.host_bytes / slow.host_bandwidth
        assert far.seconds_by_phase["steps with gradient"] >= there_and_back > near.seconds
        peaks.append(near.peak_bytes)
    assert peaks[1] - peaks[0] == 5 * 2 * 4 * 4 * 8 * 8  # a latent for each step


def test_an_estimate_survives_json_and_is_made_once(tiny, estimate, tmp_path, monkeypatch):
    assert StepEstimate.from_json(json.loads(json.dumps(estimate.to_json()))) == estimate
    calls = []
    monkeypatch.setattr("fastcraft.forecast.cache.estimate_step", lambda *_, **options: calls.append(1) or estimate)
    for guided in (True, True, False):
        assert cached_estimate(tiny[0], folder=tmp_path, guided=guided, on_cpu=True) == estimate
    assert len(calls) == 2
    (file, _) = tmp_path.glob("*.json")
    for damaged in tmp_path.glob("*.json"):
        damaged.write_text(damaged.read_text()[:100])
    assert cached_estimate(tiny[0], folder=tmp_path, guided=True, on_cpu=True) == estimate
    assert len(calls) == 3
    assert file.stat().st_size > 0


def test_estimating_leaves_the_networks_alone(tiny, estimate):
    unet = tiny[0].unet
    assert all(p.device.type == "cpu" and p.grad is None for p in unet.parameters())
    copy = hollow(unet, "meta")
    assert bytes_of(copy) == bytes_of(unet)
    assert {p.device.type for p in copy.parameters()} == {"meta"}


def test_unknown_treatments_are_refused(estimate):
    with pytest.raises(ValueError, match="must use treatments that were estimated, got"):
        estimate.predict(
            CheckpointPlan(steps=("offload:linear",)), batch_size=1, num_inference_steps=2, card=CARDS["h200"]
        )


def test_what_computes_nothing_is_no_work(estimate):
    with AllocationTracker() as tracker:
        x = torch.empty(10, 10)
        y = torch.ops.aten._unsafe_view(x, [100])
        x.new_empty(5)
    assert tracker.work().ops == {}
    assert tracker.work().num_calls == 3
    del y
    # the tiny UNet's ops, and no question that was only put to fake tensors
    assert sum(estimate.steps[KEEP].forward.ops.values()) < 300
    assert estimate.steps["sac:conv"].backward.num_selected == estimate.steps["sac:conv"].forward.num_calls > 100
    assert estimate.steps[RECOMPUTE].backward.num_selected == 0


@pytest.fixture(scope="module")
def sd15():
    """Stable Diffusion 1.5 as a card would run it, without its weights; two treatments."""
    towers = towers_of(["clip", "aesthetic"])
    networks = networks_from_configs("sd15", MODELS["sd15"], towers=towers, dtype=torch.bfloat16)
    return estimate_step(networks, guided=True, treatments=(KEEP, RECOMPUTE))


def test_stable_diffusion_takes_what_was_measured(sd15):
    """Against figures of an allocator's trace: 1477.3 MiB per step with its text keys, 1.607 and 1.985 TFLOP."""
    keep = sd15.steps[KEEP]
    assert (keep.held.each + sd15.kv_bytes.each) / MIB == pytest.approx(1477.3, abs=1.0)
    assert (keep.first_held.each + sd15.kv_bytes.each) / MIB == pytest.approx(1406.9, abs=1.0)
    assert keep.forward.flops / 1e12 == pytest.approx(1.607, rel=0.01)
    assert keep.backward.flops / 1e12 == pytest.approx(1.985, rel=0.01)
    assert sd15.steps[RECOMPUTE].held.each == 4 * 4 * 64 * 64  # one latent
    assert sd15.static["UNet"] / MIB == pytest.approx(1639.4, abs=0.1)


@pytest.mark.parametrize("kind", ["plain", "patched"])
def test_one_row_and_step_keeps_what_saved_bytes_counts(kind):
    """Of Stable Diffusion 1.5, counted in two ways; and a patched estimate is never taken for a plain one."""
    counted = json.loads((RESULTS / "saved_bytes.json").read_text())["models"]["sd15@512"][kind]
    networks = networks_from_configs("sd15", MODELS["sd15"], towers=[], dtype=torch.bfloat16)
    before = _digest(networks, {})
    with Patch(networks.unet, networks.vae) if kind == "patched" else contextlib.nullcontext():
        estimate = estimate_step(networks, guided=False, treatments=(KEEP,))
        assert (_digest(networks, {}) == before) == (kind == "plain")
    assert estimate.steps[KEEP].held.each / 1e6 == pytest.approx(total_mb(counted), rel=0.005)
    assert not estimate.uncounted
    assert _digest(networks, {}) == before


def test_attention_is_the_fused_op_of_a_card(sd15):
    assert "aten._scaled_dot_product_flash_attention" in sd15.attention
    assert "aten._scaled_dot_product_efficient_attention" in sd15.attention  # the decoder's 512 wide head
    assert not any("for_cpu" in name or "math" in name for name in sd15.attention)


@pytest.mark.parametrize("policy", [KEEP, RECOMPUTE])
def test_memory_is_flat_in_the_depth_only_under_recompute(sd15, policy):
    def peak(depth):
        plan = CheckpointPlan(steps=(policy,) * depth, decode=KEEP, decode_micro_batch=1)
        card = CARDS["a100-80g"]
        return sd15.predict(plan, batch_size=4, num_inference_steps=50, card=card).peak_bytes - sd15.static_bytes

    assert (peak(50) <= 1.1 * peak(1)) == (policy == RECOMPUTE)


def test_rewards_that_leave_torch_are_left_out():
    class Counted(BrightnessReward):
        differentiable = False

        def forward(self, images, prompts):
            return torch.from_numpy(images.numpy()).mean(dim=(1, 2, 3))

    mix = WeightedRewards([("seen", BrightnessReward(), 1.0), ("counted", Counted(), 0.0)], normalize="running_std")
    keep_differentiable(mix)
    images = torch.ones(2, 3, 8, 8, device="meta", requires_grad=True)
    mix(images, ["", ""]).total.sum().backward()
    assert mix.names == ["seen"]
    assert images.grad.shape == images.shape
