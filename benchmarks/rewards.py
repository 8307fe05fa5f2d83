"""Reward towers of full size with random weights: ``python -m benchmarks.rewards agreement|cost|patch [--out FILE]``.

``agreement``: scores of pictures in bfloat16 against float32: rank correlation, largest difference, spread; one tower
in memory at a time. ``cost``: forward and backward per picture, as ratios within one run: preprocessing shared or not,
one tower for two rewards or two, text features kept or not. ``patch``: forward and backward of each tower on
transformers' own modules and on the fused ops, taking turns, and how far apart their results are; without a GPU the ops
are plain PyTorch, which rehearses the command and says nothing about the kernels. On a CPU the time is the process's
own, so that other work on the machine weighs little; on a GPU it is the clock's.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcraft.diffusion.patch import Patch
from fastcraft.evaluation.environment import environment
from fastcraft.rewards.affine_head import AffineHead
from fastcraft.rewards.base import Reward
from fastcraft.rewards.clip_score import ClipReward
from fastcraft.rewards.clip_tower import ClipTower
from fastcraft.rewards.hpsv2 import HPSv2Reward
from fastcraft.rewards.imagereward import MAX_TOKENS, BlipTower, ImageRewardReward
from fastcraft.rewards.preprocess import resize_normalize
from fastcraft.rewards.tower import ImageCache
from fastcraft.shapes.render import render
from fastcraft.shapes.scenes import sample_scene

TOWERS = ("clip-l", "clip-h", "blip-l")
VOCABULARY = {"clip": 49408, "blip": 30524}


class FixedTokens:
    """A tokenizer whose every text is the same length of ids; what they are changes nothing here."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length

    def __call__(self, texts: list[str], **options: Any) -> Any:
        from transformers import BatchEncoding

        ids = torch.arange(1, self.length + 1).expand(len(texts), -1).clone()
        ids[:, -1] = self.vocabulary - 1
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Unit gain in every layer, so that features tell pictures apart; the usual initialisation makes all look alike."""
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() or name == "logit_scale" or name.endswith("bias"):
            continue
        fan_in = parameter.numel() / parameter.shape[0] if "embedding" not in name else 1.0
        parameter.normal_(std=0.3 if "position" in name else max(fan_in, 1.0) ** -0.5)


def make_clip(size: str, *, image_size: int, layers: int, pixels: ImageCache | None = None) -> ClipTower:
    """ViT-L/14 or ViT-H/14 with its text half, float32."""
    from transformers import CLIPConfig, CLIPModel

    large = size == "clip-l"
    text = {
        "vocab_size": VOCABULARY["clip"], "hidden_size": 768 if large else 1024,
        "intermediate_size": 3072 if large else 4096, "num_hidden_layers": layers or (12 if large else 24),
        "num_attention_heads": 12 if large else 16, "eos_token_id": VOCABULARY["clip"] - 1,
        "hidden_act": "quick_gelu" if large else "gelu",
    }  # fmt: skip
    vision = {
        "hidden_size": 1024 if large else 1280, "intermediate_size": 4096 if large else 5120,
        "num_hidden_layers": layers or (24 if large else 32), "num_attention_heads": 16, "patch_size": 14,
        "image_size": image_size, "hidden_act": text["hidden_act"],
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768 if large else 1024))
    randomize(model)
    return ClipTower(model, FixedTokens(VOCABULARY["clip"], 77), source=size, pixels=pixels)


def make_blip(*, image_size: int, layers: int) -> BlipTower:
    """ImageReward's ViT-L/16 and BERT with cross-attention, float32."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers or 24, num_attention_heads=16,
            patch_size=16, image_size=image_size // 16 * 16, layer_norm_eps=1e-6,
        )
    )  # fmt: skip
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=VOCABULARY["blip"], hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072,
            num_hidden_layers=layers or 12, num_attention_heads=12, is_decoder=True,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    randomize(vision)
    randomize(text)
    return BlipTower(vision, text, FixedTokens(VOCABULARY["blip"], MAX_TOKENS), source="blip-l")


def make_reward(tower: str, *, image_size: int, layers: int) -> Reward:
    """The reward that the tower is known for."""
    torch.manual_seed(0)
    if tower == "blip-l":
        head = AffineHead(vector=torch.randn(768) * 768**-0.5, bias=torch.zeros(()), source="random")
        return ImageRewardReward(make_blip(image_size=image_size, layers=layers), head)
    clip = make_clip(tower, image_size=image_size, layers=layers)
    return ClipReward(clip) if tower == "clip-l" else HPSv2Reward(clip)


def pictures(number: int) -> Tensor:
    """``(N, 3, 64, 64)`` scenes of one to three objects; every tower enlarges them to its size."""
    return render([sample_scene(random.Random(i), num_things=1 + i % 3) for i in range(number)])


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation of two ``(N,)`` tensors."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (first, second)])
    return torch.corrcoef(ranks)[0, 1].item()


@torch.no_grad()
def agreement(tower: str, *, number: int, image_size: int, layers: int, device: torch.device) -> dict[str, Any]:
    """bfloat16 against float32 on the same pictures and weights."""
    reward = make_reward(tower, image_size=image_size, layers=layers).to(device)
    images = pictures(number).to(device)
    scores = []
    for dtype in (torch.float32, torch.bfloat16):
        reward.tower.to(dtype)  # the head stays in float32
        scores.append(torch.cat([reward(images[i : i + 1], ["a"]) for i in range(number)]).cpu())
    exact, rough = scores
    return {
        "rank_correlation": spearman(exact, rough),
        "largest_difference": (exact - rough).abs().max().item(),
        "std_of_scores": exact.std().item(),
        "num_images": number,
        "image_size": image_size,
        "parameters": sum(parameter.numel() for parameter in reward.parameters()),
    }


