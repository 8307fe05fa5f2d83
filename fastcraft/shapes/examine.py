"""What the miniature models can and cannot do, measured: `python -m fastcraft.shapes.examine --out FOLDER`.

Four parts: the judge on rendered pictures, the reward CLIP and its aesthetic head, the autoencoder's round trip, and
the pipeline on the held-out captions. The result is JSON and a page of markdown.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from fastcraft.shapes.aesthetic import AestheticHead, vividness
from fastcraft.shapes.captions import parse, sample_claims, write_long, write_short
from fastcraft.shapes.judge import Verdict, judge_all, summarize
from fastcraft.shapes.negatives import are_distinct, change_attribute, turn_relation
from fastcraft.shapes.prompt_sets import load_prompts
from fastcraft.shapes.render import render
from fastcraft.shapes.scenes import Scene, is_held_out, sample_scene
from fastcraft.shapes.train_clip import embed_images, embed_texts, tokenize

WEIGHTS = Path(__file__).parent / "weights"
SEED = 2024
AIMS = (
    "judge, attributes right at least 0.99, false agreement at most 0.05; reward, retrieval at least 0.80, aesthetic "
    "correlation at least 0.90; pipeline, fully right 0.70 to 0.97 with one object and 0.25 to 0.75 with two."
)


def _described(rng: random.Random, count: int) -> tuple[list[Scene], list[str], list[str]]:
    """Scenes, true captions, and captions with one attribute changed so that they are false."""
    scenes: list[Scene] = []
    right: list[str] = []
    wrong: list[str] = []
    while len(scenes) < count:
        num_things = rng.choice((1, 2, 2, 3))
        scene = sample_scene(rng, num_things=num_things, held_out=None)
        claims = sample_claims(rng, scene, detail=0.7, relation=0.7, background=0.7)
        write = write_short if num_things < 3 else write_long
        changed = change_attribute(rng, claims)[0]
        if not are_distinct(changed.things):
            continue  # two objects of one kind cannot be told apart in words
        scenes.append(scene)
        right.append(write(rng, claims))
        wrong.append(write(rng, changed))
    return scenes, right, wrong


def _turned(rng: random.Random, count: int) -> tuple[list[Scene], list[str], list[str]]:
    """Scenes of two objects, captions that say how they lie to each other, and captions that say the opposite."""
    scenes: list[Scene] = []
    right: list[str] = []
    wrong: list[str] = []
    while len(scenes) < count:
        scene = sample_scene(rng, num_things=2, held_out=None)
        claims = sample_claims(rng, scene, relation=1.0)
        if claims.relations:
            scenes.append(scene)
            right.append(write_short(rng, claims))
            wrong.append(write_short(rng, turn_relation(claims, 0)))
    return scenes, right, wrong


def examine_judge(*, count: int = 400, seed: int = SEED) -> dict[str, float]:
    """On rendered truth: share of claims judged right, and of changed captions that are called fully right."""
    scenes, right, wrong = _described(random.Random(seed), count)
    pictures = render(scenes)
    findings = [finding.holds for verdict in judge_all(pictures, right) for finding in verdict.findings]
    agreed = [verdict.fully_right for verdict in judge_all(pictures, wrong)]
    return {"attributes_right": sum(findings) / len(findings), "false_agreement": sum(agreed) / len(agreed)}


def held_out_pictures(*, count: int = 100, seed: int = SEED) -> tuple[Tensor, list[str]]:
    """Rendered pictures (N, 3, 64, 64), with one different caption each, none of them ever trained on."""
    rng = random.Random(seed)
    chosen: dict[str, Scene] = {}
    while len(chosen) < count:
        scene = sample_scene(rng, num_things=rng.choice((1, 2, 2)), held_out=len(chosen) % 4 == 0)
        chosen.setdefault(write_short(rng, sample_claims(rng, scene, detail=0.8, relation=0.8, background=0.8)), scene)
    return render(list(chosen.values())), list(chosen)


@torch.no_grad()
def examine_reward(folder: Path, *, seed: int = SEED) -> dict[str, float]:
    """Retrieval among 100 held-out captions, right against wrong captions, and the aesthetic head against its rule."""
    clip: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    pictures, captions = held_out_pictures(seed=seed)
    images, texts = embed_images(clip, pictures), embed_texts(clip, tokenize(tokenizer, captions))
    retrieved = (images @ texts.T).argmax(1) == torch.arange(len(captions))

    def prefers_right(described: tuple[list[Scene], list[str], list[str]]) -> float:
        scenes, right, wrong = described
        right_texts, wrong_texts = (embed_texts(clip, tokenize(tokenizer, part)) for part in (right, wrong))
        return float(((embed_images(clip, render(scenes)) * (right_texts - wrong_texts)).sum(1) > 0).float().mean())

    head = AestheticHead(clip.config.projection_dim)
    head.load_state_dict({key: value.float() for key, value in load_file(folder / "aesthetic.safetensors").items()})
    pair = torch.stack([head(images), vividness(pictures)])
    return {
        "retrieval_top1": float(retrieved.float().mean()),
        "prefers_right_to_changed_caption": prefers_right(_described(random.Random(seed + 1), 300)),
        "prefers_right_to_turned_relation": prefers_right(_turned(random.Random(seed + 3), 300)),
        "aesthetic_correlation": float(torch.corrcoef(pair)[0, 1]),
    }


@torch.no_grad()
def examine_vae(folder: Path, *, count: int = 100, seed: int = SEED) -> dict[str, float]:
    """The judge on rendered pictures after a round trip through the autoencoder: no generated picture can do better."""
    vae: Any = AutoencoderKL.from_pretrained(folder / "vae").eval()
    scenes, right, _ = _described(random.Random(seed + 2), count)
    decoded = vae.decode(vae.encode(render(scenes) * 2.0 - 1.0).latent_dist.mean).sample
    return summarize(judge_all((decoded / 2.0 + 0.5).clamp(0.0, 1.0), right))


@torch.no_grad()
def generate(
    folder: Path, captions: Sequence[str], *, guidance_scale: float, num_inference_steps: int = 25, seed: int = SEED
) -> Tensor:
    """Pictures (N, 3, 64, 64) of the pipeline in `folder`, DDIM, float32 on the CPU; each has a noise of its own."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(captions), 50):
        part = list(captions[start : start + 50])
        noise = [torch.Generator().manual_seed(seed + start + index) for index in range(len(part))]
        output = pipeline(
            part,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=noise,
            output_type="pt",
        )
        pictures.append(output.images.float().cpu())
    return torch.cat(pictures)


