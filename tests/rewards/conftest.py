"""Tiny, random, but complete reward models on disk."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.utils import logging

WIDTHS = (24, 20, 12, 8, 4, 1)


def random_head(widths=WIDTHS, *, seed=0):
    """Tensors of the five linear layers, by the released names."""
    generator = torch.Generator().manual_seed(seed)
    head = {}
    for index, width_in, width_out in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        head[f"layers.{index}.weight"] = torch.randn(width_out, width_in, generator=generator) / width_in**0.5
        head[f"layers.{index}.bias"] = torch.randn(width_out, generator=generator)
    return head


def byte_symbols():
    """The 256 characters that stand for bytes in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def open_clip_tensors(*, seed=0, vocabulary=514, layers=2):
    """A CLIP with open_clip's names: 32 px, heads 80 and 64 wide as ViT-H/14's, D = 24; weights large enough to see."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    tensors = {"logit_scale": torch.tensor(4.6052)}
    for half, width in (("visual.", 160), ("", 128)):
        for i in range(layers):
            block = f"{half}transformer.resblocks.{i}."
            for name, rows, columns in (
                ("attn.in_proj_", 3 * width, width), ("attn.out_proj.", width, width),
                ("mlp.c_fc.", 64, width), ("mlp.c_proj.", width, 64),
            ):  # fmt: skip
                tensors[f"{block}{name}weight"] = normal(rows, columns, scale=columns**-0.5)
                tensors[f"{block}{name}bias"] = normal(rows, scale=0.1)
            for norm in ("ln_1", "ln_2"):
                tensors[f"{block}{norm}.weight"] = 1 + normal(width, scale=0.1)
                tensors[f"{block}{norm}.bias"] = normal(width, scale=0.1)
    for norm, width in (("visual.ln_pre", 160), ("visual.ln_post", 160), ("ln_final", 128)):
        tensors[f"{norm}.weight"], tensors[f"{norm}.bias"] = 1 + normal(width, scale=0.1), normal(width, scale=0.1)
    return tensors | {
        "visual.conv1.weight": normal(160, 3, 8, 8, scale=0.1),
        "visual.class_embedding": normal(160),
        "visual.positional_embedding": normal(17, 160, scale=0.3),
        "visual.proj": normal(160, WIDTHS[0], scale=0.1),
        "token_embedding.weight": normal(vocabulary, 128),
        "positional_embedding": normal(77, 128, scale=0.3),
        "text_projection": normal(128, WIDTHS[0], scale=0.1),
    }


def blip_tensors(*, vocabulary, seed=0):
    """An ImageReward with the released names: 32 px, both halves 128 wide in two heads, two layers each."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}

    def linear(name, rows, columns):
        tensors[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * columns**-0.5
        tensors[f"{name}.bias"] = 0.1 * torch.randn(rows, generator=generator)

    def norm(name):
        tensors[f"{name}.weight"] = 1 + 0.1 * torch.randn(128, generator=generator)
        tensors[f"{name}.bias"] = 0.1 * torch.randn(128, generator=generator)

    for i in range(2):
        block = f"blip.visual_encoder.blocks.{i}"
        for name, rows, columns in (
            ("attn.qkv", 384, 128), ("attn.proj", 128, 128), ("mlp.fc1", 64, 128), ("mlp.fc2", 128, 64)
        ):  # fmt: skip
            linear(f"{block}.{name}", rows, columns)
        norm(f"{block}.norm1")
        norm(f"{block}.norm2")
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for attention in ("attention", "crossattention"):
            for part in ("query", "key", "value"):
                linear(f"{layer}.{attention}.self.{part}", 128, 128)
            linear(f"{layer}.{attention}.output.dense", 128, 128)
            norm(f"{layer}.{attention}.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", 64, 128)
        linear(f"{layer}.output.dense", 128, 64)
        norm(f"{layer}.output.LayerNorm")
    norm("blip.visual_encoder.norm")
    norm("blip.text_encoder.embeddings.LayerNorm")
    linear("blip.vision_proj", 16, 128)
    linear("blip.text_proj", 16, 128)
    tensors |= {
        "blip.visual_encoder.cls_token": torch.randn(1, 1, 128, generator=generator),
        "blip.visual_encoder.pos_embed": 0.3 * torch.randn(1, 17, 128, generator=generator),
        "blip.visual_encoder.patch_embed.proj.weight": 0.1 * torch.randn(128, 3, 8, 8, generator=generator),
        "blip.visual_encoder.patch_embed.proj.bias": 0.1 * torch.randn(128, generator=generator),
        "blip.text_encoder.embeddings.word_embeddings.weight": torch.randn(vocabulary, 128, generator=generator),
        "blip.text_encoder.embeddings.position_embeddings.weight": torch.randn(40, 128, generator=generator),
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
    }
    head = random_head((128, 20, 12, 8, 4, 1), seed=seed)
    return tensors | {f"mlp.{name}": tensor for name, tensor in head.items()}


BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + i) for i in range(26))]
BERT_WORDS += [f"##{word}" for word in BERT_WORDS[5:]]


