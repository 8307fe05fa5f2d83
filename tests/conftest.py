"""Tiny real models: a Stable Diffusion folder of random weights, made once per test run."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: workers with threads of their own fight for cores

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["DS_ACCELERATOR"] = "cpu"  # on a GPU machine too; tests/test_gpu.py starts processes of its own
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def write_tokenizer(folder: Path, words: tuple[str, ...] = ("red", "blue", "cat", "dog")) -> None:
    """A byte-level CLIP vocabulary in which each of ``words`` is a single token."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    merges: list[str] = []
    merged: list[str] = []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = f"{parts[0]} {parts[1]}"
            if pair not in merges:
                merges.append(pair)
                merged.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    names = [*symbols, *(s + "</w>" for s in symbols), *merged, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": 77,
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
            }
        )
    )


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Estimates that tests and their processes keep are theirs: the person's own cache is neither read nor written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete Stable Diffusion 1.x folder: 16 px pictures, 8x8 latents, random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tokenizer(folder / "tokenizer")
    vocab = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=vocab["<|startoftext|>"], eos_token_id=vocab["<|endoftext|>"],
            pad_token_id=vocab["<|endoftext|>"],
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    with torch.no_grad():  # a sharper, louder network: gradients to the text well above rounding
        for name, parameter in unet.named_parameters():
            if "attn2" in name and name.endswith("weight"):
                parameter.mul_(3)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1,
        clip_sample=False,
    )  # fmt: skip
    for name, part in {"text_encoder": text, "unet": unet, "vae": vae, "scheduler": scheduler}.items():
        part.save_pretrained(folder / name)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def tiny_parts(tiny_pipeline: Path) -> SimpleNamespace:
    """Fresh parts of the tiny model, by the loader that loads real ones; ``stock`` is its UNet as diffusers made it."""
    from diffusers import UNet2DConditionModel

    from fastcraft.families.components import freeze, load_components
    from fastcraft.families.unet import use_text_kv

    parts = load_components(tiny_pipeline, dtype=torch.float32, device=torch.device("cpu"))
    use_text_kv(parts.unet)
    stock = freeze(UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet"))
    return SimpleNamespace(components=parts, stock=stock)


@pytest.fixture(scope="session")
def make_text_model(tokenizer_folder):
    """A CLIP text model of 516 tokens and two layers, the same weights for the same seed."""
    vocab = json.loads((tokenizer_folder / "vocab.json").read_text(encoding="utf-8"))

    def make(seed: int = 0):
        from transformers import CLIPTextConfig, CLIPTextModel

        torch.manual_seed(seed)
        config = CLIPTextConfig(
            vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1, pad_token_id=len(vocab) - 1,
        )  # fmt: skip
        return CLIPTextModel(config)

    return make


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A CLIP tokenizer that splits into bytes: vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("tokenizer")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = [("a", "t</w>"), ("c", "at</w>")]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = json.dumps({token: i for i, token in enumerate(tokens)})
    (folder / "vocab.json").write_text(vocab, encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "model_max_length": 77,
                "name_or_path": str(folder),
            }
        )
    )
    return folder


@pytest.fixture(scope="session")
def input_ids():
    """(8, 77) token ids, the first of the batch being whole sentences."""
    ids = torch.randint(0, 514, (8, 77), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, -1] = 514, 515
    return ids
