"""``kernels`` of a recipe: when UNet, VAE and reward towers are patched, and what is refused."""

import pytest
import torch

from fastcraft.assemble import assemble
from fastcraft.config import load_recipe
from fastcraft.errors import UserError
from fastcraft_kernels.backend import current_backend, set_backend

CPU = torch.device("cpu")


def networks(parts):
    """UNet, VAE and the image tower of the bundled reward."""
    models = [parts.components.unet, parts.components.vae, *parts.rewards.image_networks]
    assert len(models) == 3
    return models


def test_auto_on_a_cpu_leaves_diffusers_modules():
    parts = assemble(load_recipe("shapes"), device=CPU)
    for model in networks(parts):
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_reference_holds_for_the_sampler_too():
    """Which needs no patch: on CUDA its op would take the kernel."""
    try:
        parts = assemble(load_recipe("shapes", ["kernels.backend=reference"]), device=CPU)
        assert current_backend() == "reference"
    finally:
        set_backend("auto")
    for model in networks(parts):
        assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "kernels.backend=triton",
            "kernels.backend: 'triton' cannot serve UNet2DConditionModel: the kernels need a CUDA",
        ),
        ("kernels.backend=cuda", "kernels.backend"),
        (
            "kernels.attention_table=nowhere.json",
            "kernels.attention_table: load_attention_table: source must be a JSON file",
        ),
    ],
)
def test_refused_with_the_reason(setting, message):
    with pytest.raises(UserError, match=message):
        assemble(load_recipe("shapes", [setting]), device=CPU)


def test_triton_patches(monkeypatch):
    """As on a CUDA device, the kernels' refusal taken away: nothing is computed."""
    import fastcraft.diffusion.patch as patch

    monkeypatch.setattr(patch, "triton_refusal", lambda device, dtype: None)
    try:
        parts = assemble(load_recipe("shapes", ["kernels.backend=triton"]), device=CPU)
        assert current_backend() == "triton"
    finally:
        set_backend("auto")
    for model in networks(parts):
        assert sum("forward" in module.__dict__ for module in model.modules()) > 8