def cost(*, image_size: int, layers: int, rounds: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Two rewards on ViT-L/14 from one 512-px picture: seconds by case, and the ratios that they stand for."""
    torch.manual_seed(0)
    shared, own = ImageCache(), ImageCache()
    tower = make_clip("clip-l", image_size=image_size, layers=layers, pixels=shared).to(device, dtype)
    second, apart = (ClipTower(tower.model, tower.tokenizer, source="", pixels=cache) for cache in (shared, own))
    images = torch.rand(1, 3, 512, 512, device=device, requires_grad=True)

    def score(*towers: ClipTower, keep_text: bool = True) -> None:
        if not keep_text:
            towers[0]._text.clear()
        blocks = [each.shared_images() for each in towers]
        for block in blocks:
            block.__enter__()
        total = sum(ClipReward(each)(images, ["a"]).sum() for each in towers)
        for block in blocks:
            block.__exit__(None, None, None)
        torch.autograd.grad(total, images)

    def preprocess() -> None:
        torch.autograd.grad(resize_normalize(images, image_size).sum(), images)

    cases: dict[str, Callable[[], None]] = {
        "two towers, preprocessing shared": lambda: score(tower, second),
        "two towers, preprocessing twice": lambda: score(tower, apart),
        "one tower for both": lambda: score(tower, tower),
        "one tower for both, text every time": lambda: score(tower, tower, keep_text=False),
        "preprocessing alone": preprocess,
    }
    seconds = measure(cases, rounds=rounds, device=device)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    names = list(cases)
    return {
        "seconds": seconds,
        "ratios": {
            "preprocessing twice / shared": middle[names[1]] / middle[names[0]],
            "two towers / one shared": middle[names[0]] / middle[names[2]],
            "text every time / kept": middle[names[3]] / middle[names[2]],
            "preprocessing alone / one tower": middle[names[4]] / middle[names[2]],
        },
        "image_size": image_size,
        "dtype": str(dtype),
    }


def patch(
    tower: str, *, batch: int, image_size: int, layers: int, rounds: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Transformers' own modules against the fused ops: seconds, peak memory on CUDA, largest difference of the scores
    and cosine of the two gradients at the pictures.
    """
    reward = make_reward(tower, image_size=image_size, layers=layers).to(device)
    reward.tower.to(dtype)
    images = pictures(batch).to(device).requires_grad_()
    results: dict[str, list[Tensor]] = {}
    rows: dict[str, Any] = {"seconds": {"plain": [], "patched": []}, "peak_mib": {}}

    def score() -> list[Tensor]:
        scores = reward(images, ["a"] * batch)
        return [scores.detach(), *torch.autograd.grad(scores.sum(), images)]

    for _ in range(rounds):
        for name, block in (("plain", nullcontext()), ("patched", Patch(reward.tower.image_network))):
            with block:
                results[name] = score()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                rows["seconds"][name] += measure({name: score}, rounds=1, device=device)[name]
                if device.type == "cuda":
                    rows["peak_mib"][name] = torch.cuda.max_memory_allocated(device) / 2**20
    (plain, slope), (ours, our_slope) = results["plain"], results["patched"]
    middle = {name: statistics.median(values) for name, values in rows["seconds"].items()}
    return rows | {
        "plain / patched": middle["plain"] / middle["patched"],
        "largest_difference": (plain - ours).abs().max().item(),
        "gradient_cosine": torch.cosine_similarity(slope.flatten(), our_slope.flatten(), dim=0).item(),
        "batch": batch,
        "dtype": str(dtype),
    }


def measure(cases: dict[str, Callable[[], None]], *, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each case, the cases taking turns; a first round is not counted."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            began = clock()
            case()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                seconds[name].append(clock() - began)
    return seconds


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["agreement", "cost", "patch"])
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS), help="for agreement and patch")
    parser.add_argument("--images", type=int, default=64, help="for agreement")
    parser.add_argument("--size", type=int, default=224, help="pixels that the image half sees")
    parser.add_argument("--layers", type=int, default=0, help="0 = full depth; to rehearse on a small machine")
    parser.add_argument("--rounds", type=int, default=5, help="for cost and patch")
    parser.add_argument("--batch", type=int, default=4, help="for patch")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sizes = {"image_size": args.size, "layers": args.layers, "device": device}
    if args.part == "cost":
        rows: dict[str, Any] = cost(rounds=args.rounds, dtype=torch.bfloat16, **sizes)
    elif args.part == "patch":
        timed = {"batch": args.batch, "rounds": args.rounds, "dtype": torch.bfloat16}
        rows = {tower: patch(tower, **timed, **sizes) for tower in args.towers}
    else:
        rows = {tower: agreement(tower, number=args.images, **sizes) for tower in args.towers}
    print(json.dumps(rows, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        flags = "" if args.part == "cost" else f"--towers {' '.join(args.towers)}"
        flags += {"agreement": f" --images {args.images}", "patch": f" --batch {args.batch}"}.get(args.part, "")
        command = f"python -m benchmarks.rewards {args.part} --size {args.size} --layers {args.layers} {flags}".rstrip()
        result = {"command": command, "environment": environment(), "threads": torch.get_num_threads(), "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
