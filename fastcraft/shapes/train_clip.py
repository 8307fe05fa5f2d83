"""Train the two CLIPs: one whose text half conditions the pipeline, and one that is the reward.

The first never meets a wrong caption that differs from the right one in a word or two, so it learns which words a
picture deserves and little about which word belongs to which object: the habit of real CLIP. The second is trained with
such captions.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, normalize
from transformers import CLIPModel, CLIPTokenizer

from fastcraft.shapes.aesthetic import AestheticHead, vividness
from fastcraft.shapes.captions import write_long, write_short
from fastcraft.shapes.corpus import Corpus
from fastcraft.shapes.fit import FitPlan, fit
from fastcraft.shapes.negatives import wrong_claims
from fastcraft.shapes.networks import Scale, build_clip

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SHORT_TOKENS = 28
NUM_NEGATIVES = 2
AESTHETIC_WEIGHT = 0.3


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Ids (N, 77), padded and cut as StableDiffusionPipeline does."""
    batch = tokenizer(captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length)
    return torch.tensor(batch["input_ids"])


def embed_images(clip: Any, images: Tensor) -> Tensor:
    """L2-normalised embeddings (B, D) of pictures (B, 3, 64, 64) in [0, 1]."""
    mean, std = images.new_tensor(CLIP_MEAN).view(1, 3, 1, 1), images.new_tensor(CLIP_STD).view(1, 3, 1, 1)
    pooled = clip.vision_model(pixel_values=(images - mean) / std).pooler_output
    return normalize(clip.visual_projection(pooled).float(), dim=1)


def embed_texts(clip: Any, ids: Tensor) -> Tensor:
    """L2-normalised embeddings (B, D) of token ids (B, 77). What follows the first end token plays no part."""
    eos = clip.config.text_config.eos_token_id
    lengths = ids.ne(eos).sum(1) + 1
    embeds = torch.empty(len(ids), clip.config.projection_dim, device=ids.device)
    for rows in (lengths <= SHORT_TOKENS, lengths > SHORT_TOKENS):
        if rows.any():
            part = ids[rows][:, : int(lengths[rows].max())]
            pooled = clip.text_model(input_ids=part).pooler_output
            embeds[rows] = normalize(clip.text_projection(pooled).float(), dim=1)
    return embeds


def _contrast(images: Tensor, texts: Tensor, wrong: Tensor | None, scale: Tensor) -> Tensor:
    """Symmetric cross entropy of (B, D) pairs; each picture also refuses its own wrong captions (B, K, D)."""
    logits = scale * images @ texts.T  # (B, B)
    target = torch.arange(len(images), device=images.device)
    to_text = logits
    if wrong is not None:
        to_text = torch.cat([logits, scale * torch.einsum("bd,bkd->bk", images, wrong)], dim=1)
    return 0.5 * (cross_entropy(to_text, target) + cross_entropy(logits.T, target))


def train_text_encoder(
    corpus: Corpus, tokenizer: CLIPTokenizer, scale: Scale, folder: Path, *, device: str, autocast: bool, seed: int = 2
) -> tuple[CLIPModel, list[float]]:
    """Train a CLIP on pictures and captions alone. Only its text half is kept; its patches are coarse to save time."""
    torch.manual_seed(seed)
    clip: Any = build_clip(scale, tokenizer, patch_size=16)
    clip.to(device)
    clip.set_attn_implementation("eager")
    ids = tokenize(tokenizer, corpus.captions)

    def loss_at(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(ids), (scale.clip_batch,), generator=generator)
        images = embed_images(clip, corpus.batch(rows).to(device))
        return _contrast(images, embed_texts(clip, ids[rows].to(device)), None, clip.logit_scale.exp().clamp(max=100.0))

    plan = FitPlan(name="text", steps=scale.clip_steps, learning_rate=1e-3, seed=seed, autocast=autocast)
    losses = fit(clip, loss_at, plan, folder)
    clip.set_attn_implementation("sdpa")
    return clip, losses


def _wrong_captions(corpus: Corpus, seed: int) -> list[str]:
    """`NUM_NEGATIVES` wrong captions for each right one, in the same form."""
    rng = random.Random(seed)
    written = []
    for caption, claims in zip(corpus.captions, corpus.claims, strict=True):
        for _ in range(NUM_NEGATIVES):
            wrong = wrong_claims(rng, claims, swap=0.6, turn=0.5)
            written.append(write_long(rng, wrong) if caption.endswith(".") else write_short(rng, wrong))
    return written


def _disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """What decoded pictures may look like: half blurred, all noisy, contrast from 0.5 to 1.4 of what it was."""
    size = (len(images), 1, 1, 1)
    blurred = torch.rand(size, generator=generator) < 0.5
    images = torch.where(blurred, avg_pool2d(images, 3, 1, 1, count_include_pad=False), images)
    contrast = torch.empty(size).uniform_(0.5, 1.4, generator=generator)
    noise = 0.03 * torch.rand(size, generator=generator) * torch.randn(images.shape, generator=generator)
    return (0.5 + (images - 0.5) * contrast + noise).clamp(0.0, 1.0)


class RewardModel(nn.Module):
    """The reward CLIP and its aesthetic head, trained together."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip
        self.head = AestheticHead(clip.config.projection_dim)


def train_reward(
    corpus: Corpus, tokenizer: CLIPTokenizer, scale: Scale, folder: Path, *, device: str, autocast: bool, seed: int = 3
) -> tuple[RewardModel, list[float]]:
    """Train a CLIP against wrong captions, and with it the head that predicts `aesthetic.vividness`."""
    torch.manual_seed(seed)
    model: Any = RewardModel(build_clip(scale, tokenizer, patch_size=8)).to(device)
    model.clip.set_attn_implementation("eager")
    ids = tokenize(tokenizer, corpus.captions)
    wrong_ids = tokenize(tokenizer, _wrong_captions(corpus, seed)).view(len(ids), NUM_NEGATIVES, -1)
    typical = vividness(corpus.batch(torch.arange(min(1000, len(ids)))))
    with torch.no_grad():
        model.head.layers[-1].bias.fill_(float(typical.mean()))

    def loss_at(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(ids), (scale.reward_batch,), generator=generator)
        pictures = _disturb(corpus.batch(rows), generator).to(device)
        images = embed_images(model.clip, pictures)
        texts = embed_texts(model.clip, torch.cat([ids[rows], wrong_ids[rows].flatten(0, 1)]).to(device))
        right, wrong = texts[: len(rows)], texts[len(rows) :].view(len(rows), NUM_NEGATIVES, -1)
        error = (model.head(images).float() - vividness(pictures)).square().mean() / float(typical.var())
        logit_scale = model.clip.logit_scale.exp().clamp(max=100.0)
        return _contrast(images, right, wrong, logit_scale) + AESTHETIC_WEIGHT * error

    losses: list[float] = []
    for number, cycle in enumerate(scale.reward_cycles):
        plan = FitPlan(
            name=f"reward_{number}",
            steps=cycle.steps,
            horizon=cycle.horizon,
            learning_rate=cycle.learning_rate,
            seed=seed + 10 * number,
            autocast=autocast,
            ema_decay=0.995,
        )
        losses += fit(model.requires_grad_(True), loss_at, plan, folder)
    model.clip.set_attn_implementation("sdpa")
    return model, losses
