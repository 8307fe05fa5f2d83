"""Tiny real components for the engine's tests."""

import json
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from fastcraft.engine.zero2 import Zero2Engine, fill_ds_config, init_distributed, load_ds_config

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
RECIPE = {
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "dtype": "float32",
    "max_grad_norm": 1.0,
    "learning_rate": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.01,
}


@pytest.fixture(scope="session")
def recipe():
    """What the recipe says about the optimiser, and the trained part's size."""
    return MappingProxyType(RECIPE | {"num_parameters": 1000, "largest_parameter": 500})


@pytest.fixture(scope="session")
def make_text_model(tokenizer_folder):
    """A CLIP text model of 516 tokens and two layers, the same weights for the same seed."""
    vocab = json.loads((tokenizer_folder / "vocab.json").read_text(encoding="utf-8"))

    def make(seed: int = 0) -> CLIPTextModel:
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


@pytest.fixture
def make_engine(make_text_model):
    """An engine around the tiny model in this process; keyword arguments replace those of the recipe."""
    init_distributed("cpu")
    engines = []

    def make(config: str = "zero2.json", model: CLIPTextModel | None = None, **recipe) -> Zero2Engine:
        model = model or make_text_model()
        sizes = [param.numel() for param in model.parameters() if param.requires_grad]
        recipe = RECIPE | {"num_parameters": sum(sizes), "largest_parameter": max(sizes, default=0)} | recipe
        filled = fill_ds_config(load_ds_config(DS_CONFIGS / config), **recipe)
        engines.append(
            Zero2Engine(
                model,
                ds_config=filled,
                device=torch.device("cpu"),
                total_steps=10,
                warmup_steps=2,
                lr_schedule="cosine",
            )
        )
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def micro_step():
    """Forward and backward of a loss that is a mean over the batch; the caller ends the micro-step."""

    def run(engine: Zero2Engine, input_ids: torch.Tensor) -> torch.Tensor:
        loss = engine(input_ids).last_hidden_state[..., :8].float().pow(2).mean()
        engine.backward(loss)
        return loss.detach()

    return run
