"""Make the miniature world's weights again: `python -m fastcraft.shapes.pretrain [--out DIR] [--scale tiny|full]`.

Five stages, each resumable: `vae`, `text` (the pipeline's text encoder), `unet` (on that encoder, frozen), `joint` (the
two together) and `reward`. A finished stage is read back from `DIR/work/`; one that was interrupted goes on from its
last checkpoint. `DIR/pipeline` and `DIR/reward` are written when their stages are done, and `--exam` prints the table
of what the models can do.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer

from fastcraft.shapes.corpus import Corpus, draw_corpus
from fastcraft.shapes.export import export_pipeline, export_reward, text_half
from fastcraft.shapes.networks import SCALES, Scale, build_clip, build_unet, build_vae
from fastcraft.shapes.tokens import save_tokenizer
from fastcraft.shapes.train_clip import RewardModel, train_reward, train_text_encoder
from fastcraft.shapes.train_unet import Denoiser, train_joint, train_unet
from fastcraft.shapes.train_vae import train_vae

STAGES = ("vae", "text", "unet", "joint", "reward")
CORPUS_SEED = 0


class Pretraining:
    """The stages of one run and the files between them."""

    def __init__(self, out: Path, scale: Scale, *, device: str, autocast: bool) -> None:
        self.out, self.work, self.scale, self.device, self.autocast = out, out / "work", scale, device, autocast
        save_tokenizer(self.work / "tokenizer")
        self.tokenizer = CLIPTokenizer.from_pretrained(self.work / "tokenizer")
        self._corpus: Corpus | None = None

    @property
    def corpus(self) -> Corpus:
        if self._corpus is None:
            self._corpus = draw_corpus(self.scale.num_pictures, seed=CORPUS_SEED)
        return self._corpus

    def is_done(self, stage: str) -> bool:
        return (self.work / f"{stage}.pt").exists()

    def _load(self, stage: str) -> dict[str, Any]:
        return torch.load(self.work / f"{stage}.pt", weights_only=True, map_location=self.device)

    def _built(self, stage: str) -> Any:
        """The network of a finished stage, in evaluation mode."""
        state = self._load(stage)
        network: Any
        if stage == "vae":
            network = build_vae(self.scale)
            network.register_to_config(scaling_factor=state["scaling_factor"])
        elif stage == "unet":
            network = build_unet(self.scale)
        elif stage == "text":
            network = build_clip(self.scale, self.tokenizer, patch_size=16)
        elif stage == "joint":
            encoder = text_half(build_clip(self.scale, self.tokenizer, patch_size=16))
            network = Denoiser(encoder, build_unet(self.scale))
        else:
            network = RewardModel(build_clip(self.scale, self.tokenizer, patch_size=8))
        network.load_state_dict(state["network"])
        return network.to(self.device).eval().requires_grad_(False)

    def run(self, stage: str) -> list[float]:
        """Train one stage unless it is done. Returns the loss of every step."""
        if self.is_done(stage):
            return list(self._load(stage)["losses"])
        started = time.perf_counter()
        both: dict[str, Any] = {"device": self.device, "autocast": self.autocast}
        network: Any
        if stage == "vae":
            network, losses = train_vae(self.corpus, self.scale, self.work, device=self.device)
        elif stage == "text":
            network, losses = train_text_encoder(self.corpus, self.tokenizer, self.scale, self.work, **both)
        elif stage == "reward":
            network, losses = train_reward(self.corpus, self.tokenizer, self.scale, self.work, **both)
        else:
            network, losses = self._train_denoiser(stage)
        done = {"network": network.state_dict(), "losses": losses}
        if stage == "vae":
            done["scaling_factor"] = network.config.scaling_factor
        torch.save(done, self.work / f"{stage}.pt")
        print(f"{stage} done in {(time.perf_counter() - started) / 60.0:.1f} min", flush=True)
        return losses

    def _train_denoiser(self, stage: str) -> tuple[Any, list[float]]:
        for needed in STAGES[: STAGES.index(stage)]:
            if not self.is_done(needed):
                raise ValueError(f"stages must train {needed} before {stage}, which needs it, got no {needed}.pt")
        vae, encoder = self._built("vae"), text_half(self._built("text"))
        shared = (self.tokenizer, self.scale, self.work)
        if stage == "unet":
            return train_unet(self.corpus, vae, encoder.to(vae.device), *shared, autocast=self.autocast)
        denoiser = Denoiser(encoder, self._built("unet")).to(vae.device)
        return train_joint(self.corpus, vae, denoiser, *shared, autocast=self.autocast)

    def export(self) -> None:
        """Write the folders whose stages are done."""
        if all(self.is_done(stage) for stage in ("vae", "text", "unet", "joint")):
            denoiser = self._built("joint")
            export_pipeline(self.out / "pipeline", self._built("vae"), denoiser.encoder, denoiser.unet, self.tokenizer)
        if self.is_done("reward"):
            export_reward(self.out / "reward", self._built("reward"))


def main(arguments: list[str] | None = None) -> None:
    """Run the stages, write the folders, and print the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("shapes_weights"), help="folder to write to")
    parser.add_argument("--scale", choices=tuple(SCALES), default="full")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"comma-separated, of {', '.join(STAGES)}")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of all stages but the vae")
    parser.add_argument("--exam", action="store_true", help="print what the models can do, from --out")
    options = parser.parse_args(arguments)
    stages = [stage for stage in options.stages.split(",") if stage]
    if unknown := set(stages) - set(STAGES):
        raise ValueError(f"stages must be of {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Pretraining(options.out, SCALES[options.scale], device=device, autocast=options.precision == "bf16")
    for stage in STAGES:
        if stage in stages:
            run.run(stage)
    run.export()
    if options.exam:
        from fastcraft.shapes.examine import examine, to_markdown

        print(to_markdown(examine(options.out)))


if __name__ == "__main__":
    main()
