"""``fastcraft score``: pairing, batching, the three outputs, bad input."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastcraft.cli import main

LEVELS = {"2.png": 40, "10.png": 80, "1.jpg": 0, "big.webp": 200}
ORDER = ["1.jpg", "2.png", "10.png", "big.webp"]


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name, level in LEVELS.items():
        size = (24, 16) if name.startswith("big") else (16, 16)
        Image.fromarray(np.full((size[1], size[0], 3), level, dtype=np.uint8)).save(images / name)
    (images / "notes.txt").write_text("no picture")
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\nfour, with a comma\n")
    (tmp_path / "scoring_functions.py").write_text(
        "def length(images, prompts):\n"
        "    sizes.append(len(prompts))\n"
        "    return [float('nan') if p == 'two' else float(len(p)) for p in prompts]\n"
        "sizes = []\n"
    )
    return tmp_path


@pytest.fixture
def score(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "scoring_functions", raising=False)

    def go(*extra):
        return main(["score", "--images", str(folder / "images"), "--prompts", str(folder / "prompts.txt"), *extra])

    return go


CALLABLE = ("--set", "callable.function=scoring_functions:length")


def test_table_json_and_csv_agree(score, folder, capsys):
    out = ["--json", str(folder / "s.json"), "--csv", str(folder / "s.csv")]
    assert score("--rewards", "brightness,callable", *CALLABLE, *out, "--batch-size", "2", "--device", "cpu") == 1
    content = json.loads((folder / "s.json").read_text())
    assert [row["file"] for row in content["pictures"]] == ORDER, "natural order"
    assert [row["prompt"] for row in content["pictures"]] == ["one", "two", "three", "four, with a comma"]
    bright = [row["scores"]["brightness"] for row in content["pictures"]]
    assert bright == pytest.approx([LEVELS[name] / 255 for name in ORDER], abs=0.02)
    assert [row["scores"]["callable"] for row in content["pictures"]] == [3.0, None, 5.0, 18.0]
    assert content["settings"]["callable"]["function"] == "scoring_functions:length"
    with (folder / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ORDER
    assert [float(row["brightness"]) for row in rows] == bright
    assert [row["callable"] for row in rows] == ["3.0", "", "5.0", "18.0"]
    assert rows[3]["prompt"] == "four, with a comma"
    printed = capsys.readouterr()
    table = {line.split()[0]: line.split() for line in printed.out.splitlines()}
    assert float(table["brightness"][1]) == pytest.approx(sum(bright) / 4, abs=1e-4)
    assert table["callable"][-3:] == ["3", "of", "4"], "the score that is not a number is left out, and said"
    assert table["callable"][3:5] == ["3.0000", "1.jpg"]
    assert "warning: 1 of 4 scores of callable are not finite numbers: 2.png\n" in printed.err
    assert "note: --images: no pictures by their names, so not read: notes.txt\n" in printed.err
    assert content["skipped"] == []
    assert all(row["notes"] == [] for row in content["pictures"])
    import scoring_functions

    assert scoring_functions.sizes == [2, 1, 1], "two at once, and pictures of one size together"


def test_scores_are_those_of_the_reward(score, folder, capsys):
    from fastcraft.commands.picture_file import read_picture
    from fastcraft.rewards.brightness import BrightnessReward

    assert score("--rewards", "brightness", "--json", str(folder / "s.json")) == 0
    image = read_picture(folder / "images" / "10.png")
    assert image.shape == (3, 16, 16)
    content = json.loads((folder / "s.json").read_text())
    assert content["pictures"][2]["scores"]["brightness"] == BrightnessReward()(image[None], [""]).item()
    assert torch.equal(image, torch.full((3, 16, 16), 80 / 255))


@pytest.mark.parametrize("kernels", [(), ("--kernels", "reference")])
def test_the_image_tower_is_handed_to_the_kernels(score, monkeypatch, kernels):
    import fastcraft.diffusion.use_kernels as module

    calls = []
    monkeypatch.setattr(module, "use_kernels", lambda models, **options: calls.append((models, options)))
    assert score("--rewards", "clip", "--set", "clip.path=shapes", "--device", "cpu", *kernels) == 0
    ((models, options),) = calls
    assert [type(model).__name__ for model in models] == ["CLIPVisionModel"]
    assert options == {"backend": kernels[1] if kernels else "auto", "device": torch.device("cpu")}


def test_counts_of_a_detector_are_printed(score, folder, capsys, monkeypatch):
    from fastcraft.rewards.brightness import BrightnessReward

    monkeypatch.setattr(BrightnessReward, "counts", {"scored": 4, "none found": 1})
    assert score("--rewards", "brightness") == 0
    assert "brightness: 4 scored, 1 none found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--rewards", "brightnes"], "unknown reward 'brightnes'; did you mean 'brightness'"),
        (["--rewards", " , "], "--rewards: at least one name is required, got ' , '"),
        (["--rewards", "brightness,clip,brightness"], "--rewards: each name once, got 'brightness' 2 times"),
        (["--rewards", "brightness", "--set", "clip.path=x"], "expected REWARD.KEY=VALUE with a reward of --rewards"),
        (["--rewards", "brightness", "--set", "brightness"], "expected REWARD.KEY=VALUE"),
        (["--rewards", "hpsv2.1", "--set", "hpsv2.1.path=/nowhere"], "path of 'hpsv2.1' must be a file"),
        (["--rewards", "clip", "--set", "clip.path=3"], "path of 'clip' must be text, got 3"),
        (["--rewards", "pickscore"], "neither in the hub cache"),
        (["--rewards", "brightness", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--rewards", "brightness", "--device", "warp"], "--device: 'warp' cannot be used"),
        (
            ["--rewards", "clip", "--set", "clip.path=shapes", "--device", "cpu", "--kernels", "triton"],
            "--kernels: backend: 'triton' cannot serve CLIPVisionModel: the kernels need a CUDA",
        ),
        (["--rewards", "brightness", "--csv", "/nowhere/s.csv"], "--csv: the folder of '/nowhere/s.csv' must exist"),
        (["--rewards", "brightness", "--csv", "/tmp"], "--csv must be a file, got the folder '/tmp'"),
        (["--rewards", "brightness", "--json", ""], "--json must be a file, got ''"),
        (["--rewards", "brightness", "--json", "/nowhere/x/"], "--json must be a file, got the folder '/nowhere/x/'"),
        (
            ["--rewards", "brightness", "--json", "/tmp/fastcraft-s", "--csv", "/tmp/../tmp/fastcraft-s"],
            "--csv must not be a file that is read or written too, got '/tmp/../tmp/fastcraft-s'",
        ),
        (["--rewards", "brightness", "--images", ""], "--images must be a folder, got ''"),
        (["--rewards", "brightness", "--prompts", "/nowhere.txt"], "prompts: no such file: '/nowhere.txt'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(extra, message, score, capsys):
    assert score(*extra) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fastcraft: error: ")
    assert error.count("\n") == 1


def test_wrong_numbers_and_broken_pictures_are_named(score, folder, capsys):
    (folder / "images" / "broken.png").write_bytes(b"no picture")
    assert score("--rewards", "brightness") == 2
    error = capsys.readouterr().err
    assert (
        "one for each of the 5 pictures is needed, got 4; no pictures by their names, so not read: notes.txt" in error
    )
    (folder / "prompts.txt").write_text("a\nb\nc\nd\ne\n")
    assert score("--rewards", "brightness") == 2
    assert "broken.png' cannot be read as a picture" in capsys.readouterr().err
    for file in (folder / "images").iterdir():
        file.unlink()
    assert score("--rewards", "brightness") == 2
    assert "holds no picture (.png, .jpg, .jpeg, .webp, .bmp, .gif, .tif, .tiff)" in capsys.readouterr().err