def failures(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Of the pictures that are not fully right, the share with each kind of fault. One picture can have several."""
    wrong = [verdict for verdict in verdicts if not verdict.fully_right]
    faults = Counter(kind for verdict in wrong for kind in {f.kind for f in verdict.findings if not f.holds})
    return {kind: count / len(wrong) for kind, count in faults.most_common()}


def examine_pipeline(folder: Path, *, guidance_scale: float, limit: int | None = None) -> dict[str, Any]:
    """Accuracy on the held-out captions of one and of two objects, with how it fails and on which combinations."""
    table: dict[str, Any] = {}
    for name in ("held_out_one", "held_out_two"):
        captions = load_prompts(name)[:limit]
        verdicts = judge_all(generate(folder, captions, guidance_scale=guidance_scale), captions)
        unseen = [is_held_out(tuple(thing.kind for thing in parse(caption).things)) for caption in captions]
        row: dict[str, Any] = summarize(verdicts)
        for label, flag in (("seen_combinations", False), ("unseen_combinations", True)):
            right = [v.fully_right for v, is_unseen in zip(verdicts, unseen, strict=True) if is_unseen == flag]
            row[f"fully_right_{label}"] = sum(right) / max(1, len(right))
        table[name] = {**row, "share_of_failures": failures(verdicts)}
    return table


def examine(
    weights: Path = WEIGHTS, *, guidance_scales: Sequence[float] = (7.5,), limit: int | None = None
) -> dict[str, Any]:
    """Every part. `limit` shortens the caption sets of the pipeline's part."""
    versions = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    return {
        "versions": {"python": platform.python_version(), **versions},
        "seed": SEED,
        "num_inference_steps": 25,
        "judge": examine_judge(),
        "reward": examine_reward(weights / "reward"),
        "vae": examine_vae(weights / "pipeline"),
        "pipeline": {
            f"{scale:g}": examine_pipeline(weights / "pipeline", guidance_scale=scale, limit=limit)
            for scale in guidance_scales
        },
    }


def to_markdown(table: dict[str, Any]) -> str:
    """The table as a page: one line for each number."""
    lines = ["# What the shapes models can and cannot do", ""]
    lines += [", ".join(f"{name} {version}" for name, version in table["versions"].items())]
    lines += [f"Seed {table['seed']}, DDIM, {table['num_inference_steps']} steps.", ""]
    lines += ["Made again by `python -m fastcraft.shapes.examine --out benchmarks/results/shapes_base`.", ""]
    lines += [f"What was aimed at: {AIMS}", ""]
    for part in ("judge", "reward", "vae"):
        lines += [f"## {part}", "", "| what | value |", "|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {value:.3f} |" for name, value in table[part].items()] + [""]
    for scale, rows in table["pipeline"].items():
        names = sorted({key for row in rows.values() for key in row if key != "share_of_failures"})
        lines += [f"## pipeline, guidance {scale}", "", "| what | one object | two objects |", "|---|---|---|"]
        for name in names:
            cells = [f"{row[name]:.3f}" if name in row else "" for row in rows.values()]
            lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
        lines.append("")
        for label, row in zip(("one object", "two objects"), rows.values(), strict=True):
            faults = ", ".join(f"{kind} {share:.0%}" for kind, share in row["share_of_failures"].items())
            lines += [f"Faults of the failed pictures, {label}: {faults or 'none'}.", ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Examine the shipped weights, or others, and write `exam.json` and `README.md`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with pipeline/ and reward/")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--guidance", type=float, nargs="+", default=[7.5])
    parser.add_argument("--limit", type=int, help="captions of each held-out file; all where not given")
    options = parser.parse_args(arguments)
    table = examine(options.weights, guidance_scales=options.guidance, limit=options.limit)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "exam.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    (options.out / "README.md").write_text(to_markdown(table), encoding="utf-8")
    print(to_markdown(table))


if __name__ == "__main__":
    main()
