"""The count of bytes moved: by hand on small ops, and the committed table."""

import json

import pytest
import torch

from benchmarks.traffic import RESULTS, Traffic, count, markdown, sums_before_norms, vae
from fastcraft_kernels.group_norm_silu import group_norm_silu


def moved(call):
    with Traffic() as traffic:
        call()
    return {op: round(size * 1e6) for op, size in traffic.megabytes.items()}


def test_ops_counted_by_hand():
    x, weight, row = torch.zeros(4, 8), torch.zeros(8, 16), torch.zeros(16)
    assert moved(lambda: x @ weight) == {"aten::mm": 4 * (32 + 128 + 64)}
    assert moved(lambda: x.t().reshape(2, 16)[:1]) == {"aten::clone": 4 * (32 + 32)}
    assert moved(lambda: row.expand(3, 16) + 1) == {"aten::add": 4 * (16 + 48)}
    assert moved(lambda: x * x) == {"aten::mul": 4 * (32 + 32)}


@pytest.mark.parametrize(("size", "reads"), [(16, 1), (17, 2)])
def test_a_large_plane_is_read_twice(size, reads):
    x, ones = torch.zeros(1, 4, size, size), torch.ones(4)
    n, statistics = x.numel(), 2 * 2
    counted = moved(lambda: group_norm_silu(x, ones, ones, num_groups=2, eps=1e-5))
    assert counted == {"fastcraft::group_norm_silu": 4 * ((reads + 1) * n + 4 + statistics)}


def test_committed_results():
    committed = json.loads((RESULTS / "traffic.json").read_text())
    assert (RESULTS / "README.md").read_text() == markdown(committed)
    rows, kept = count(vae), committed["networks"]["vae, 1 picture"]
    assert rows["fold"] == pytest.approx(kept["fold"], rel=1e-6)
    for kind in ("plain", "patched"):
        assert sum(rows[kind].values()) == pytest.approx(sum(kept[kind].values()), rel=0.05)
    assert sum(rows["patched"].values()) < 0.7 * sum(rows["plain"].values())


def test_sums_before_norms_of_a_decoder():
    decoder = vae()[0]
    names = {id(module): name for name, module in decoder.named_modules()}
    assert [names[id(module)] for module in sums_before_norms(decoder)] == [
        "mid_block.attentions.0", "mid_block.resnets.1",
        *(f"up_blocks.{block}.resnets.{index}" for block in range(4) for index in (1, 2)), "conv_norm_out",
    ]  # fmt: skip
