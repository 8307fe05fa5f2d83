"""Measured rows beside predicted ones: what a row counts, and how rows are shown; the command on the tiny model."""

import csv
import gc
import io
import json

import pytest
import torch
from torch import nn

from fastcraft.cli import main
from fastcraft.forecast.estimate import Prediction
from fastcraft.forecast.plot import plot
from fastcraft.forecast.profile import Row, as_csv, measure_row, table, time_steps

MIB = 2**20


def row(depth=1, policy="none", **changes):
    values = {
        "depth": depth, "policy": policy, "plan": "1 keep", "held_mib": 8.0, "peak_mib": 10.0 * depth,
        "allocator_peak_mib": None, "resident_peak_mib": 12.0, "predicted_peak_mib": 11.0 * depth, "seconds": 0.5,
        "predicted_seconds": 0.4,
    }  # fmt: skip
    return Row(**(values | changes))


def prediction(peak):
    return Prediction(
        batch_size=1,
        peak_bytes=peak,
        at="",
        bytes_by_kind={},
        saved_bytes=0,
        host_bytes=0,
        seconds_by_phase={"all": 1.0},
        flops=0,
    )


def test_a_row_counts_what_lies_above_the_weights():
    linear = nn.Linear(MIB // 4, 4, bias=False)  # 4 MiB of weights, as much of gradient; 1 MiB of input
    x = torch.ones(1, MIB // 4)

    def step():
        return linear(x.sin()).sum()

    measured = measure_row(
        step, depth=2, policy="none", plan="", predicted=prediction(7 * MIB), static_bytes=2 * MIB,
        weights=[*linear.parameters(), x], device=torch.device("cpu"),
    )  # fmt: skip
    assert measured.held_mib == pytest.approx(1, abs=0.01)
    assert measured.peak_mib == pytest.approx(5, abs=0.01)
    assert measured.predicted_peak_mib == 5
    assert measured.error == pytest.approx(0, abs=0.01)
    assert linear.weight.grad is None


def test_settings_are_timed_in_turn(monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: 0)  # slow beside all that other tests leave
    order, weight = [], torch.ones(2, requires_grad=True)

    def step(name):
        def run():
            assert weight.grad is None
            order.append(name)
            return weight.sum()

        return run

    seconds = time_steps([step("a"), step("b")], weights=[weight], device=torch.device("cpu"), repeats=3)
    assert order == ["a", "b"] * 3
    assert len(seconds) == 2
    assert weight.grad is None


def test_the_allocator_is_believed_where_there_is_one():
    assert row().error == pytest.approx(0.1)
    assert row(allocator_peak_mib=22.0).error == pytest.approx(-0.5)


def test_rows_are_shown_and_written():
    rows = [row(depth, policy) for policy in ("none", "step") for depth in (1, 5)]
    shown = table(rows).splitlines()
    assert len(shown) == 5
    assert shown[1].split()[:5] == ["1", "none", "8.0", "10.0", "11.0"]
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [entry["depth"] for entry in read] == ["1", "5", "1", "5"]
    assert read[0]["allocator_peak_mib"] == ""


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_plot_is_written(tmp_path, ending):
    path = tmp_path / "new" / f"memory.{ending}"
    plot([row(depth, policy) for policy in ("none", "step") for depth in (1, 5)], path, title="tiny")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") if ending == "png" else b"<svg" in content


@pytest.fixture
def recipe(tiny_pipeline, tmp_path, tmp_path_factory, monkeypatch):
    """The estimate is made once for all tests of this file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "profile_estimates"))
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog\n")
    path = tmp_path / "tiny.toml"
    path.write_text(
        f"""
model.path = "{tiny_pipeline}"
prompts.path = "{tmp_path / "prompts.txt"}"
sampler.num_inference_steps = 4
train.dtype = "float32"
train.batch_size = 2
[[rewards]]
name = "brightness"
"""
    )
    gc.collect()
    gc.freeze()  # profile collects before every run, slow beside all that other tests leave
    yield path
    gc.unfreeze()


def test_the_command_measures_every_setting(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--depths", "2,4", "--policies", "none,step,auto", "--repeats", "1", "--out", str(out)]
    assert main(["profile", "--recipe", str(recipe), *options]) == 0
    assert "sac" not in capsys.readouterr().out  # with memory to spare, auto keeps everything
    rows = json.loads((out / "memory_by_depth.json").read_text())["rows"]
    assert [(r["depth"], r["policy"]) for r in rows] == [(d, p) for d in (2, 4) for p in ("none", "step", "auto")]
    peaks = {(r["depth"], r["policy"]): r["peak_mib"] for r in rows}
    growth = {policy: peaks[4, policy] - peaks[2, policy] for policy in ("none", "step")}
    assert growth["none"] > 0.5 * peaks[2, "none"]
    assert growth["step"] < 0.1 * growth["none"]  # from the third step on there is none at all
    assert peaks[4, "auto"] == pytest.approx(peaks[4, "none"], rel=0.01)
    for entry in rows:
        assert entry["predicted_peak_mib"] == pytest.approx(entry["peak_mib"], rel=0.05), entry
    assert (out / "memory_by_depth.csv").is_file()
    assert (out / "memory_by_depth.png").is_file()


def test_all_steps_in_the_memory_of_one(recipe, tmp_path):
    """Real runs: where the budget is what one step takes that keeps everything, T = 12 take no more."""
    options = ["--recipe", str(recipe), "--repeats", "1", "--out", str(tmp_path), "--set", "train.batch_size=1"]
    options += ["--set", "sampler.num_inference_steps=12", "--name", "t.12"]

    def rows(*more):
        assert main(["profile", *options, *more]) == 0
        return json.loads((tmp_path / "t.12.json").read_text())["rows"]

    (one,) = rows("--depths", "1", "--policies", "none")
    budget = (one["predicted_peak_mib"] + one["predicted_static_mib"]) / 2**10
    shallow, deep = rows("--depths", "1,12", "--policies", "auto", "--set", f"memory.budget_gib={budget}")
    assert shallow["plan"].startswith("1 keep")
    assert "recompute" in deep["plan"].partition(";")[0]
    for name in ("held_mib", "peak_mib"):
        assert shallow[name] == pytest.approx(one[name], rel=0.01), name
        assert deep[name] <= 1.05 * shallow[name], name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--depths", "1,x"], "--depths must be numbers of steps, 1 or more, joined by commas, got '1,x'"),
        (["--depths", "9"], "--depths must be at most sampler.num_inference_steps (4), got 9"),
        (["--policies", " , "], "--policies: at least one name is required, got ' , '"),
        (["--depths", "1", "--out", f"{__file__}/out"], "--out: cannot make the folder"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--depths", "1", "--policies", "non"], "memory.policy: unknown policy 'non'; did you mean 'none'?"),
    ],
)
def test_bad_input_is_one_line(recipe, capsys, options, message):
    assert main(["profile", "--recipe", str(recipe), *options]) == 2
    assert message in capsys.readouterr().err
