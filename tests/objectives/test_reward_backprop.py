"""The whole step against naive loops that use no trick: stock UNet, stock scheduler, plain autograd."""

import random
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from fastcraft.data.order import sample_seed
from fastcraft.diffusion.samplers.ddim import ddim
from fastcraft.families.image_model import ImageModel
from fastcraft.memory.policies import POLICIES, make_policy
from fastcraft.objectives.reward_backprop import BackpropSettings, RewardBackprop
from fastcraft.objectives.truncation import choose_trajectory
from fastcraft.records import PromptBatch, RewardOutput
from fastcraft.text.encoder import split_encoders
from fastcraft.text.prompt_encoder import PromptEncoder

T = 6
PROMPTS = ["a red cat", "a blue dog and a red cat"]
SEED = 3


def smooth_reward(images, prompts):
    """Differentiable, own image only, curved enough to tell pictures apart."""
    weight = torch.linspace(-1, 1, images[0].numel()).view(images.shape[1:])
    total = (images * weight).flatten(1).sum(1) + images.square().flatten(1).mean(1)
    return RewardOutput(total=total, parts={"smooth": total})


def build(parts, *, policy="none", guidance=3.0, eta=0.0, train="full", uncond_encoder="trained", **settings):
    components = parts.components
    trained, original = split_encoders(components.text_encoder, train=train, dtype=torch.float32)
    with torch.no_grad():  # the trained encoder differs from the original, as it does after some steps
        generator = torch.Generator().manual_seed(7)
        for parameter in trained.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    text = PromptEncoder(
        components.tokenizer, trained=trained, original=original, device=torch.device("cpu"),
        guided=guidance != 1, uncond_encoder=uncond_encoder,
    )  # fmt: skip
    model = ImageModel(
        unet=components.unet, vae=components.vae, guidance_scale=guidance, latent_shape=components.latent_shape,
        sampler=ddim(components.schedule, num_inference_steps=T, eta=eta), device=torch.device("cpu"),
    )  # fmt: skip
    chosen = make_policy(policy)
    objective = RewardBackprop(
        text, model, rewards=smooth_reward, make_plan=chosen.plan, settings=BackpropSettings(**settings), seed=SEED
    )
    return objective, trained, original


def gradients(objective, trained, draw=0):
    trained.zero_grad()
    (output,) = objective.losses(PromptBatch(prompts=PROMPTS, indices=[4, 5]), draw=draw)
    output.loss.backward()
    return output.loss.detach(), {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}


class Naive:
    """One denoising chain written as the papers write it, over the stock diffusers classes."""

    def __init__(self, parts, trained, original, *, guidance, eta=0.0, uncond="trained"):
        self.unet: UNet2DConditionModel = parts.stock
        self.vae, self.tokenizer = parts.components.vae, parts.components.tokenizer
        self.trained, self.original, self.uncond = trained.model, original.model, uncond
        self.guidance, self.eta = guidance, eta
        self.scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1,
            clip_sample=False, timestep_spacing="trailing",
        )  # fmt: skip
        self.scheduler.set_timesteps(T)

    def embed(self, encoder):
        def encode(model, texts):
            ids = self.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            return model(ids.input_ids).last_hidden_state

        uncond = encode(self.original if self.uncond == "original" else encoder, [""] * len(PROMPTS))
        return torch.cat([uncond, encode(encoder, PROMPTS)])

    def noise(self):
        generators = [torch.Generator().manual_seed(sample_seed(SEED, i)) for i in (4, 5)]
        draws = [[torch.randn(4, 8, 8, generator=g) for g in generators] for _ in range(1 + T)]
        return torch.stack(draws[0]), [torch.stack(d) for d in draws[1:]]

    def predict(self, x, t, embeds):
        if self.guidance == 1:
            return self.unet(x, t, encoder_hidden_states=embeds[len(PROMPTS) :]).sample
        e_u, e_c = self.unet(torch.cat([x, x]), t, encoder_hidden_states=embeds).sample.chunk(2)
        return e_u + self.guidance * (e_c - e_u)

    def step(self, e, t, x, noise):
        return self.scheduler.step(e, t, x, eta=self.eta, variance_noise=noise if self.eta else None)

    def reward(self, latents):
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return smooth_reward((images / 2 + 0.5).clamp(0, 1), PROMPTS).total

    def last_steps(self, depth, prefix="original"):
        """TextCraftor Alg. 1 and, with ``prefix`` trained, DRaFT-K and AlignProp."""
        embeds = self.embed(self.trained)
        early = (self.embed(self.original) if prefix == "original" else embeds).detach()
        x, noises = self.noise()
        for i, t in enumerate(self.scheduler.timesteps):
            if i < T - depth:
                with torch.no_grad():
                    x = self.step(self.predict(x, t, early), t, x, noises[i]).prev_sample
            else:
                x = self.step(self.predict(x, t, embeds), t, x, noises[i]).prev_sample
        return x, embeds


def naive_gradients(trained, loss):
    trained.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}


