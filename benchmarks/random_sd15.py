"""A Stable Diffusion 1.5 folder and its rewards, of random weights: ``python -m benchmarks.random_sd15 DIR``.

The rewards are CLIP ViT-L/14 with an aesthetic head, PickScore (ViT-H/14) and HPSv2 (ViT-H/14 with open_clip's names).

Speed and memory do not depend on what the weights say, so a machine without the published ones can measure. ``--width``
divides every channel count, to rehearse on a small machine.
"""

import argparse
import json
from pathlib import Path

import torch


def write_tokenizer(folder: Path, vocab_size: int) -> dict[str, int]:
    """A byte-level CLIP vocabulary padded to ``vocab_size`` entries; returns token -> id."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    names = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    names += [f"<unused{i}>" for i in range(vocab_size - len(names) - 2)] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(names)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    marks = {f"{name}_token": "<|endoftext|>" for name in ("eos", "pad", "unk")} | {"bos_token": "<|startoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return vocab


def write_pipeline(folder: Path, *, width: int = 1, seed: int = 0) -> None:
    """Stable Diffusion 1.5's architecture, float16 weights, at 1 / ``width`` of its channels."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    vocab = write_tokenizer(folder / "tokenizer", 49408)
    hidden = 768 // width
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=12,
        num_attention_heads=12, hidden_act="quick_gelu", bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"], pad_token_id=vocab["<|endoftext|>"],
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=tuple(c // width for c in (320, 640, 1280, 1280)), layers_per_block=2,
        cross_attention_dim=hidden, attention_head_dim=8, norm_num_groups=32 // width,
    )  # fmt: skip
    levels = 4
    vae = AutoencoderKL(
        block_out_channels=tuple(c // width for c in (128, 256, 512, 512)), layers_per_block=2, latent_channels=4,
        sample_size=512, norm_num_groups=32 // width, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1,
        clip_sample=False,
    )  # fmt: skip
    parts = {"text_encoder": CLIPTextModel(text), "unet": unet, "vae": vae}
    for name, part in parts.items():
        part.half().save_pretrained(folder / name)
    scheduler.save_pretrained(folder / "scheduler")
    classes = {
        "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "feature_extractor": [None, None], "safety_checker": [None, None],
    }  # fmt: skip
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **classes}
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


def write_clip(folder: Path, *, text: tuple[int, int, int], vision: tuple[int, int]) -> None:
    """A float16 ``CLIPModel`` and its tokenizer; text is (width, layers, heads), vision (width, layers)."""
    from transformers import CLIPConfig, CLIPModel

    vocab = write_tokenizer(folder, 49408)
    marks = {"eos_token_id": vocab["<|endoftext|>"], "pad_token_id": vocab["<|endoftext|>"]}
    text_config = {
        "vocab_size": 49408, "hidden_size": text[0], "intermediate_size": 4 * text[0], "num_hidden_layers": text[1],
        "num_attention_heads": text[2], "bos_token_id": vocab["<|startoftext|>"], **marks,
    }  # fmt: skip
    vision_config = {
        "hidden_size": vision[0], "intermediate_size": 4 * vision[0], "num_hidden_layers": vision[1],
        "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
    }  # fmt: skip
    config = CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=text[0])
    CLIPModel(config).half().save_pretrained(folder)


def write_hps(folder: Path, *, width: int = 1, seed: int = 2) -> None:
    """``HPS_v2_compressed.pt``: ViT-H/14 in float16 under open_clip's names, and the vocabulary beside it."""
    torch.manual_seed(seed)
    write_tokenizer(folder, 49408)
    tensors = {"logit_scale": torch.tensor(4.6052)}
    for half, wide, layers in (("visual.", 1280 // width, 32), ("", 1024 // width, 24)):
        shapes = {"ln_1": (wide,), "ln_2": (wide,), "attn.out_proj": (wide, wide)}
        shapes |= {"mlp.c_fc": (4 * wide, wide), "mlp.c_proj": (wide, 4 * wide), "attn.in_proj": (3 * wide, wide)}
        for block in (f"{half}transformer.resblocks.{i}." for i in range(layers)):
            for name, shape in shapes.items():
                separator = "_" if name.endswith("in_proj") else "."
                weight = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * shape[1] ** -0.5
                tensors[f"{block}{name}{separator}weight"] = weight.half()
                tensors[f"{block}{name}{separator}bias"] = torch.zeros(shape[0]).half()
    wide, hidden = 1280 // width, 1024 // width
    for norm, size in (("visual.ln_pre", wide), ("visual.ln_post", wide), ("ln_final", hidden)):
        tensors[f"{norm}.weight"], tensors[f"{norm}.bias"] = torch.ones(size).half(), torch.zeros(size).half()
    tables = {
        "visual.conv1.weight": (wide, 3, 14, 14), "visual.class_embedding": (wide,),
        "visual.positional_embedding": (257, wide), "visual.proj": (wide, hidden),
        "token_embedding.weight": (49408, hidden), "positional_embedding": (77, hidden),
        "text_projection": (hidden, hidden),
    }  # fmt: skip
    tensors |= {name: (0.02 * torch.randn(shape)).half() for name, shape in tables.items()}
    torch.save({"state_dict": tensors}, folder / "HPS_v2_compressed.pt")


def write_reward(folder: Path, *, width: int = 1, seed: int = 1) -> None:
    """CLIP ViT-L/14 and an aesthetic head with the LAION file's layers."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    hidden = 768 // width
    write_clip(folder, text=(hidden, 12, 12), vision=(1024 // width, 24))
    sizes = (hidden, 1024, 128, 64, 16, 1)
    layers = {}
    for index, (number, inputs, outputs) in enumerate(zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True)):
        layers[f"layers.{number}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        layers[f"layers.{number}.bias"] = torch.zeros(outputs) + (5.0 if index == 4 else 0.0)
    save_file(layers, folder / "aesthetic.safetensors")


def main() -> None:
    """Write ``DIR/pipeline``, ``DIR/reward``, ``DIR/pickscore`` and ``DIR/hpsv2``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--width", type=int, default=1, choices=(1, 2, 4, 8), help="divide all channels by this")
    args = parser.parse_args()
    write_pipeline(args.dir / "pipeline", width=args.width)
    write_reward(args.dir / "reward", width=args.width)
    write_clip(args.dir / "pickscore", text=(1024 // args.width, 24, 16), vision=(1280 // args.width, 32))
    write_hps(args.dir / "hpsv2", width=args.width)


if __name__ == "__main__":
    main()
