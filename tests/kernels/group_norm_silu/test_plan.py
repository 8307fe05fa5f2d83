"""The plan covers every row and channel once, whatever the shape."""

import itertools

import pytest

from fastcraft_kernels.group_norm_silu.plan import SMALL_TILE_ELEMENTS, SmallPlan, make_plan
from fastcraft_kernels.launch import INTERPRETER
from fastcraft_kernels.testing import A100, H200

SAMPLES = (1, 2, 3, 16, 64)
ROWS = (1, 3, 63, 64, 65, 256, 257, 1024, 2304, 4096, 9216, 65_536, 262_144)
WIDTHS = (1, 4, 7, 8, 10, 16, 20, 30, 33, 40, 60, 80, 129)


@pytest.mark.parametrize("facts", [A100, H200, INTERPRETER], ids=["A100", "H200", "interpreter"])
@pytest.mark.parametrize(("num_groups", "itemsize"), [(32, 2), (32, 4), (5, 2)])
def test_every_row_and_channel_is_covered_once(facts, num_groups, itemsize):
    for samples, rows, width in itertools.product(SAMPLES, ROWS, WIDTHS):
        channels = width * num_groups
        plan = make_plan(facts, samples, rows, channels, num_groups=num_groups, itemsize=itemsize)
        if isinstance(plan, SmallPlan):
            assert num_groups % plan.num_owned == 0
            assert plan.tile_rows >= rows
            assert plan.num_owned * width <= plan.tile_channels
            assert plan.tile_rows * plan.tile_channels <= SMALL_TILE_ELEMENTS
            continue
        assert plan.split_rows % plan.tile_rows == 0
        assert (plan.num_splits - 1) * plan.split_rows < rows <= plan.num_splits * plan.split_rows  # none is empty
        assert plan.num_splits <= plan.max_splits
        assert plan.num_tiles * plan.tile_channels >= channels > (plan.num_tiles - 1) * plan.tile_channels
        for start in range(0, channels, plan.tile_channels):
            last = min(start + plan.tile_channels, channels) - 1
            assert last // width - start // width + 1 <= plan.max_groups
