"""An objective over the tiny model, built by hand: what is trained of it, and by which method."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fastcraft.diffusion.samplers.ddim import ddim
from fastcraft.families.image_model import ImageModel
from fastcraft.families.unet import UNetNetwork, use_text_kv
from fastcraft.memory.policies import make_policy
from fastcraft.objectives.reward_backprop import BackpropSettings, RewardBackprop
from fastcraft.records import Loss, PromptBatch, RewardOutput
from fastcraft.text.encoder import TextEncoder
from fastcraft.text.prompt_encoder import PromptEncoder
from fastcraft.trained.lora import TEXT_TARGETS, UNET_TARGETS, inject_lora
from fastcraft.trained.trained_set import TrainedPart, TrainedSet, frozen_copy

PROMPTS = ["a red cat", "a blue dog and a red cat"]
INDICES = [4, 5]
SEED = 3
RANK, ALPHA = 2, 4
CPU = torch.device("cpu")


def smooth_reward(images, prompts):
    """Differentiable, own image only, curved enough to tell pictures apart."""
    weight = torch.linspace(-1, 1, images[0].numel()).view(images.shape[1:])
    total = (images * weight).flatten(1).sum(1) + images.square().flatten(1).mean(1)
    return RewardOutput(total=total, parts={"smooth": total})


@dataclass
class Built:
    """``trained`` holds the parts "text" and "unet"; ``original`` is the text encoder from before training."""

    objective: RewardBackprop
    trained: TrainedSet
    original: TextEncoder

    @property
    def text(self) -> nn.Module:
        return self.trained.parts["text"].module


def build(
    parts, *, num_steps=6, policy="none", guidance=3.0, eta=0.0, text="full", unet="frozen", uncond_by="trained",
    prefix_by="original", prefixes=None, rewards=smooth_reward, **settings,
):  # fmt: skip
    """The objective in which ``text`` and ``unet`` are "full", "lora" or "frozen", and differ from what was loaded."""
    components = parts.components
    original = TextEncoder(frozen_copy(components.text_encoder, torch.float32))
    if unet == "lora":
        inject_lora(components.unet, rank=RANK, alpha=ALPHA, targets=UNET_TARGETS)
        use_text_kv(components.unet)
    if text == "lora":
        inject_lora(components.text_encoder, rank=RANK, alpha=ALPHA, targets=TEXT_TARGETS)
    for model, mode in ((components.text_encoder, text), (components.unet, unet)):
        if mode != "lora":
            model.requires_grad_(mode == "full")
    trained = TrainedSet(
        [
            TrainedPart(
                name="text", module=TextEncoder(components.text_encoder), mode=text,
                original=original if text == "full" else None,
            ),
            TrainedPart(name="unet", module=components.unet, mode=unet),
        ]
    )  # fmt: skip
    move_on(trained)
    encoder = PromptEncoder(
        components.tokenizer, trained=partial(trained, "text"), original=trained.original("text"), device=CPU,
        guided=guidance != 1, uncond_by=uncond_by,
    )  # fmt: skip
    model = ImageModel(
        text=encoder, network=UNetNetwork(module=components.unet), vae=components.vae, guidance_scale=guidance,
        latent_shape=components.latent_shape, device=CPU,
        sampler=ddim(components.schedule, num_inference_steps=num_steps, eta=eta),
    )  # fmt: skip
    objective = RewardBackprop(
        model, rewards=rewards, batches=batch_of(PROMPTS, INDICES), samples_per_micro=len(PROMPTS),
        make_plan=make_policy(policy).plan, settings=BackpropSettings(**settings), seed=SEED, prefix_by=prefix_by,
        prefixes=prefixes,
    )  # fmt: skip
    return Built(objective=objective, trained=trained, original=original)


def move_on(trained: TrainedSet) -> None:
    """Change what is trained, as some steps do; ``lora_B`` is no longer zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for part in trained.trained_parts():
            for name, parameter in part.parameters():
                scale = 0.2 if "lora_" in name else 0.05 if part.name == "text" else 0.01
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def batch_of(prompts, indices):
    """An objective's ``batches``: the same prompts and noise, whatever the draw."""
    return lambda first: PromptBatch(prompts=list(prompts), indices=list(indices))


def one_loss(objective: RewardBackprop, *, draw: int = 0) -> Loss:
    """That of one micro-batch, whose truncation is the ``draw``'s."""
    loss, metrics = objective.step(objective._micro(draw))
    return Loss(loss=loss, metrics=metrics)


def gradients_of(model: nn.Module) -> dict[str, Any]:
    """By parameter, a copy of its gradient, where it has one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def flat(grads: dict[str, Any]) -> torch.Tensor:
    return torch.cat([grad.flatten() for grad in grads.values()]).double()


def gradients(objective: RewardBackprop, trained: nn.Module, draw: int = 0):
    """(loss, gradients by name) of one micro-batch."""
    trained.zero_grad()
    loss = one_loss(objective, draw=draw).loss
    loss.backward()
    return loss.detach(), gradients_of(trained)
