"""The record of a run: what is in the files, and what a kill, a resume or a NaN leaves behind."""

import io
import json
import math

import pytest
import torch

from fastcraft.errors import UserError
from fastcraft.evaluation.progress import Progress
from fastcraft.evaluation.record import METRIC_KEYS, RunRecord, finite, read_evaluations, read_metrics


def entry(step, **changes):
    figures = {
        "step": step,
        "loss": -0.5,
        "rewards": {"total": 0.5, "aesthetic": 5.25},
        "grad_norm": 1.5,
        "lr": 1e-6,
        "samples_per_sec_per_gpu": 3.5,
        "step_time_s": 2.0,
        "peak_memory_mib": 1024.0,
    }
    return figures | changes


def open_record(run_dir, **changes):
    arguments = {"num_steps": 10, "total_samples_per_step": 4, "progress": Progress(10, file=io.StringIO())} | changes
    return RunRecord(run_dir, **arguments)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars(run_dir, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_one_line_per_step_with_every_key(tmp_path):
    with open_record(tmp_path / "new" / "run") as record:
        record.log_step(entry(1))
        assert len(lines_of(tmp_path / "new" / "run" / "metrics.jsonl")) == 1, "a line must be on disk at once"
        record.log_step(entry(2, loss=torch.tensor(0.25), phase_ms={"decode": 3.5}, skipped=False))
    first, second = lines_of(tmp_path / "new" / "run" / "metrics.jsonl")
    assert first == entry(1) | {"num_samples_seen": 4}
    assert second == entry(2, loss=0.25, phase_ms={"decode": 3.5}, skipped=False) | {"num_samples_seen": 8}
    assert set(METRIC_KEYS) <= set(first)
    assert read_metrics(tmp_path / "new" / "run") == [first, second]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)], ids=repr)
def test_what_is_not_finite_becomes_null(tmp_path, value):
    with open_record(tmp_path) as record:
        record.log_step(entry(1, loss=value, rewards={"total": value, "aesthetic": 5.0}))
        record.log_evaluation(1, {"fully_right": value})
    text = (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "evaluations.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    (line,) = read_metrics(tmp_path)
    assert line["loss"] is None
    assert line["rewards"] == {"total": None, "aesthetic": 5.0}
    assert read_evaluations(tmp_path) == [{"step": 1, "evaluation": {"fully_right": None}}]


@pytest.mark.parametrize("value", [object(), torch.zeros(2), {1: 2.0}], ids=["object", "tensor", "key"])
def test_what_is_no_figure_is_refused(value):
    with pytest.raises(ValueError, match="a recorded"):
        finite({"figure": value})


def test_a_missing_key_and_a_repeated_step_are_refused(tmp_path):
    with open_record(tmp_path) as record:
        with pytest.raises(ValueError, match="missing: grad_norm"):
            record.log_step({key: value for key, value in entry(1).items() if key != "grad_norm"})
        record.log_step(entry(1))
        with pytest.raises(ValueError, match=r"above the last one \(1\), got 1"):
            record.log_step(entry(1))


def test_a_torn_last_line_is_left_out(tmp_path):
    with open_record(tmp_path) as record:
        record.log_step(entry(1))
        record.log_step(entry(2))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert [line["step"] for line in read_metrics(tmp_path)] == [1], f"cut after {cut} bytes"
    assert read_metrics(tmp_path / "nowhere") == []


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2"):
        read_metrics(tmp_path)


def test_resume_drops_later_lines_and_the_torn_one(tmp_path):
    with open_record(tmp_path) as record:
        for step in range(1, 6):
            record.log_step(entry(step))
            record.log_evaluation(step, {"fully_right": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with open_record(tmp_path, resume_step=3, total_samples_per_step=2) as record:
        assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [1, 2, 3]
        record.log_step(entry(4, loss=7.0))
        record.log_evaluation(4, {"fully_right": 0.9})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (1, -0.5), (2, -0.5), (3, -0.5), (4, 7.0),
    ]  # fmt: skip
    assert [line["step"] for line in read_evaluations(tmp_path)] == [1, 2, 3, 4]
    assert read_metrics(tmp_path)[-1]["num_samples_seen"] == 3 * 4 + 2
    assert scalars(tmp_path, "train/loss") == [(1, -0.5), (2, -0.5), (3, -0.5), (4, 7.0)]
    assert not list(tmp_path.glob(".*")), "a temporary file was left"


def test_a_new_run_never_mixes_with_an_old_one(tmp_path):
    with open_record(tmp_path) as record:
        record.log_step(entry(1))
    with pytest.raises(UserError, match=r"--run-dir: .* already holds metrics\.jsonl"):
        open_record(tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_the_newest_evaluation_of_a_step_counts(tmp_path):
    with open_record(tmp_path) as record:
        record.log_evaluation(5, {"fully_right": 0.1})
        record.log_evaluation(0, {"fully_right": 0.0})
        record.log_evaluation(5, {"fully_right": 0.2})
    assert [(line["step"], line["evaluation"]["fully_right"]) for line in read_evaluations(tmp_path)] == [
        (0, 0.0), (5, 0.2),
    ]  # fmt: skip


def test_tensorboard_reads_everything_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_record(tmp_path) as record:
        record.log_step(entry(1, loss=0.5, phase_ms={"decode": 3.5}))
        record.log_step(entry(2, loss=math.nan))
        record.log_evaluation(2, {"fully_right": 0.25, "broken": None})
        record.log_samples(2, torch.rand(2, 3, 8, 8), ["a", "b"])
    assert scalars(tmp_path, "train/loss") == [(1, 0.5)]
    assert scalars(tmp_path, "rewards/aesthetic") == [(1, 5.25), (2, 5.25)]
    assert scalars(tmp_path, "phase_ms/decode") == [(1, 3.5)]
    assert scalars(tmp_path, "evaluation/fully_right") == [(2, 0.25)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("samples")
    assert image.step == 2
    assert image.width > 2 * 192
