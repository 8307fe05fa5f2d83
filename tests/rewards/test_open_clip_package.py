"""The open_clip package itself as the judge of what is read from its files: ``pip install -e ".[open_clip]"``.

The package pulls torchvision, which must fit the build of torch, so the tests' own extra leaves it out.
"""

import gzip
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPTokenizer

from fastcraft.rewards.clean_text import clean_open_clip_text
from fastcraft.rewards.clip_tower import Towers
from fastcraft.rewards.open_clip import load_open_clip
from fastcraft.rewards.preprocess import CLIP_STD, resize_normalize

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


@pytest.fixture(scope="module")
def published_vocabulary(tmp_path_factory):
    """CLIP's own vocabulary, which open_clip ships, in transformers' form."""
    folder = tmp_path_factory.mktemp("vocabulary")
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    table = open_clip.tokenizer.SimpleTokenizer().encoder
    (folder / "vocab.json").write_text(json.dumps({names.get(token, token): i for token, i in table.items()}))
    content = gzip.decompress(Path(open_clip.tokenizer.default_bpe()).read_bytes()).decode()
    lines = content.split("\n")[1 : 49152 - 256 - 2 + 1]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


SPECIAL = [
    "\u201ccurly\u201d it\u2019s", "a &amp; b &amp;amp; c &lt;3", "\uff26\uff35\uff2c\uff2c", "\ufb01sh",
    "caf\u00c3\u00a9", "cafe\u0301", "\u039f\u0394\u039f\u03a3", "a <|endoftext|> b", "a <start_of_text> b",
    "&lt;|endoftext|&gt;", "\U0001f431",
]  # fmt: skip


def test_texts_are_cut_into_open_clips_tokens(published_vocabulary):
    theirs = open_clip.tokenizer.SimpleTokenizer()
    rng = np.random.default_rng(0)
    ranges = [(32, 127), (160, 0x250), (0x370, 0x400), (0x2010, 0x2070), (0xFB00, 0xFB07), (0xFF00, 0xFF60)]
    letters = {chr(i) for first, last in ranges for i in range(first, last) if unicodedata.category(chr(i)) != "Mn"}
    letters -= {"\u017f"}  # the long s, which open_clip takes for an s after an apostrophe
    pieces = [*sorted(letters), *(["&amp;", "&quot;", " ", "'s", "word"] * 40)]
    texts = SPECIAL + ["".join(rng.choice(pieces, size=20)) for _ in range(2000)]
    for text in texts:
        assert published_vocabulary(clean_open_clip_text(text)).input_ids[1:-1] == theirs.encode(text), ascii(text)


@pytest.mark.parametrize("shape", [(300, 200), (200, 301), (120, 90), (224, 500), (303, 200)])
def test_the_crop_is_open_clips_own(shape):
    rng = np.random.default_rng(0)
    coarse = rng.integers(64, 192, (shape[0] // 8 + 1, shape[1] // 8 + 1, 3), dtype=np.uint8)
    pixels = coarse.repeat(8, axis=0).repeat(8, axis=1)[: shape[0], : shape[1]]
    expected = open_clip.image_transform(224, is_train=False)(Image.fromarray(pixels))
    got = resize_normalize(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255, 224)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1.6 / 255 / min(CLIP_STD))
