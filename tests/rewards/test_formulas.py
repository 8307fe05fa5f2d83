"""Every score equals the published formula, computed here without the project's code and from the same file."""

import io
from collections import OrderedDict

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import BertTokenizer, CLIPModel, CLIPTokenizer

from fastcraft.rewards import REWARDS
from fastcraft.rewards.clip_tower import Towers
from fastcraft.rewards.denscore import split_sentences

PROMPTS = ["a red cube", "", "Two dogs. One is 4.5 m tall! Mr. Fox saw it"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@pytest.fixture
def images():
    """Of the stand-ins' size, so that nothing but the constants is between them and the model."""
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def build(bundled, standins, mediapipe):
    towers = Towers(device="cpu", dtype=torch.float32, bundled=bundled)

    def make(name, **more):
        path, options = standins[name]
        return REWARDS.get(name).build(path, towers=towers, **options, **more)

    return make


class Block(nn.Module):
    """open_clip's residual attention block."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, 64), gelu=nn.GELU(), c_proj=nn.Linear(64, width)))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Half(nn.Module):
    """A stack of blocks under open_clip's name."""

    def __init__(self, width, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(2))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClip(nn.Module):
    """open_clip's CLIP, by its own layers (torch's packed attention), so that its files load strictly."""

    def __init__(self):
        super().__init__()
        visual = nn.Module()
        visual.class_embedding = nn.Parameter(torch.empty(160))
        visual.positional_embedding = nn.Parameter(torch.empty(17, 160))
        visual.conv1 = nn.Conv2d(3, 160, 8, 8, bias=False)
        visual.ln_pre, visual.ln_post = nn.LayerNorm(160), nn.LayerNorm(160)
        visual.transformer = Half(160, 2)
        visual.proj = nn.Parameter(torch.empty(160, 24))
        self.visual = visual
        self.token_embedding = nn.Embedding(514, 128)
        self.positional_embedding = nn.Parameter(torch.empty(77, 128))
        self.transformer = Half(128, 2)
        self.ln_final = nn.LayerNorm(128)
        self.text_projection = nn.Parameter(torch.empty(128, 24))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def encode_image(self, images):
        visual = self.visual
        x = visual.conv1((images - MEAN) / STD).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
        x = visual.transformer(visual.ln_pre(x))
        return functional.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)

    def encode_text(self, ids):
        length = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, torch.full((length, length), float("-inf")).triu(1)))
        return functional.normalize(x[torch.arange(len(ids)), ids.argmax(dim=-1)] @ self.text_projection, dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1"])
def test_hps_is_open_clips_cosine(name, build, images, standins):
    folder = standins[name][0]
    model = OpenClip()
    file = f"{folder}/{'HPS_v2.1' if name.endswith('.1') else 'HPS_v2'}_compressed.pt"
    model.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    expected = (model.eval().encode_image(images) * model.encode_text(ids)).sum(dim=-1)
    assert expected.std() > 0.02, "the stand-in must tell the pairs apart"
    torch.testing.assert_close(build(name)(images, PROMPTS), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_two_versions_of_hps_are_two_models(build, images):
    assert not torch.allclose(build("hpsv2")(images, PROMPTS), build("hpsv2.1")(images, PROMPTS), atol=1e-2)


@pytest.fixture
def clip(bundled):
    return CLIPModel.from_pretrained(bundled), CLIPTokenizer.from_pretrained(bundled)


@torch.no_grad()
def test_pickscore_is_the_diagonal_of_the_scaled_matrix(build, images, clip):
    model, tokenizer = clip
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    matrix = model(pixel_values=(images - MEAN) / STD, **tokens).logits_per_image
    scores = build("pickscore")(images, PROMPTS)
    torch.testing.assert_close(scores, matrix.diag(), rtol=1e-5, atol=1e-5)
    assert (scores - matrix.mean(dim=1)).abs().max() > 0.1, "the mean over all pairs is another number"


@torch.no_grad()
def test_denscore_is_the_mean_over_segments(build, images, clip):
    model, tokenizer = clip
    segments = [["a red cube"], [""], ["Two dogs.", "One is 4.5 m tall!", "Mr. Fox saw it"]]
    expected = []
    for image, texts in zip(images, segments, strict=True):
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        matrix = model(pixel_values=(image[None] - MEAN) / STD, **tokens).logits_per_image / model.logit_scale.exp()
        expected.append(matrix[0])
    reward = build("denscore")
    torch.testing.assert_close(
        reward(images, PROMPTS), torch.stack([row.mean() for row in expected]), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(reward.segment_scores(images, PROMPTS)[2], expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("caption", "sentences"),
    [
        ("One cat. Two dogs!  Why? Because; yes", ["One cat.", "Two dogs!", "Why?", "Because;", "yes"]),
        ("It is 4.5 m. by J. R. Fox, e.g. Mr. Fox", ["It is 4.5 m.", "by J. R. Fox, e.g. Mr. Fox"]),
        ('He said "no." Then left.', ['He said "no."', "Then left."]),
        ("\u4f60\u597d\u3002\u518d\u89c1\uff01", ["\u4f60\u597d\u3002", "\u518d\u89c1\uff01"]),
        ("one\n\ntwo", ["one", "two"]),
        ("  ", [""]),
    ],
)
def test_sentences_end_where_they_end(caption, sentences):
    assert split_sentences(caption) == sentences


def test_a_long_sentence_is_cut_between_words(build):
    reward = build("denscore")
    words = [f"w{i}" for i in range(200)]
    segments = reward.segments(" ".join(words))
    assert " ".join(segments).split() == words
    assert len(segments) > 2
    assert all(reward.tower.num_tokens(segment) <= 77 for segment in segments)
    assert reward.segments("x" * 500) == ["x" * 500], "one word stays one segment, and is cut by the tokenizer"


def attend(tensors, name, x, context, *, mask=None, packed=False):
    """Two heads of 64, by the text-book formula."""
    if packed:
        rows = functional.linear(x, tensors[f"{name}.qkv.weight"], tensors[f"{name}.qkv.bias"]).chunk(3, dim=-1)
    else:
        rows = [
            functional.linear(y, tensors[f"{name}.self.{part}.weight"], tensors[f"{name}.self.{part}.bias"])
            for part, y in (("query", x), ("key", context), ("value", context))
        ]
    query, key, value = (y.unflatten(-1, (2, 64)).transpose(1, 2) for y in rows)
    weights = query @ key.transpose(-1, -2) / 8
    if mask is not None:
        weights = weights.masked_fill(~mask[:, None, None, :], float("-inf"))
    out = (weights.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
    last = f"{name}.proj" if packed else f"{name}.output.dense"
    return functional.linear(out, tensors[f"{last}.weight"], tensors[f"{last}.bias"])


def published_image_reward(tensors, images, ids, mask):
    """Picture and prompt to the reward, as the released code does it: pre-norm ViT, post-norm BERT, affine head."""

    def norm(name, x, eps):
        return functional.layer_norm(x, (128,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    def linear(name, x):
        return functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    eye = "blip.visual_encoder"
    patches = functional.conv2d(
        (images - MEAN) / STD, tensors[f"{eye}.patch_embed.proj.weight"], tensors[f"{eye}.patch_embed.proj.bias"], 8
    )
    x = torch.cat([tensors[f"{eye}.cls_token"].expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    x = x + tensors[f"{eye}.pos_embed"]
    for i in range(2):
        block = f"{eye}.blocks.{i}"
        y = norm(f"{block}.norm1", x, 1e-6)
        x = x + attend(tensors, f"{block}.attn", y, y, packed=True)
        x = x + linear(f"{block}.mlp.fc2", functional.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    picture = norm(f"{eye}.norm", x, 1e-6)
    words = "blip.text_encoder.embeddings"
    x = tensors[f"{words}.word_embeddings.weight"][ids]
    x = norm(f"{words}.LayerNorm", x + tensors[f"{words}.position_embeddings.weight"][: ids.shape[1]], 1e-12)
    for i in range(2):
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for part, context, seen in (("attention", None, mask.bool()), ("crossattention", picture, None)):
            y = attend(tensors, f"{layer}.{part}", x, x if context is None else context, mask=seen)
            x = norm(f"{layer}.{part}.output.LayerNorm", x + y, 1e-12)
        y = linear(f"{layer}.output.dense", functional.gelu(linear(f"{layer}.intermediate.dense", x)))
        x = norm(f"{layer}.output.LayerNorm", x + y, 1e-12)
    score = x[:, 0]
    for index in (0, 2, 4, 6, 7):
        score = linear(f"mlp.layers.{index}", score)
    return (score[:, 0] - 0.16717362830052426) / 1.0333394966054072


@torch.no_grad()
def test_imagereward_is_the_published_blip(build, images, standins):
    folder = standins["imagereward"][0]
    tensors = torch.load(f"{folder}/ImageReward.pt", weights_only=True)
    prompts = ["a [DEC] cube [ENC] [dec]", "", "so many words " * 20]
    tokenizer = BertTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})  # as BLIP's init_tokenizer does, in this order
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert tokens.attention_mask.sum(dim=1).tolist()[1:] == [2, 35], "an empty and a cut prompt are among them"
    last = len(tokenizer) - 1
    assert tokens.input_ids[0].tolist().count(last - 1) == tokens.input_ids[0].tolist().count(last) == 1
    expected = published_image_reward(tensors, images, tokens.input_ids, tokens.attention_mask)
    assert expected.std() > 0.02, "the stand-in must tell the pairs apart"
    torch.testing.assert_close(build("imagereward")(images, prompts), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("prefer", "sign"), [("small", -1), ("large", 1)])
def test_jpeg_size_is_the_files_size(prefer, sign, build):
    images = torch.rand(2, 3, 40, 24)
    images[1] = 0.5
    expected = []
    for image in images:
        file = io.BytesIO()
        picture = (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(file, "JPEG", quality=95)
        expected.append(sign * len(file.getvalue()) / 1000)
    assert build("jpeg_size", prefer=prefer)(images, ["", ""]).tolist() == pytest.approx(expected)
    assert sign * expected[0] > 2 * sign * expected[1] > 0
