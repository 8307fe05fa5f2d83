"""The shipped weights: small, in the formats of real checkpoints, and as good as promised."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from fastcraft.shapes.examine import WEIGHTS, examine_pipeline, examine_reward, generate

MAX_BYTES = 25_000_000


def test_they_fit_into_the_budget() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < MAX_BYTES


def test_they_are_in_half_precision_and_the_keys_are_the_expected_ones() -> None:
    files = sorted(WEIGHTS.rglob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"F16"}  # noqa: SIM118
    with safe_open(WEIGHTS / "pipeline" / "text_encoder" / "model.safetensors", framework="pt") as tensors:
        assert all(key.startswith("text_model.") for key in tensors.keys())  # noqa: SIM118
    with safe_open(WEIGHTS / "reward" / "aesthetic.safetensors", framework="pt") as tensors:
        expected = {f"layers.{index}.{part}" for index in (0, 2, 4, 6, 7) for part in ("weight", "bias")}
        assert set(tensors.keys()) == expected


def test_no_configuration_names_a_path() -> None:
    for file in WEIGHTS.rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert "_name_or_path" not in text
        assert "/tmp" not in text
        json.loads(text)


def test_text_ids_are_the_tokenizers() -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "pipeline" / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(WEIGHTS / "pipeline" / "text_encoder", dtype=torch.float32)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(encoder.config, name) for name in ids] == [getattr(tokenizer, name) for name in ids]
    assert encoder.config.max_position_embeddings == tokenizer.model_max_length == 77


def test_the_aesthetic_head_passes_its_gate() -> None:
    assert examine_reward(WEIGHTS / "reward")["aesthetic_correlation"] >= 0.90


def test_the_reward_clip_passes_its_gate() -> None:
    assert examine_reward(WEIGHTS / "reward")["retrieval_top1"] >= 0.80


def test_the_pipeline_obeys_a_prompt() -> None:
    captions = ["a large red circle on a white background", "a large red circle on a black background"]
    images = generate(WEIGHTS / "pipeline", captions, guidance_scale=7.5, num_inference_steps=10)
    assert images.shape == (2, 3, 64, 64)
    assert images[0].mean() > images[1].mean() + 0.2


@pytest.mark.slow
def test_the_pipeline_is_good_but_not_too_good() -> None:
    table = examine_pipeline(WEIGHTS / "pipeline", guidance_scale=7.5, limit=60)
    assert 0.60 <= table["held_out_one"]["fully_right"] <= 1.0
    assert 0.15 <= table["held_out_two"]["fully_right"] <= 0.85
