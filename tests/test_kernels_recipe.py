"""``kernels`` of a recipe: when UNet, VAE and reward towers are patched, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from fastcraft.build import plan as build_plan
from fastcraft.build.plan import build_plans, run_planner
from fastcraft.build.run import build_objective, build_run
from fastcraft.config import load_recipe
from fastcraft.errors import UserError
from fastcraft_kernels.backend import current_backend, set_backend

CPU = torch.device("cpu")


def networks(parts):
    """UNet, VAE and the image tower of the bundled reward."""
    components = parts.model.components
    models = [components.unet, components.vae, *parts.judges.rewards.image_networks]
    assert len(models) == 3
    return models


def test_auto_on_a_cpu_leaves_diffusers_modules():
    parts = build_run(load_recipe("shapes"), device=CPU)
    for model in networks(parts):
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_reference_holds_for_the_sampler_too():
    """Which needs no patch: on CUDA its op would take the kernel."""
    try:
        parts = build_run(load_recipe("shapes", ["kernels.backend=reference"]), device=CPU)
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
        build_run(load_recipe("shapes", [setting]), device=CPU)


def test_triton_patches(monkeypatch):
    """As on a CUDA device, the kernels' refusal taken away: nothing is computed."""
    import fastcraft.diffusion.patch as patch

    monkeypatch.setattr(patch, "triton_refusal", lambda device, dtype: None)
    try:
        parts = build_run(load_recipe("shapes", ["kernels.backend=triton"]), device=CPU)
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
        build_run(load_recipe("shapes", [*settings, "objective.input_grad=false"]), device=CPU)
    message = str(refused.value)
    assert message.startswith(f"kernels.compile: {compile!r} {why}")
    assert message.endswith(f"got {policy!r}")


@pytest.mark.parametrize("compile", ["none", "prefix", "blocks", "whole"])
def test_auto_knows_what_compiled_code_takes_and_cannot_do(monkeypatch, compile):
    """No steps in batches where they are compiled one by one; the weights once more where they are frozen in."""
    asked = []
    monkeypatch.setattr(build_plan, "planner_of", lambda networks, **options: asked.append(options))
    recipe = load_recipe("shapes", [f"kernels.compile={compile}", "objective.input_grad=false"])
    run_planner(recipe, SimpleNamespace(trains_unet=False), CPU)
    assert [options["batches"] for options in asked] == [compile in ("none", "prefix")]
    assert [options["unet_copies"] for options in asked] == [compile in ("prefix", "whole")]


@pytest.mark.parametrize("trains_unet", [True, False])
def test_auto_weighs_no_batches_of_steps_where_the_unet_is_trained(monkeypatch, trains_unet):
    """Which would lose its gradient."""
    asked = []
    monkeypatch.setattr(build_plan, "planner_of", lambda networks, **options: asked.append(options))
    networks = SimpleNamespace(trains_unet=trains_unet)
    run_planner(load_recipe("shapes", ["objective.input_grad=false"]), networks, CPU)
    assert [options["batches"] for options in asked] == [not trains_unet]


@pytest.mark.parametrize(
    ("compile", "weighed"),
    [("none", []), ("blocks", ["keep", "recompute", "recompute+block"]), ("whole", ["keep", "recompute"])],
)
def test_auto_weighs_what_compiled_code_can_do(monkeypatch, compile, weighed):
    """None named means all that the device can do."""
    asked = []

    def planner(networks, *, treatments, batches, **options):
        assert batches == (compile == "none")
        asked.extend(treatments)
        raise UserError("enough")

    monkeypatch.setattr(build_plan, "planner_of", planner)
    recipe = load_recipe("shapes", [f"kernels.compile={compile}", "memory.policy=auto"])
    with pytest.raises(UserError, match="enough"):
        build_plans(recipe, SimpleNamespace(trains_unet=False), CPU)
    assert asked == weighed


@pytest.mark.slow
@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_the_bundled_model_trains_compiled_as_it_does_eager(compile):
    """By inductor, in minutes: the loss of a whole step and its gradient to the text encoder."""
    results = []
    for setting in ("none", compile):
        recipe = load_recipe("shapes", [f"kernels.compile={setting}", "train.batch_size=2"])
        parts = build_run(recipe, device=CPU)
        (output,) = build_objective(recipe, parts, parts.model.images).round(0)
        output.loss.backward()
        trained = parts.model.trained
        grads = [parameter.grad.flatten() for parameter in trained.parameters() if parameter.grad is not None]
        results.append((output.loss.detach(), torch.cat(grads)))
        assert parts.acceleration.startswith("kernels.compile") == (setting != "none")
    (loss, grad), (compiled_loss, compiled_grad) = results
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-4, atol=0)
    assert torch.linalg.vector_norm(grad) > 0
    assert torch.linalg.vector_norm(compiled_grad - grad) < 1e-3 * torch.linalg.vector_norm(grad)