class FakeDetector:
    """What a MediaPipe task gives: one detection of a picture's brightness, none in a dark one; of hands likewise."""

    def __init__(self, options):
        self.options = options
        self.is_closed = False

    def close(self):
        self.is_closed = True

    def detect(self, image):
        brightness = float(image.data.mean()) / 255
        categories = [SimpleNamespace(score=brightness)]
        if brightness < self.options.threshold:
            return SimpleNamespace(detections=[], handedness=[])
        return SimpleNamespace(detections=[SimpleNamespace(categories=categories)], handedness=[categories])


def fake_mediapipe():
    """The corner of the package that is used; a model that holds b"bad" is refused as the real one refuses it."""

    def base_options(*, model_asset_path):
        if Path(model_asset_path).read_bytes() == b"bad":
            raise RuntimeError("Unable to initialize runtime environment.\nmore")
        return model_asset_path

    def face_options(*, base_options, min_detection_confidence):
        return SimpleNamespace(threshold=min_detection_confidence)

    def hand_options(*, base_options, num_hands, min_hand_detection_confidence, min_hand_presence_confidence):
        return SimpleNamespace(threshold=min_hand_detection_confidence)

    task = SimpleNamespace(create_from_options=FakeDetector)
    vision = SimpleNamespace(
        FaceDetector=task, FaceDetectorOptions=face_options, HandLandmarker=task, HandLandmarkerOptions=hand_options
    )
    module = ModuleType("mediapipe")
    module.Image = lambda *, image_format, data: SimpleNamespace(data=data)
    module.ImageFormat = SimpleNamespace(SRGB=1)
    module.tasks = SimpleNamespace(BaseOptions=base_options, vision=vision)
    return module


@pytest.fixture
def mediapipe(monkeypatch):
    """The package's stand-in: it is an extra, and its models cannot be shipped."""
    monkeypatch.setitem(sys.modules, "mediapipe", fake_mediapipe())


def coloured(images, prompts):
    """A user's function, differentiable and reading the prompt."""
    lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
    return images.mean(dim=(1, 2, 3)) * (1 + lengths)


@pytest.fixture(scope="session")
def standins(bundled, tmp_path_factory):
    """Reward -> (path, options): random weights under the official files' names, at a thousandth of the size."""
    folder = tmp_path_factory.mktemp("standins")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((bundled / name).read_bytes())
    torch.save({"state_dict": open_clip_tensors(seed=1)}, folder / "HPS_v2_compressed.pt")
    torch.save({"state_dict": open_clip_tensors(seed=2)}, folder / "HPS_v2.1_compressed.pt")
    blip = tmp_path_factory.mktemp("blip")
    (blip / "vocab.txt").write_text("\n".join(BERT_WORDS))
    torch.save(blip_tensors(vocabulary=len(BERT_WORDS) + 2), blip / "ImageReward.pt")
    detectors = tmp_path_factory.mktemp("detectors")
    (detectors / "blaze_face_short_range.tflite").write_bytes(b"good")
    (detectors / "hand_landmarker.task").write_bytes(b"good")
    return {
        "aesthetic": ("shapes", {}),
        "brightness": ("", {}),
        "callable": ("", {"function": coloured, "differentiable": True}),
        "clip": ("shapes", {}),
        "denscore": (str(bundled), {}),
        "face": (str(detectors), {"threshold": 0.1}),
        "hand": (str(detectors), {"threshold": 0.1}),
        "hpsv2": (str(folder), {}),
        "hpsv2.1": (str(folder), {}),
        "imagereward": (str(blip), {}),
        "jpeg_size": ("", {}),
        "pickscore": (str(bundled), {}),
    }


@pytest.fixture(scope="session")
def bundled(tmp_path_factory):
    """A folder with a CLIPModel (32 px, D = 24), its tokenizer and an aesthetic head."""
    folder = tmp_path_factory.mktemp("bundled")
    symbols = byte_symbols()
    marks = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate([*symbols, *(s + "</w>" for s in symbols), *marks])}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**text, "image_size": 32, "patch_size": 8}
    text |= {"vocab_size": len(vocab), "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    logging.disable_progress_bar()
    torch.manual_seed(0)
    # Larger weights than usual: with the default ones every picture looks alike to a tiny random model.
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTHS[0], initializer_factor=8.0)
    )
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77).save_pretrained(folder)
    save_file(random_head(), folder / "aesthetic.safetensors")
    return folder


@pytest.fixture(scope="session")
def make_head():
    """`random_head`, for tests that write their own files."""
    return random_head


@pytest.fixture
def copied(bundled, tmp_path):
    """The same folder, to be damaged."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for file in bundled.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
