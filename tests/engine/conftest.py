"""Tiny real components for the engine's tests."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

from fastcraft.engine.ds_config import fill_ds_config, load_ds_config
from fastcraft.engine.zero2 import Zero2Engine, init_distributed

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
    """An engine around the tiny model in this process; keyword arguments replace those of the recipe.

    ``options`` are further ones of the engine.
    """
    init_distributed("cpu")
    engines = []

    def make(
        config: str = "zero2.json",
        model: nn.Module | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        **recipe,
    ) -> Zero2Engine:
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
                **(options or {}),
            )
        )
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def micro_step():
    """Forward and backward of a loss that is a mean over the batch, one of ``of`` in an update; no ``step`` yet."""

    def run(engine: Zero2Engine, input_ids: torch.Tensor, *, of: int = 1, closes: bool = True) -> torch.Tensor:
        loss = engine(input_ids).last_hidden_state[..., :8].float().pow(2).mean()
        engine.backward(loss / of, closes_update=closes)
        return loss.detach()

    return run
