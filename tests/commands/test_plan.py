"""``fastcraft plan``: a plan for a card that is not there, from configurations alone; bad input in one line."""

import json

import pytest

from fastcraft.cli import main


def plan(folder, *options):
    return main(["plan", "--model", str(folder), "--rewards", "", "--dtype", "float32", "--steps", "6", *options])


def test_prints_and_writes_the_plan(tiny_pipeline, tmp_path, capsys):
    file = tmp_path / "out" / "plan.json"
    assert plan(tiny_pipeline, "--device", "64MiB", "--depth", "3", "--json", str(file)) == 0
    printed = capsys.readouterr().out
    for text in ("16 px, float32, guided, T = 6, K = 3", "not calibrated on a card yet", "saved by steps", "samples/s"):
        assert text in printed
    result = json.loads(file.read_text())
    best = result["best"]
    assert best["peak_bytes"] <= result["budget_bytes"] == 64 * 2**20
    assert len(best["plan"]["steps"]) == 3
    assert sum(best["prediction"]["bytes_by_kind"].values()) == best["peak_bytes"]
    fastest = max(result["batches"], key=lambda row: row["samples_per_sec"])
    assert best["batch_size"] == fastest["batch_size"] > 1
    assert result["calibrated"] is False


def test_the_fused_ops_are_part_of_it_unless_asked_otherwise(tiny_pipeline, tmp_path, capsys, monkeypatch):
    for name in ("TREATMENTS", "OFFLOADS"):  # the policy's own is enough
        monkeypatch.setattr(f"fastcraft.forecast.phases.{name}", ())
    file, saved = tmp_path / "plan.json", []
    for kernels in ("auto", "reference"):
        options = ["--device", "h200", "--depth", "2", "--batch", "1", "--policy", "none", "--json", str(file)]
        assert plan(tiny_pipeline, *options, "--kernels", kernels) == 0
        saved.append(json.loads(file.read_text())["best"]["prediction"]["saved_bytes"])
    assert saved[0] < 0.8 * saved[1]
    assert "kernels    none" in capsys.readouterr().out


def test_another_policy_is_predicted_as_it_is(tiny_pipeline, capsys):
    assert plan(tiny_pipeline, "--device", "h200", "--depth", "4", "--batch", "2", "--policy", "segment:2") == 0
    assert "batch 2: 4 keep in segments of 2; decode recompute, 2 at once" in capsys.readouterr().out


def test_offloading_says_what_lies_on_the_host(tiny_pipeline, tmp_path, capsys):
    options = ["--device", "4090", "--depth", "4", "--batch", "2", "--json", str(tmp_path / "plan.json")]
    assert plan(tiny_pipeline, *options, "--policy", "offload:attention+conv") == 0
    assert "in host memory" in capsys.readouterr().out
    prediction = json.loads((tmp_path / "plan.json").read_text())["best"]["prediction"]
    assert prediction["host_bytes"] > 10 * prediction["saved_bytes"]


def test_steps_in_batches_are_predicted_for_a_stop_gradient(tiny_pipeline, capsys):
    options = ["--device", "h200", "--depth", "4", "--batch", "2", "--no-input-grad"]
    assert plan(tiny_pipeline, *options, "--policy", "batched:3") == 0
    assert "batch 2: 4 recompute in batches of 3; decode recompute, 2 at once" in capsys.readouterr().out
    assert plan(tiny_pipeline, *options) == 0
    # so small a model does nothing but start ops
    assert "batch 2: 4 recompute in batches of 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "h20"], "--device: expected a card or a size such as 24GiB, got 'h20'; did you mean 'h200'?"),
        (["--device", "1KiB"], "nothing fits on 9.54e-07 GiB (rates of an A100): batch 1 at depth 5 takes at least"),
        (["--device", "h200", "--depth", "7"], "--depth must be at most --steps (6), got 7"),
        (["--device", "h200", "--depth", "0"], "--depth must be at least 1, got 0"),
        (["--device", "h200", "--guidance", "0.5"], "--guidance must be at least 1, got 0.5"),
        (["--device", "h200", "--rewards", "hpsv3"], "--rewards: no architecture known for 'hpsv3'"),
        (["--device", "h200", "--resolution", "20"], "--model: resolution must be a multiple of 16, got 20"),
        (["--device", "h200", "--policy", "stpe"], "--policy: unknown policy 'stpe'; did you mean 'step'?"),
        (
            ["--device", "h200", "--policy", "batched:2"],
            "--policy: 'batched:2' needs a stop-gradient on the UNet's input (input_grad = false)",
        ),
        (["--device", "1MiB", "--policy", "none"], "--policy: 'none' takes"),
        (["--device", "h200", "--json", __file__ + "/plan.json"], "--json: cannot write"),
        (["--device", "h200", "--model", "sd16"], "--model: expected a diffusers folder or one of sd15, sd21, sdxl"),
    ],
)
def test_bad_input_is_one_line(tiny_pipeline, capsys, options, message):
    assert plan(tiny_pipeline, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fastcraft: error: ")
    assert message in error
