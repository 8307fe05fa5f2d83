"""What a trained UNet costs at the size of Stable Diffusion 1.5, counted without computing anything."""

import json

import pytest

from benchmarks.trained_parts import RESULTS, guided_step, kept_inputs, markdown, networks, states_gb
from fastcraft.diffusion.patch import Patch
from fastcraft.forecast.tracker import AllocationTracker

ATTENTION, LINEAR, WHOLE = "UNet, LoRA on attention", "UNet, LoRA on all linear", "UNet, whole"


def committed():
    return json.loads((RESULTS / "trained_parts.json").read_text())


def held_mib(part):
    """Of one guided prediction of the patched UNet for one sample, from its forward to its backward."""
    unet = networks(part).unet
    with Patch(unet):
        step, latents, weights = guided_step(unet)
        latents.requires_grad_()
        with AllocationTracker([*weights, latents]) as tracker:
            output = step(latents)
            assert output.requires_grad
            return tracker.live / 2**20


def test_adapters_add_at_most_a_tenth_to_a_patched_step():
    text, attention, linear = (held_mib(part) for part in ("text", ATTENTION, LINEAR))
    assert text < attention < linear <= 1.1 * text
    with kept_inputs():  # what it is without `fastcraft.remade`
        assert held_mib(ATTENTION) > 1.15 * text
    for part, held in (("text", text), (ATTENTION, attention), (LINEAR, linear)):
        assert held == pytest.approx(committed()["bytes"]["patched"][part]["held_mib"], rel=2e-3)


def test_the_states_of_the_whole_unet_fit_a_card():
    one, eight = (states_gb(WHOLE, ranks) for ranks in (1, 8))
    assert 16 < one <= 20
    assert 5 < eight <= 6
    assert committed()["states"][WHOLE] == pytest.approx({"1": one, "8": eight})


def test_the_committed_figures_meet_their_gates():
    results = committed()
    for kind in ("plain", "patched"):
        rows = results["bytes"][kind]
        assert rows[ATTENTION]["held_mib"] <= 1.1 * rows["text"]["held_mib"]
    assert (RESULTS / "README.md").read_text() == markdown(results)
