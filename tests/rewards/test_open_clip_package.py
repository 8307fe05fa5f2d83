"""The open_clip package itself as the judge of what is read from its files: ``pip install -e ".[open_clip]"``.

The package pulls torchvision, which must fit the build of torch, so the tests' own extra leaves it out.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from fastcraft.rewards.clip_tower import Towers
from fastcraft.rewards.open_clip import load_open_clip

open_clip = pytest.importorskip("open_clip")


def test_the_conversion_equals_open_clip_itself(standins):
    tower = Towers(device="cpu", dtype=torch.float32).clip(
        f"{standins['hpsv2'][0]}/HPS_v2_compressed.pt", head_width=80
    )
    model = open_clip.model.CLIP(
        embed_dim=24,
        vision_cfg={
            "image_size": 32, "layers": 2, "width": 160, "head_width": 80, "patch_size": 8, "mlp_ratio": 0.4
        },
        text_cfg={
            "context_length": 77, "vocab_size": 514, "width": 128, "heads": 2, "layers": 2, "mlp_ratio": 0.5
        },
    ).eval()  # fmt: skip
    content = torch.load(tower.source, weights_only=True)
    model.load_state_dict(content["state_dict"])
    images = torch.rand(2, 3, 32, 32)
    pixels = tower.preprocessed(images, 32, resize="bicubic", clamp=False)
    ids = tower.tokenizer(["a cat", "b"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(
            tower.image_features(images), model.encode_image(pixels, normalize=True), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            tower.text_features(["a cat", "b"]), model.encode_text(ids, normalize=True), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-bigG-14"])
def test_a_published_models_configuration_is_read_off_its_file(name, monkeypatch):
    """At full size, on the meta device: names, shapes, heads, activation, norms and sizes of both halves."""
    with torch.device("meta"):
        theirs = open_clip.model.CLIP(**open_clip.get_model_config(name))

    def on_meta(make, tensors, **options):
        with torch.device("meta"):
            model = make()
        assert {name: tensor.shape for name, tensor in tensors.items()} == {
            name: tensor.shape for name, tensor in model.state_dict().items()
        }
        return model

    monkeypatch.setattr("fastcraft.rewards.open_clip.read_tensors", lambda file, reward: theirs.state_dict())
    monkeypatch.setattr("fastcraft.rewards.open_clip.filled", on_meta)
    config = load_open_clip(Path(f"{name}.pt"), dtype=torch.float32).config
    halves = (config.vision_config, theirs.visual.transformer), (config.text_config, theirs.transformer)
    for half, transformer in halves:
        block = transformer.resblocks[0]
        assert half.num_attention_heads == block.attn.num_heads
        assert half.num_hidden_layers == len(transformer.resblocks)
        assert half.layer_norm_eps == block.ln_1.eps
        assert (half.hidden_act, type(block.mlp.gelu)) == ("gelu", nn.GELU)
    assert (config.vision_config.image_size,) * 2 == theirs.visual.image_size
    assert config.text_config.max_position_embeddings == theirs.context_length
    assert (theirs.text_pool_type, theirs.visual.pool_type) == ("argmax", "tok")
