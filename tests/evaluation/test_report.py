"""The report stands alone, shows what was measured, and trusts no text."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from fastcraft.errors import UserError
from fastcraft.evaluation.images import save_samples, to_uint8
from fastcraft.evaluation.progress import Progress
from fastcraft.evaluation.record import RunRecord, read_metrics
from fastcraft.evaluation.report import main, rebuild_report, write_report

EVIL = '<script>alert(1)</script><img src="https://evil.example/x.png" onerror=alert(2)> "\' &amp; \x00\ud800'
PROMPTS = ["a red circle", EVIL, "a long caption, word by word " * 20]
BEFORE = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
AFTER = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
VOID = {"meta", "img", "wbr", "circle", "line", "polyline"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is not closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(html)
        assert not self.open, f"tags left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.words += [] if tag == "wbr" else [" "]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"
            self.words.append(" ")

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def fill(run_dir, *, num_steps=12):
    quiet = Progress(num_steps, file=io.StringIO())
    with RunRecord(run_dir, num_steps=num_steps, total_samples_per_step=4, progress=quiet) as record:
        record.log_evaluation(0, {"fully_right": 0.25})
        for step in range(1, num_steps + 1):
            record.log_step(
                {
                    "step": step,
                    "loss": None if step == 3 else -step / 10,
                    "rewards": {"aesthetic": 5 + step / 10, EVIL: 0.5, "total": step / 10},
                    "grad_norm": 1.0,
                    "lr": 1e-6,
                    "samples_per_sec_per_gpu": 3.5,
                    "step_time_s": 2.0,
                    "peak_memory_mib": 2048.0,
                    "phase_ms": {"decode": 120.0, EVIL: 1.0},
                    EVIL: 1.0,
                    "skipped": step == 3,
                }
            )
        record.log_samples(num_steps // 2, (BEFORE + AFTER) / 2, PROMPTS)
        record.log_evaluation(num_steps, {"fully_right": 0.75, EVIL: 1.0})


def report(run_dir, *, before=BEFORE, after=AFTER, before_step=0, after_step=None, **changes):
    """The report of a run whose samples of the two steps are saved first."""
    metrics = read_metrics(run_dir)
    last = after_step if after_step is not None else metrics[-1]["step"] if metrics else before_step + 1
    for step, images in ((before_step, before), (last, after)):
        if images is not None:
            save_samples(images, run_dir, step=step, prompts=changes.get("prompts", PROMPTS))
    changes |= {"before_step": before_step, "after_step": after_step}
    arguments = {
        "title": f"Run {EVIL}",
        "recipe_text": f'[model]\npath = "shapes"  # {EVIL}\n',
        "prompts": PROMPTS,
        "exam_before": {"reward/total": 0.25, "reward_se/total": 0.0625, "fully_right": 0.5, EVIL: 1.0},
        "exam_after": {"reward/total": 0.75, "reward_se/total": 0.125, "fully_right": 0.375, EVIL: float("nan")},
        "environment": {"versions": {"torch": "2.13.0"}, "cpu": EVIL, "devices": [{"name": "H200"}], "cuda": None},
        "notes": [f"note {EVIL}"],
        "command": f"deepspeed fastcraft/train.py {EVIL}",
    }
    return write_report(run_dir, **(arguments | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    fill(run_dir)
    return report(run_dir)


@pytest.fixture(scope="module")
def page(finished):
    return Page(finished.read_text(encoding="utf-8"))


def decoded(source):
    kind, _, data = source.partition(";base64,")
    assert kind.startswith("data:image/")
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        return np.asarray(picture.convert("RGB"))


def test_it_needs_nothing_but_itself(page, finished):
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base", "form", "a"})
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}> is a script"
            if name in ("src", "href", "srcset"):
                assert value.startswith("data:image/"), f"<{tag} {name}> leaves the file"
    style = re.search(r"<style>(.*?)</style>", finished.read_text(), re.S)[1]
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_untrusted_text_is_shown_as_text(page):
    shown = " ".join(EVIL.replace("\x00", " ").replace("\ud800", "\ufffd").split())
    # title and heading, note, two captions, two curves, exam row, phase, command, recipe, environment
    assert page.text.count("<script>alert(1)</script>") == 12
    assert shown in page.text


def test_the_pictures_are_inside_in_pairs(page):
    pictures = [decoded(attributes["src"]) for attributes in page.all("img")]
    expected = [picture for pair in zip(to_uint8(BEFORE), to_uint8(AFTER), strict=True) for picture in pair]
    assert len(pictures) == 6 + 3 * 3, "three pairs, and three strips of three steps"
    for shown, given in zip(pictures, expected, strict=False):
        assert np.array_equal(shown, given)
    assert np.array_equal(pictures[7], to_uint8((BEFORE + AFTER) / 2)[0]), "the strip's middle is the middle step"


def test_there_is_a_curve_for_everything(page):
    labels = [attributes["aria-label"] for attributes in page.all("svg")]
    for name in (
        "Total reward",
        "aesthetic",
        "<script>",
        "Loss",
        "Gradient norm",
        "Learning rate",
        "Samples/s",
        "step_time",
    ):
        assert any(label.startswith(name) for label in labels), f"no curve for {name}"
    assert labels[0].startswith("Total reward from 0.1 at step 1 to 1.2 at step 12")


def test_figures_in_words(page):
    assert "the curves go on" not in page.text
    assert "total reward 0.25 ± 0.062 0.75 ± 0.12 +0.5" in page.text
    assert "fully_right 0.5 0.375 \u22120.125" in page.text
    for part in (
        "steps 12",
        "pictures made 48",
        "total reward 1.2 from 0.1",
        "peak memory 2.00 GiB",
        "time in steps 0:24",
    ):
        assert part in page.text
    assert "skipped steps 1" in page.text
    assert "versions.torch 2.13.0" in page.text
    assert "devices.0.name H200" in page.text
    assert "decode 120 ms" in page.text


def test_rebuilt_from_files_it_is_the_same(finished):
    first = finished.read_bytes()
    finished.unlink()
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "fastcraft.evaluation.report", str(finished.parent)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(finished)
    assert finished.read_bytes() == first


def test_a_run_that_was_killed_still_has_a_report(tmp_path):
    fill(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    (tmp_path / "recipe.toml").write_text("[train]\nnum_steps = 99\n")
    (tmp_path / "environment.json").write_text('{"cpu": "some processor"}')
    page = Page(rebuild_report(tmp_path).read_text())
    assert "has not finished; its last recorded step is 12" in page.text
    assert "num_steps = 99" in page.text
    assert "some processor" in page.text
    assert "fully_right 0.25 0.75 +0.5" in page.text
    assert len(page.all("img")) == 3, "pictures of one step stand alone"


def test_without_metrics_it_is_a_comparison(tmp_path):
    page = Page(report(tmp_path, recipe_text="", command="").read_text())
    assert len(page.all("img")) == 6
    assert not page.all("svg")
    assert "total reward 0.25" in page.text


def test_large_pictures_are_embedded_smaller(tmp_path):
    page = Page(report(tmp_path, before=torch.rand(3, 3, 300, 1000), after=torch.rand(3, 3, 300, 1000)).read_text())
    source = page.all("img")[0]["src"]
    assert source.startswith("data:image/jpeg")
    assert decoded(source).shape == (230, 768, 3)


def test_stored_pictures_are_enough(tmp_path):
    fill(tmp_path)
    page = Page(report(tmp_path, before=None, after=None, before_step=6, after_step=6).read_text())
    assert len(page.all("img")) == 3
    assert "are of step 6; the curves go on to step 12" in page.text


@pytest.mark.parametrize("make", ["nothing", "empty", "damaged"])
def test_what_cannot_be_reported_is_one_line(tmp_path, capsys, make):
    run_dir = tmp_path / "run"
    if make != "nothing":
        run_dir.mkdir()
    if make == "damaged":
        (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 1, "rewards": {}}) + "\n")
        (run_dir / "report.json").write_text('{"title": ')
    assert main([str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    with pytest.raises(UserError):
        rebuild_report(run_dir)
