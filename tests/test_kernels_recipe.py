"""``kernels`` of a recipe: when UNet, VAE and reward towers are patched, and what is refused."""

import pytest
import torch

from fastcraft.assemble import assemble, make_objective, make_order
from fastcraft.config import load_recipe
from fastcraft.errors import UserError
from fastcraft.policy import run_planner
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
        ("kernels.cuda_graphs=prefix", "kernels.cuda_graphs: 'prefix' needs a CUDA device, got cpu"),
        ("kernels.compile=block", "kernels.compile.*'block'"),
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


@pytest.mark.parametrize("compile", ["blocks", "whole"])
@pytest.mark.parametrize(
    ("policy", "why"),
    [("sac:attention+conv", "hides what is inside"), ("batched:2", "is compiled for training's micro-batch")],
)
def test_policies_that_compiled_code_would_ignore_are_refused_before_anything_is_loaded(compile, policy, why):
    settings = [f"kernels.compile={compile}", f"memory.policy={policy}", "model.path=nowhere"]
    with pytest.raises(UserError) as refused:
        assemble(load_recipe("shapes", [*settings, "objective.input_grad=false"]), device=CPU)
    message = str(refused.value)
    assert message.startswith(f"kernels.compile: {compile!r} {why}")
    assert message.endswith(f"got {policy!r}")


@pytest.mark.parametrize("compile", ["none", "prefix", "blocks", "whole"])
def test_auto_knows_what_compiled_code_takes_and_cannot_do(monkeypatch, compile):
    """No steps in batches where they are compiled one by one; the weights once more where they are frozen in."""
    asked = []
    monkeypatch.setattr("fastcraft.policy.planner_of", lambda networks, **options: asked.append(options))
    recipe = load_recipe("shapes", [f"kernels.compile={compile}", "objective.input_grad=false"])
    run_planner(recipe, object(), CPU)
    assert [options["batches"] for options in asked] == [compile in ("none", "prefix")]
    assert [options["unet_copies"] for options in asked] == [compile in ("prefix", "whole")]


@pytest.mark.parametrize(
    ("compile", "weighed"),
    [("none", []), ("blocks", ["keep", "recompute", "recompute+block"]), ("whole", ["keep", "recompute"])],
)
def test_auto_weighs_what_compiled_code_can_do(monkeypatch, compile, weighed):
    """None named means all that the device can do."""
    from fastcraft import policy as module

    asked = []

    def planner(networks, *, treatments, batches, **options):
        assert batches == (compile == "none")
        asked.extend(treatments)
        raise UserError("enough")

    monkeypatch.setattr(module, "planner_of", planner)
    recipe = load_recipe("shapes", [f"kernels.compile={compile}", "memory.policy=auto"])
    with pytest.raises(UserError, match="enough"):
        module.policy_of(recipe, object(), CPU)
    assert asked == weighed


@pytest.mark.slow
@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_the_bundled_model_trains_compiled_as_it_does_eager(compile):
    """By inductor, in minutes: the loss of a whole step and its gradient to the text encoder."""
    results = []
    for setting in ("none", compile):
        recipe = load_recipe("shapes", [f"kernels.compile={setting}", "train.batch_size=2"])
        parts = assemble(recipe, device=CPU)
        objective, _ = make_objective(recipe, parts, parts.trained)
        batch = make_order(recipe, parts, world_size=1).batch(0, 0, batch_size=2)
        (output,) = objective.losses(batch, draw=0)
        output.loss.backward()
        grads = [parameter.grad.flatten() for parameter in parts.trained.parameters() if parameter.grad is not None]
        results.append((output.loss.detach(), torch.cat(grads)))
        assert parts.acceleration.startswith("kernels.compile") == (setting != "none")
    (loss, grad), (compiled_loss, compiled_grad) = results
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-4, atol=0)
    assert torch.linalg.vector_norm(grad) > 0
    assert torch.linalg.vector_norm(compiled_grad - grad) < 1e-3 * torch.linalg.vector_norm(grad)
