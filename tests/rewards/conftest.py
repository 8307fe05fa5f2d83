"""Tiny, random, but complete reward models on disk."""

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
