"""Pictures are reproducible, and the judge reads them back: the gates it must pass on rendered truth."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import avg_pool2d

from fastcraft.shapes.examine import examine_judge
from fastcraft.shapes.judge import exam, judge
from fastcraft.shapes.render import render
from fastcraft.shapes.scenes import Scene, Thing, relation_between, sample_scene

RED_CIRCLE = Thing("red", "circle", "large", "plain", 18.0, 20.0, 12.0)
BLUE_SQUARE = Thing("blue", "square", "small", "striped", 46.0, 44.0, 7.0)
BOTH = Scene((RED_CIRCLE, BLUE_SQUARE), "white", 0.8)


def test_the_same_seed_gives_the_same_pictures() -> None:
    first, second = (
        render([sample_scene(rng, num_things=n) for n in (1, 2, 3)]) for rng in (random.Random(7), random.Random(7))
    )
    assert torch.equal(first, second)
    assert first.shape == (3, 3, 64, 64)
    assert first.min() >= 0.0
    assert first.max() <= 1.0


def test_a_picture_does_not_depend_on_its_batch() -> None:
    scenes = [sample_scene(random.Random(seed), num_things=1 + seed % 3) for seed in range(12)]
    assert torch.equal(render(scenes)[5], render([scenes[5]])[0])
    assert render([]).shape == (0, 3, 64, 64)


def test_objects_do_not_touch_and_stay_inside() -> None:
    rng = random.Random(8)
    for scene in (sample_scene(rng, num_things=3) for _ in range(100)):
        for index, thing in enumerate(scene.things):
            assert thing.radius < thing.x < 64 - thing.radius
            for other in scene.things[:index]:
                gap = max(abs(thing.x - other.x), abs(thing.y - other.y)) - thing.radius - other.radius
                assert gap >= 3.0


def test_more_than_three_objects_are_refused() -> None:
    with pytest.raises(ValueError, match="num_things must be 1, 2 or 3, got 4"):
        sample_scene(random.Random(0), num_things=4)


def test_the_judge_passes_its_gates_on_rendered_truth() -> None:
    result = examine_judge(count=300)
    assert result["attributes_right"] >= 0.99
    assert result["false_agreement"] <= 0.05


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("a red circle and a blue square", None),
        ("a blue square and a red circle", None),
        ("a large plain red circle left of a small blue striped square on a white background", None),
        ("a blue circle and a red square", "color"),
        ("a green circle and a blue square", "color"),
        ("a red cross and a blue square", "shape"),
        ("a small red circle and a blue square", "size"),
        ("a red striped circle and a blue square", "pattern"),
        ("a red circle right of a blue square", "relation"),
        ("a red circle and a blue square on a black background", "background"),
        ("a red circle", "count"),
        ("There are two objects in the picture. One object is a red circle. Another object is a blue square.", None),
    ],
)
def test_each_kind_of_claim_is_judged(caption: str, wrong: str | None) -> None:
    # 28 across and 24 down: "left" by the larger offset
    verdict = judge(render([BOTH])[0], caption)
    assert verdict.fully_right == (wrong is None)
    assert wrong is None or wrong in {finding.kind for finding in verdict.findings if not finding.holds}


def test_a_missing_and_an_extra_object_break_the_count() -> None:
    extra = Thing("green", "cross", "small", "plain", 46.0, 14.0, 7.0)
    pictures = render([replace(BOTH, things=(RED_CIRCLE,)), replace(BOTH, things=(*BOTH.things, extra))])
    result = exam(pictures, ["a red circle and a blue square"] * 2)
    assert result["count"] == 0.0
    assert result["fully_right"] == result["two_object_fully_right"] == 0.0
    assert "background" not in result
    assert "one_object_fully_right" not in result


def test_an_empty_or_noisy_picture_is_never_right() -> None:
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    flat = torch.full((2, 3, 64, 64), 0.5)
    assert exam(torch.cat([noise, flat]), ["a red circle", "a red circle and a blue square"] * 2)["fully_right"] == 0.0


def test_blur_like_an_autoencoders_is_forgiven() -> None:
    scenes = [sample_scene(random.Random(seed), num_things=2) for seed in range(100)]
    captions = [f"a {a.color} {a.shape} and a {b.color} {b.shape}" for a, b in (scene.things for scene in scenes)]
    assert exam(avg_pool2d(render(scenes), 3, 1, 1, count_include_pad=False), captions)["fully_right"] >= 0.95


def test_a_relation_needs_a_clear_offset() -> None:
    assert relation_between(-20.0, 5.0) == "left"
    assert relation_between(3.0, 20.0) == "below"
    assert relation_between(3.0, -4.0) is None
    assert relation_between(10.0, 9.5, margin=1.25) is None


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 64, 64\), got \(1, 3, 32, 32\)"):
        judge(torch.zeros(3, 32, 32), "a red circle")
    with pytest.raises(ValueError, match="prompts must be one for each of the 2 images, got 1"):
        exam(torch.zeros(2, 3, 64, 64), ["a red circle"])