def assert_same(ours, naive):
    (loss, grads), (plain_loss, plain_grads) = ours, naive
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == plain_grads.keys()
    a = torch.cat([g.flatten() for g in grads.values()]).double()
    b = torch.cat([plain_grads[n].flatten() for n in grads]).double()
    assert b.norm() > 1e-4
    assert torch.cosine_similarity(a, b, dim=0) > 0.99999
    torch.testing.assert_close(a.norm(), b.norm(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("policy", ["none", "step"])
@pytest.mark.parametrize("depth", [1, 5, T])
def test_textcraftor_equals_the_naive_loop(tiny_parts, depth, policy):
    objective, trained, original = build(tiny_parts, policy=policy, backprop_steps=depth)
    naive = Naive(tiny_parts, trained, original, guidance=3.0)
    expected = naive_gradients(trained, -naive.reward(naive.last_steps(depth)[0]).mean())
    assert_same(gradients(objective, trained), expected)


POLICY_NAMES = [
    "none", "step", "step+block", "sac:attention", "sac:conv+linear", "sac:attention+conv+linear+norm", "segment:2",
    "last_k_live:1", "plan:sac:attention,recompute,keep",
]  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"truncation": "spaced", "input_grad": False, "prefix_encoder": "trained"}])
def test_every_policy_gives_the_same_bits(tiny_parts, settings):
    elsewhere = {"offload", "auto", "batched"}  # the last: test_batched_steps.py
    assert {name.partition(":")[0] for name in POLICY_NAMES} == set(POLICIES.names()) - elsewhere
    objective, trained, _ = build(tiny_parts, backprop_steps=3, eta=0.7, **settings)
    loss, expected = gradients(objective, trained)
    assert sum(grad.abs().sum() for grad in expected.values()) > 1e-3
    for name in POLICY_NAMES:
        objective.make_plan = make_policy(name).plan
        other_loss, grads = gradients(objective, trained)
        assert torch.equal(other_loss, loss)
        assert grads.keys() == expected.keys()
        assert all(torch.equal(grads[key], expected[key]) for key in expected), name


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_draft_k_conditions_the_prefix_by_the_trained_encoder(tiny_parts, eta):
    objective, trained, original = build(tiny_parts, backprop_steps=2, prefix_encoder="trained", eta=eta)
    naive = Naive(tiny_parts, trained, original, guidance=3.0, eta=eta)
    expected = naive_gradients(trained, -naive.reward(naive.last_steps(2, prefix="trained")[0]).mean())
    assert_same(gradients(objective, trained), expected)


def test_uncond_by_the_original_encoder(tiny_parts):
    objective, trained, original = build(tiny_parts, backprop_steps=2, uncond_encoder="original")
    naive = Naive(tiny_parts, trained, original, guidance=3.0, uncond="original")
    expected = naive_gradients(trained, -naive.reward(naive.last_steps(2)[0]).mean())
    assert_same(gradients(objective, trained), expected)


def test_alignprop_truncates_every_trajectory_at_random(tiny_parts):
    settings = {"backprop_steps": 3, "truncation": "random", "truncation_std": 1.5, "prefix_encoder": "trained"}
    objective, trained, original = build(tiny_parts, policy="step", loss_scale=0.01, **settings)
    naive = Naive(tiny_parts, trained, original, guidance=3.0)
    seeds = [random.Random(sample_seed(SEED, index, 1)) for index in (4, 5)]
    starts = [min(max(round(rng.gauss(T - 3, 1.5)), 0), T - 1) for rng in seeds]
    assert starts[0] != starts[1]
    embeds, (x, _) = naive.embed(trained.model), naive.noise()
    for i, t in enumerate(naive.scheduler.timesteps):  # as its script: everything on the graph, then cut per sample
        e = naive.predict(x, t, embeds)
        e = torch.stack([row if i >= start else row.detach() for row, start in zip(e, starts, strict=True)])
        x = naive.step(e, t, x, None).prev_sample
    ours_loss, ours = gradients(objective, trained)
    expected = naive_gradients(trained, -naive.reward(x).mean())
    assert_same((ours_loss * 100, {n: g * 100 for n, g in ours.items()}), expected)


def test_draft_lv_averages_over_fresh_noisings(tiny_parts):
    objective, trained, original = build(
        tiny_parts, backprop_steps=1, low_variance_draws=3, prefix_encoder="trained", policy="step"
    )
    naive = Naive(tiny_parts, trained, original, guidance=3.0)
    x0, embeds = naive.last_steps(1, prefix="trained")
    rewards, t = [naive.reward(x0).mean()], naive.scheduler.timesteps[-1]
    for extra in (1, 2):
        noise = torch.stack(
            [
                torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(sample_seed(SEED, i, 1000 + extra)))
                for i in (4, 5)
            ]
        )
        x = naive.scheduler.add_noise(x0.detach(), noise, t[None].expand(2))
        rewards.append(naive.reward(naive.step(naive.predict(x, t, embeds), t, x, None).prev_sample).mean())
    assert_same(gradients(objective, trained), naive_gradients(trained, -torch.stack(rewards).mean()))


