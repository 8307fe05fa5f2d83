"""Denoising chains written as the papers write them: stock UNet, stock scheduler, plain autograd, no trick."""

import copy

import torch
from diffusers import DDIMScheduler
from peft import LoraConfig, inject_adapter_in_model

from fastcraft.data.order import sample_seed
from fastcraft.trained.lora import TEXT_TARGETS, UNET_TARGETS
from tests.objectives.build import ALPHA, INDICES, PROMPTS, RANK, SEED, smooth_reward


def stock_copy(plain, ours, *, mode, targets):
    """A copy of ``plain`` with the weights of ``ours``, its adapters being PEFT's, and the same ones trained."""
    model = copy.deepcopy(plain)
    if mode == "lora":
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets)), model)
    weights = dict(ours.named_parameters())
    for name, parameter in model.named_parameters():
        weight = weights.pop(our_name(name))
        parameter.data.copy_(weight.data)
        parameter.requires_grad_(weight.requires_grad)
    assert not weights
    return model


def our_name(name):
    """Of a parameter, from PEFT's name."""
    return name.replace(".base_layer.", ".base.").replace(".default.", ".")


class Naive:
    """Loops over stock classes, with copies of what ``built`` trains."""

    def __init__(self, parts, built, *, guidance=3.0, eta=0.0, uncond="trained", uncond_grad=True, num_steps=6):
        modes = {name: part.mode for name, part in built.trained.parts.items()}
        self.trained = stock_copy(built.original.model, built.text.model, mode=modes["text"], targets=TEXT_TARGETS)
        self.unet = stock_copy(parts.stock, parts.components.unet, mode=modes["unet"], targets=UNET_TARGETS)
        self.vae, self.tokenizer = parts.components.vae, parts.components.tokenizer
        self.original, self.uncond, self.uncond_grad = built.original.model, uncond, uncond_grad
        self.guidance, self.eta, self.num_steps = guidance, eta, num_steps
        self.scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1,
            clip_sample=False, timestep_spacing="trailing",
        )  # fmt: skip
        self.scheduler.set_timesteps(num_steps)
        self.timesteps = self.scheduler.timesteps

    def embed(self, encoder):
        def encode(model, texts):
            ids = self.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            return model(ids.input_ids).last_hidden_state

        uncond = encode(self.original if self.uncond == "original" else encoder, [""] * len(PROMPTS))
        return torch.cat([uncond, encode(encoder, PROMPTS)])

    def noise(self):
        generators = [torch.Generator().manual_seed(sample_seed(SEED, i)) for i in INDICES]
        draws = [[torch.randn(4, 8, 8, generator=g) for g in generators] for _ in range(1 + self.num_steps)]
        return torch.stack(draws[0]), [torch.stack(d) for d in draws[1:]]

    def predict(self, x, t, embeds):
        if self.guidance == 1:
            return self.unet(x, t, encoder_hidden_states=embeds[len(PROMPTS) :]).sample
        e_u, e_c = self.unet(torch.cat([x, x]), t, encoder_hidden_states=embeds).sample.chunk(2)
        if not self.uncond_grad:
            e_u = e_u.detach()
        return e_u + self.guidance * (e_c - e_u)

    def step(self, e, t, x, noise):
        return self.scheduler.step(e, t, x, eta=self.eta, variance_noise=noise if self.eta else None)

    def reward(self, latents):
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return smooth_reward((images / 2 + 0.5).clamp(0, 1), PROMPTS).total

    def last_steps(self, depth, prefix="original", input_grad=True):
        """TextCraftor Alg. 1 and, with ``prefix`` trained, DRaFT-K and AlignProp."""
        embeds = self.embed(self.trained)
        early = (self.embed(self.original) if prefix == "original" else embeds).detach()
        x, noises = self.noise()
        for i, t in enumerate(self.timesteps):
            if i < self.num_steps - depth:
                with torch.no_grad():
                    x = self.step(self.predict(x, t, early), t, x, noises[i]).prev_sample
            else:
                e = self.predict(x if input_grad else x.detach(), t, embeds)
                x = self.step(e, t, x, noises[i]).prev_sample
        return x, embeds

    def from_starts(self, starts):
        """AlignProp's script: everything on the graph, then cut per sample."""
        embeds, (x, _) = self.embed(self.trained), self.noise()
        for i, t in enumerate(self.timesteps):
            e = self.predict(x, t, embeds)
            e = torch.stack([row if i >= start else row.detach() for row, start in zip(e, starts, strict=True)])
            x = self.step(e, t, x, None).prev_sample
        return x

    def noised_again(self, draws, prefix="trained"):
        """DRaFT-LV: the reward of the trajectory's end and of ``draws`` - 1 more noisings of it."""
        x0, embeds = self.last_steps(1, prefix=prefix)
        rewards, t = [self.reward(x0).mean()], self.timesteps[-1]
        for extra in range(1, draws):
            seeds = [sample_seed(SEED, i, 1000 + extra) for i in INDICES]
            noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
            x = self.scheduler.add_noise(x0.detach(), noise, t[None].expand(2))
            rewards.append(self.reward(self.step(self.predict(x, t, embeds), t, x, None).prev_sample).mean())
        return torch.stack(rewards).mean()

    def up_to(self, last):
        """ReFL: no gradient before step ``last``, whose x0 estimate is the end."""
        embeds, (x, _) = self.embed(self.trained), self.noise()
        for i, t in enumerate(self.timesteps[: last + 1]):
            if i < last:
                with torch.no_grad():
                    x = self.step(self.predict(x, t, embeds), t, x, None).prev_sample
            else:
                x = self.step(self.predict(x, t, embeds), t, x, None).pred_original_sample
        return x

    def spaced(self, num_steps, grad_steps, input_grad=False):
        """DRTune: predictions at ``grad_steps`` carry gradient; the x0 estimate of the last step is the end."""
        embeds, (x, _) = self.embed(self.trained), self.noise()
        for i, t in enumerate(self.timesteps[:num_steps]):
            e = self.predict(x if input_grad else x.detach(), t, embeds)
            out = self.step(e if i in grad_steps else e.detach(), t, x, None)
            x = out.pred_original_sample if i == num_steps - 1 else out.prev_sample
        return x

    def gradients(self, loss):
        """(loss, gradients by our names)."""
        models = {"text.model": self.trained, "unet": self.unet}
        for model in models.values():
            model.zero_grad()
        loss.backward()
        return loss.detach(), {
            f"{part}.{our_name(name)}": p.grad.clone()
            for part, model in models.items()
            for name, p in model.named_parameters()
            if p.grad is not None
        }


def assert_same(ours, naive):
    """Loss and gradients: all together, each group (a part's weights, its A's, its B's), every parameter by itself."""
    (loss, grads), (plain_loss, plain_grads) = ours, naive
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == plain_grads.keys()
    for group in {"", *(_group(name) for name in grads)}:
        names = [name for name in grads if group in ("", _group(name))]
        a, b = (torch.cat([found[name].flatten() for name in names]).double() for found in (grads, plain_grads))
        assert b.norm() > 1e-4, group
        assert torch.cosine_similarity(a, b, dim=0) > 0.99999, group
        torch.testing.assert_close(a.norm(), b.norm(), rtol=1e-3, atol=0)
        for name in names:  # where almost nothing arrives, that is rounding of what arrives elsewhere
            difference, size = (grads[name] - plain_grads[name]).norm(), plain_grads[name].norm()
            assert difference <= 1e-3 * size + 1e-5 * b.norm(), name


def _group(name):
    return next(
        (f"{name.partition('.')[0]} {factor}" for factor in ("lora_A", "lora_B") if factor in name),
        name.partition(".")[0],
    )
