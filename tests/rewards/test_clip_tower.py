"""The shared CLIP model: right features, computed once, and nothing half loaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

from fastcraft.errors import UserError
from fastcraft.rewards.clip_score import ClipReward
from fastcraft.rewards.clip_tower import ClipTower, Towers


@pytest.fixture
def tower(bundled):
    return load(bundled)


def count_calls(module):
    """A list that grows by one at every forward of ``module``."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_score_is_the_cosine_of_transformers_features(tower, bundled):
    images, prompts = torch.rand(3, 3, 32, 32), ["a red cube", "", "猫 🐱 on a mat"]
    model, tokenizer = CLIPModel.from_pretrained(bundled), CLIPTokenizer.from_pretrained(bundled)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        matrix = model(pixel_values=pixels, **tokens).logits_per_image / model.logit_scale.exp()
    scores = ClipReward(tower, scale=100.0)(images, prompts)
    assert matrix.std() > 0.02, "the test model must tell the pairs apart"
    torch.testing.assert_close(scores, 100 * matrix.diag(), rtol=1e-4, atol=1e-3)


def test_prefix_goes_before_the_prompt(tower):
    images = torch.rand(1, 3, 32, 32)
    with_prefix = ClipReward(tower, prefix="A photo depicts ")(images, ["a cat"])
    assert torch.equal(with_prefix, ClipReward(tower)(images, ["A photo depicts a cat"]))
    assert not torch.equal(with_prefix, ClipReward(tower)(images, ["a cat"]))


def test_text_is_encoded_once_per_prompt(tower):
    calls = count_calls(tower.model.text_model)
    first = tower.text_features(["a", "b", "a"])
    assert len(calls) == 2
    again = tower.text_features(["b", "a"])
    assert len(calls) == 2
    assert torch.equal(first[[1, 0]], again)
    assert not first.requires_grad


def test_text_cache_forgets_the_least_recent(bundled):
    loaded = load(bundled)
    tower = ClipTower(loaded.model, loaded.tokenizer, source="", max_cached_prompts=2)
    calls = count_calls(tower.model.text_model)
    assert tower.text_features(["a", "b", "c", "d"]).shape == (4, 24), "more prompts than the cache holds"
    tower.text_features(["c", "e"])  # c is now older than e, d is gone
    assert len(calls) == 5
    tower.text_features(["c", "e"])
    assert len(calls) == 5
    tower.text_features(["d"])
    assert len(calls) == 6


def test_text_cache_knows_the_dtype(tower):
    exact = tower.text_features(["a cat"])
    rounded = tower.to(torch.bfloat16).text_features(["a cat"])
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0, atol=0.1)


def test_features_made_in_inference_mode_serve_training(tower):
    with torch.inference_mode():
        ClipReward(tower)(torch.rand(1, 3, 32, 32), ["a cat"])
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    ClipReward(tower)(images, ["a cat"]).sum().backward()
    assert images.grad.abs().sum() > 0


def test_images_are_shared_only_inside_the_block(tower):
    calls = count_calls(tower.model.vision_model)
    images, other = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    with tower.shared_images():
        first = tower.image_features(images)
        assert torch.equal(tower.image_features(images), first)
        assert len(calls) == 1
        tower.image_features(images, resize="area")
        assert len(calls) == 2
        assert not torch.equal(tower.image_features(other), first)
        assert len(calls) == 3
    tower.image_features(images)
    assert len(calls) == 4


def test_features_without_gradient_never_replace_those_with(tower):
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    with tower.shared_images():
        with torch.no_grad():
            assert not tower.image_features(images).requires_grad
        assert tower.image_features(images).requires_grad


def test_one_path_is_loaded_once(bundled, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(bundled)
    towers = Towers(device="cpu", dtype=torch.bfloat16, bundled=bundled)
    assert towers.clip("shapes") is towers.clip(str(bundled)) is towers.clip(str(link))
    assert towers.clip("shapes").dtype == torch.bfloat16


def test_long_prompts_are_cut(tower):
    assert torch.isfinite(tower.text_features(["word " * 500])).all()


def load(folder, **options):
    return Towers(device="cpu", dtype=torch.float32).clip(str(folder), **options)


def edit_weights(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file, **changes):
    content = json.loads(file.read_text())
    for key, value in changes.items():
        node, *rest = key.split("__")
        target = content[node] if rest else content
        target[rest[0] if rest else node] = value
    file.write_text(json.dumps(content))


DAMAGES = {
    "missing weight": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.pop("visual_projection.weight")),
        "missing: visual_projection.weight; unexpected: none",
    ),
    "unknown weight": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.update(extra=torch.ones(1))),
        "missing: none; unexpected: extra; of another shape",
    ),
    "another shape": (
        lambda folder: edit_weights(
            folder, lambda tensors: tensors.update({"text_projection.weight": torch.ones(3, 3)})
        ),
        "of another shape than its config's: text_projection.weight",
    ),
    "half matching": (
        lambda folder: edit_weights(
            folder, lambda tensors: tensors.update(extra=tensors.pop("visual_projection.weight"), other=torch.ones(1))
        ),
        "missing: visual_projection.weight; unexpected: extra, other; of another shape than its config's: none",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "has no weights: neither model.safetensors nor pytorch_model.bin",
    ),
    "no pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "cannot load a CLIPModel from",
    ),
    "cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"),
        "cannot load a CLIPModel from",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "has no tokenizer: neither tokenizer.json nor vocab.json",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "cannot load a CLIPModel from"),
    "another model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
        "must hold a CLIPModel, got model type 'bert'",
    ),
    "another end mark": (
        lambda folder: edit_json(folder / "config.json", text_config__eos_token_id=17),
        "pools at token 17, but its tokenizer ends a text with 513",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refuses_what_is_half_right(damage, copied):
    do_damage, message = DAMAGES[damage]
    do_damage(copied)
    with pytest.raises(UserError) as error:
        load(copied)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_old_position_ids_are_no_mistake(copied):
    edit_weights(copied, lambda tensors: tensors.update({"text_model.embeddings.position_ids": torch.arange(77)[None]}))
    assert load(copied).width == 24


@pytest.mark.parametrize("path", ["/nowhere/clip", "./nowhere", "a/b/c", "nowhere.pt", ""])
def test_a_mistyped_folder_is_not_looked_up_on_the_hub(path):
    with pytest.raises(UserError, match="must be a folder with a CLIPModel, a file of open_clip or a hub id"):
        load(path)


def test_loading_leaves_the_logging_of_transformers_alone(bundled):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(bundled)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
