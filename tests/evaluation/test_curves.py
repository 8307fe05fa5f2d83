"""Curves show the figures that were recorded."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from fastcraft.evaluation.curves import (
    HEIGHT,
    MAX_DRAWN,
    WIDTH,
    curve_svg,
    make_frame,
    nice_ticks,
    short,
    smooth,
    smoothing_window,
)


def polylines(svg, style):
    found = ElementTree.fromstring(svg).iter("polyline")
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in found
        if line.get("class") == style
    ]


def test_a_curve_goes_through_its_points_in_proportion():
    svg = curve_svg([1, 2, 4], [0.0, 10.0, 5.0], label="loss")
    ((low, high, middle),) = polylines(svg, "smooth")
    assert (middle[0] - low[0]) == pytest.approx(3 * (high[0] - low[0]), abs=0.2)
    assert high[1] < middle[1] < low[1]
    assert middle[1] == pytest.approx((low[1] + high[1]) / 2, abs=0.2)
    assert 'aria-label="loss from 0 at step 1 to 5 at step 4"' in svg


def test_raw_is_thin_and_the_thick_line_is_calmer():
    values = [math.sin(step) for step in range(100)]
    svg = curve_svg(list(range(100)), values, label="x")
    (raw,), (calm,) = polylines(svg, "raw"), polylines(svg, "smooth")
    assert len(raw) == len(calm) == 100

    def spread(line):
        return max(y for _, y in line) - min(y for _, y in line)

    assert spread(calm) < spread(raw) / 2
    assert not polylines(curve_svg(list(range(100)), values, label="x", exact=True), "raw")


def test_a_null_leaves_a_gap():
    svg = curve_svg([1, 2, 3, 4, 5], [1.0, 2.0, None, math.nan, 1.0], label="x")
    assert [len(line) for line in polylines(svg, "smooth")] == [2, 1]
    assert "nan" not in svg.lower()
    assert "no finite value" in curve_svg([1, 2], [None, math.inf], label="x")


def test_a_spike_does_not_flatten_the_rest():
    values = [1.0 + 0.1 * (step % 3) for step in range(100)]
    values[50] = 1e6
    frame = make_frame(list(enumerate(values)))
    assert frame.high < 3
    svg = curve_svg(list(range(100)), values, label="x")
    assert "1 outside" in svg
    assert all(0 <= y <= HEIGHT for line in polylines(svg, "raw") + polylines(svg, "smooth") for _, y in line)


@pytest.mark.parametrize("values", [[5.0], [5.0] * 30, [0.0, 0.0], [1e-6] * 3, [-1e12, 1e12]], ids=str)
def test_flat_single_and_huge_stay_inside(values):
    svg = curve_svg(list(range(len(values))), values, label="x")
    for x, y in re.findall(r"([\d.-]+),([\d.-]+)", " ".join(re.findall(r'points="([^"]*)"', svg))):
        assert 0 <= float(x) <= WIDTH
        assert 0 <= float(y) <= HEIGHT
    assert ("<circle" in svg) == (len(values) == 1)


def test_a_long_run_is_thinned_but_keeps_its_extremes():
    values = [0.0] * 20000
    values[7001], values[13003] = 1.0, -1.0
    (raw,) = polylines(curve_svg(list(range(20000)), values, label="x"), "raw")
    assert len(raw) <= MAX_DRAWN
    assert len({y for _, y in raw}) == 3


def test_a_label_cannot_break_out():
    svg = curve_svg([1, 2], [1.0, 2.0], label='"><script>alert(1)</script>')
    assert "<script" not in svg
    ElementTree.fromstring(svg)


def test_smoothing_is_a_centred_mean():
    assert smooth([0.0, 3.0, 6.0, 9.0], 3) == [1.5, 3.0, 6.0, 7.5]
    assert smooth([1.0, 5.0], 1) == [1.0, 5.0]
    assert [smoothing_window(count) for count in (1, 9, 10, 100, 1000)] == [1, 1, 3, 11, 101]


def test_ticks_and_figures_are_round():
    assert nice_ticks(0.0, 1.0, 4) == pytest.approx([0.0, 0.5, 1.0])
    assert nice_ticks(-3.0, 47.0, 4) == pytest.approx([0, 20, 40])
    assert [short(value) for value in (0.0, 1e-6, 2.5e-5, 0.71428, 12.0, 41231.5, 1e9)] == [
        "0", "1e-6", "2.5e-5", "0.7143", "12", "41,232", "1e9",
    ]  # fmt: skip