def test_refl_ends_at_one_random_step(tiny_parts):
    objective, trained, original = build(
        tiny_parts, guidance=1.0, backprop_steps=4, truncation="single", loss="hinge", hinge_margin=2000.0,
        prefix_encoder="trained",
    )  # fmt: skip
    naive = Naive(tiny_parts, trained, original, guidance=1.0)
    ends = set()
    for draw in range(3):
        last = random.Random(sample_seed(SEED, draw, 1)).randrange(T - 4, T)
        ends.add(last)
        embeds, (x, _) = naive.embed(trained.model), naive.noise()
        for i, t in enumerate(naive.scheduler.timesteps[: last + 1]):
            if i < last:
                with torch.no_grad():
                    x = naive.step(naive.predict(x, t, embeds), t, x, None).prev_sample
            else:
                x = naive.step(naive.predict(x, t, embeds), t, x, None).pred_original_sample
        loss = torch.relu(2000.0 - naive.reward(x)).mean()
        assert_same(gradients(objective, trained, draw), naive_gradients(trained, loss))
    assert len(ends) > 1


@pytest.mark.parametrize("policy", ["none", "step"])
def test_drtune_stops_the_gradient_of_inputs(tiny_parts, policy):
    objective, trained, original = build(
        tiny_parts, backprop_steps=2, truncation="spaced", input_grad=False, early_stop_steps=2,
        prefix_encoder="trained", policy=policy,
    )  # fmt: skip
    naive = Naive(tiny_parts, trained, original, guidance=3.0)
    seen = set()
    for draw in range(4):
        rng = random.Random(sample_seed(SEED, draw, 1))
        num_steps = T - rng.randint(0, 2)
        grad_steps = [s for s in range(rng.randrange(T // 2), T, T // 2) if s < num_steps][:2]
        seen.add((num_steps, *grad_steps))
        embeds, (x, _) = naive.embed(trained.model), naive.noise()
        for i, t in enumerate(naive.scheduler.timesteps[:num_steps]):
            e = naive.predict(x.detach(), t, embeds)
            out = naive.step(e if i in grad_steps else e.detach(), t, x, None)
            x = out.pred_original_sample if i == num_steps - 1 else out.prev_sample
        assert_same(gradients(objective, trained, draw), naive_gradients(trained, -naive.reward(x).mean()))
    assert len(seen) > 1


def test_straight_through_clamp_passes_what_the_clamp_stops(tiny_parts):
    tiny_parts.components.vae.decoder.conv_out.weight.data *= 10
    objective, trained, original = build(tiny_parts, backprop_steps=2)
    stopped = gradients(objective, trained)[1]
    objective.model = replace(objective.model, straight_through_clamp=True)
    naive = Naive(tiny_parts, trained, original, guidance=3.0)
    images = naive.vae.decode(naive.last_steps(2)[0] / naive.vae.config.scaling_factor).sample / 2 + 0.5
    passed = images + (images.clamp(0, 1) - images).detach()
    ours = gradients(objective, trained)
    assert_same(ours, naive_gradients(trained, -smooth_reward(passed, PROMPTS).total.mean()))
    assert sum((ours[1][name] - stopped[name]).abs().sum() for name in stopped) > 1e-3


def test_anchor_pulls_the_encoder_back(tiny_parts):
    objective, trained, original = build(tiny_parts, backprop_steps=1, anchor_weight=10.0)
    plain, _, _ = (RewardBackprop(
        objective.text, objective.model, rewards=smooth_reward, make_plan=objective.make_plan,
        settings=BackpropSettings(backprop_steps=1), seed=SEED,
    ), None, None)  # fmt: skip
    with_anchor, without = gradients(objective, trained)[0], gradients(plain, trained)[0]
    ids = objective.text.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    distance = (trained.model(ids).last_hidden_state - original.model(ids).last_hidden_state).square().mean()
    torch.testing.assert_close(with_anchor - without, 10 * distance.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_frozen_parts_get_no_gradient(tiny_parts, train):
    objective, trained, original = build(tiny_parts, backprop_steps=2, train=train, policy="step")
    gradients(objective, trained)
    frozen = [*tiny_parts.components.unet.parameters(), *tiny_parts.components.vae.parameters(), *original.parameters()]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)
    named = dict(trained.named_parameters())
    expected = {n for n in named if "lora" in n} if train == "lora" else set(named)
    assert {n for n, p in named.items() if p.requires_grad} == expected
    assert all(named[n].grad is not None for n in expected)
    assert all(named[n].grad is None for n in named if n not in expected)


def test_gradient_is_zero_outside_the_window(tiny_parts):
    """Only the trained encoder's embedding in the window carries gradient: K = 1 reads it once."""
    objective, trained, _ = build(tiny_parts, backprop_steps=1)
    seen = []
    unet = tiny_parts.components.unet
    unet.register_forward_hook(lambda module, args, out: seen.append(out[0].requires_grad))
    gradients(objective, trained)
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
