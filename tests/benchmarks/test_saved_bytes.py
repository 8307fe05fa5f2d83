"""The memory claim: bytes kept by autograd for one sample and step of the full-size Stable Diffusion 1.5 UNet."""

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
