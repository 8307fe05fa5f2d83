"""When held-out rewards contradict the trained one."""

import pytest
import torch

from fastcraft.evaluation.held_out import falling, held_out_means
from fastcraft.records import RewardOutput


def series(total, **held_out):
    """Evaluations as they are on file: one before the run, then the grid's."""
    rows = [{"reward/total": 100.0, "held_out/a": 100.0}]
    for i, value in enumerate(total):
        own = {f"grid/held_out/{name}": values[i] for name, values in held_out.items()}
        rows.append({"grid/reward/total": value, **own})
    return rows


def test_names_those_that_fell_every_time():
    rows = series([1, 2, 3, 4], a=[4, 3, 2, 1], b=[1, 2, 3, 4], c=[4, 3, 3, 2])
    assert falling(rows, patience=3) == ["a"]
    assert falling(rows, patience=1) == ["a", "c"]


@pytest.mark.parametrize(
    ("total", "held_out", "patience"),
    [
        ([1, 2, 2], [3, 2, 1], 2),  # the trained one stands still
        ([1, 2, 3], [3, 2, 2], 2),
        ([3, 2, 1], [3, 2, 1], 2),  # both fall: no contradiction
        ([1, 2], [2, 1], 2),  # too few
        ([1, 2, 3], [3, 2, 1], 3),  # the evaluation before the run is of other pictures
        ([1, None, 3], [3, 2, 1], 2),  # not finite
        ([1, 2, 3], [3, None, 1], 2),
        ([], [], 1),
    ],
)
def test_anything_less_is_no_alarm(total, held_out, patience):
    assert falling(series(total, a=held_out), patience=patience) == []


def test_only_the_newest_count():
    assert falling(series([9, 1, 2, 3], a=[0, 3, 2, 1]), patience=2) == ["a"]
    assert falling(series([1, 2, 3, 3], a=[4, 3, 2, 1]), patience=2) == []


def test_a_reward_that_was_not_held_out_before_is_waited_for():
    rows = [*series([1, 2], a=[3, 2]), {"grid/reward/total": 3, "grid/held_out/a": 1, "grid/held_out/new": 1}]
    assert falling(rows, patience=2) == ["a"]


def test_means_are_of_each_reward_and_without_the_total():
    def rewards(images, prompts):
        bright = images.mean(dim=(1, 2, 3))
        return RewardOutput(total=bright, parts={"bright": bright, "dark": 1 - bright})

    images = torch.tensor([0.0, 0.25, 0.5]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert held_out_means(images, list("abc"), rewards=rewards, micro_batch=2) == {
        "held_out/bright": 0.25,
        "held_out/dark": 0.75,
    }
