"""The tiny pretraining: every stage learns, stops and goes on, and the folders load with stock classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastcraft.shapes.fit import FitPlan, fit
from fastcraft.shapes.networks import SCALES
from fastcraft.shapes.pretrain import STAGES, Pretraining, main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Pretraining:
    out = tmp_path_factory.mktemp("tiny")
    main(["--scale", "tiny", "--out", str(out), "--precision", "fp32"])
    return Pretraining(out, SCALES["tiny"], device="cpu", autocast=False)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_learns(run: Pretraining, stage: str) -> None:
    losses = run.run(stage)
    assert len(losses) == (6 if stage == "joint" else 12)
    if stage != "joint":
        assert sum(losses[-3:]) < sum(losses[:3])


def test_the_folders_load_and_make_a_picture(run: Pretraining) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(run.out / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a red circle", num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 64, 64)
    assert images.isfinite().all()
    assert 0.0 < pipeline.vae.config.scaling_factor != 1.0


def test_unet_needs_the_stages_before_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stages must train vae before unet"):
        main(["--scale", "tiny", "--out", str(tmp_path), "--stages", "unet"])
    with pytest.raises(ValueError, match="stages must be of vae, text, unet, joint, reward, got clip"):
        main(["--scale", "tiny", "--out", str(tmp_path), "--stages", "vae,clip"])


def test_no_configuration_names_a_path(run: Pretraining) -> None:
    for file in run.out.rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert "_name_or_path" not in json.loads(text)
        assert str(run.out) not in text


def test_a_resumed_fit_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    def train(folder: Path, interrupt_at: int | None) -> nn.Module:
        torch.manual_seed(0)
        module, calls = nn.Linear(3, 1), 0

        def loss_at(generator: torch.Generator) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == interrupt_at:
                raise KeyboardInterrupt
            inputs = torch.randn(8, 3, generator=generator)
            return (module(inputs)[:, 0] - inputs.sum(1)).square().mean()

        plan = FitPlan(name="line", steps=20, learning_rate=0.05, seed=1, ema_decay=0.9, checkpoint_every=5)
        fit(module, loss_at, plan, folder)
        return module

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", 13)
    whole, resumed = train(tmp_path / "a", None), train(tmp_path / "b", None)
    assert torch.equal(whole.weight, resumed.weight)
    assert not whole.weight.requires_grad
