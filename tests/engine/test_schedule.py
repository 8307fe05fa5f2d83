"""Learning rates as a pure function."""

import math

import pytest

from fastcraft.engine.schedule import lr_at


def rates(schedule, warmup_steps=4, total_steps=12):
    return [
        lr_at(step, peak=2.0, warmup_steps=warmup_steps, total_steps=total_steps, schedule=schedule)
        for step in range(total_steps)
    ]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warm_up_begins_at_one_part_and_no_update_has_rate_zero(schedule):
    assert rates(schedule)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert min(rates(schedule)) > 0
    assert rates(schedule, warmup_steps=0)[0] == 2.0


def test_after_the_warm_up():
    assert rates("constant")[4:] == [2.0] * 8
    assert rates("cosine")[8] == pytest.approx(1.0)
    assert rates("cosine")[11] == pytest.approx(1 + math.cos(math.pi * 7 / 8))
    assert lr_at(99, peak=2.0, warmup_steps=4, total_steps=12, schedule="cosine") == 0.0


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'linear'"):
        lr_at(0, peak=1.0, warmup_steps=0, total_steps=1, schedule="linear")
