"""A model of a recipe alone: no rewards, no prompts, no engine; for sampling and evaluation."""

import pytest
import torch

from fastcraft.build.model import build_model
from fastcraft.config import recipe_from_tree

CPU = torch.device("cpu")


def tree(tiny_pipeline, **sections):
    return recipe_from_tree(
        {
            "model": {"path": str(tiny_pipeline)},
            "sampler": {"num_inference_steps": 3, "guidance_scale": 2.0},
            "objective": {"backprop_steps": 2},
            "train": {"dtype": "float32"},
            **sections,
        }
    )


def test_it_samples_without_rewards_or_prompts(tiny_pipeline):
    images = build_model(tree(tiny_pipeline), device=CPU).images
    pictures = images.sample(images.encode(["a red cat", "a blue dog"]), seeds=[1, 2])
    assert pictures.shape == (2, 3, 16, 16)
    assert not torch.equal(pictures[0], pictures[1])
    again = images.sample(images.encode(["a red cat", "a blue dog"], by="original"), seeds=[1, 2])
    assert torch.equal(again, pictures)  # nothing is trained yet


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_original_stays_when_the_trained_encoder_moves(tiny_pipeline, mode):
    model = build_model(tree(tiny_pipeline, trained={"text": {"mode": mode}}), device=CPU)
    before = model.images.encode(["a red cat"], by="original").cond.sequence
    with torch.no_grad():
        for part in model.trained.trained_parts():
            for _, parameter in part.parameters():
                parameter.add_(0.1)
        moved = model.images.encode(["a red cat"], by="trained").cond.sequence
    assert torch.equal(model.images.encode(["a red cat"], by="original").cond.sequence, before)
    assert (moved - before).abs().max() > 1e-3


def test_only_what_the_recipe_names_requires_gradient(tiny_pipeline):
    model = build_model(tree(tiny_pipeline, trained={"unet": {"mode": "lora", "rank": 2}}), device=CPU)
    trained = {name for name, parameter in model.trained.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith("unet.") and ".lora_" in name for name in trained)
    assert not any(parameter.requires_grad for parameter in model.components.vae.parameters())


def test_bfloat16_weights_of_a_whole_unet_have_exact_float32_values(tiny_pipeline):
    recipe = tree(tiny_pipeline, trained={"unet": {"mode": "full"}}, train={"dtype": "bfloat16"})
    model = build_model(recipe, device=CPU)
    parameters = dict(model.trained.named_parameters())
    assert {parameter.dtype for parameter in parameters.values() if parameter.requires_grad} == {torch.bfloat16}
    assert model.exact.keys() == {name for name, parameter in parameters.items() if parameter.requires_grad}
    differs = 0
    for name, exact in model.exact.items():
        assert torch.equal(exact.bfloat16(), parameters[name].detach())
        differs += int((exact != parameters[name].detach().float()).sum())
    assert differs > 1000
