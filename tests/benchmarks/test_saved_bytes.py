"""The memory claim: bytes kept by autograd for one sample of the full-size networks."""

import json

import pytest

from benchmarks.saved_bytes import RESULTS, count, markdown, total_mb


def test_patched_unet_keeps_at_most_470_mb():
    rows = count("sd15@512")
    plain, patched = total_mb(rows["plain"]), total_mb(rows["patched"])
    assert plain == pytest.approx(775, rel=0.005)
    assert patched <= 470
    assert rows["patched"].keys() <= {
        "fastcraft_geglu", "fastcraft_group_norm_silu", "fastcraft_layer_norm", "fastcraft_attention",
        "fastcraft_cross_attention",
    }  # fmt: skip
    committed = json.loads((RESULTS / "saved_bytes.json").read_text())
    for kind in ("plain", "patched"):
        assert total_mb(committed["models"]["sd15@512"][kind]) == pytest.approx(total_mb(rows[kind]), rel=1e-3)
    assert (RESULTS / "README.md").read_text() == markdown(committed)


@pytest.mark.parametrize(("tower", "share"), [("clip-vit-l/14", 0.72), ("blip-vit-l/16", 0.84)])
def test_patched_towers_keep_less(tower, share):
    """Of CLIP's quick GELU one tensor instead of two; of BLIP's attention no scores."""
    rows = count(tower)
    assert total_mb(rows["patched"]) <= share * total_mb(rows["plain"])
    assert {op for op in rows["patched"] if op.startswith("fastcraft")} == {
        "fastcraft_layer_norm",
        "fastcraft_attention",
    }
    committed = json.loads((RESULTS / "saved_bytes.json").read_text())["models"][tower]
    for kind in ("plain", "patched"):
        assert total_mb(committed[kind]) == pytest.approx(total_mb(rows[kind]), rel=1e-3)
