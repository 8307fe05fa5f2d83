"""Tiny real components for the engine's tests."""

from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from transformers import CLIPTextModel

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
