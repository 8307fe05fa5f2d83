"""``fastcraft score`` on pictures that are bad, odd or many: what is kept, what is said, and with which exit status."""

import csv
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from fastcraft.cli import main
from fastcraft.commands.picture_file import ON_WHITE, ONE_FRAME, TURNED

PROMPTS = ["one", "two", "three", "four"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four gray pictures, their prompts, and functions of the brightness that fail in the ways of `FUNCTIONS`."""
    (tmp_path / "images").mkdir()
    for i in range(4):
        level = np.full((8, 8, 3), 60 * i, dtype=np.uint8)
        Image.fromarray(level).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "failing_functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "failing_functions", raising=False)
    return tmp_path


FUNCTIONS = """
from pathlib import Path

def nan(images, prompts):
    return [float("nan") if prompt == "two" else float("inf") if prompt == "three" else 1.0 for prompt in prompts]

def text_at_three(images, prompts):
    return ["x" if prompt == "three" else 1.0 for prompt in prompts]

def broken_at_three(images, prompts):
    if "three" in prompts:
        raise KeyboardInterrupt
    return [1.0] * len(prompts)

def spoils_two(images, prompts):
    Path("images/2.png").write_bytes(b"")
    return [1.0] * len(prompts)
"""


def score(*extra, rewards="brightness"):
    arguments = ["score", "--images", "images", "--prompts", "prompts.txt", "--rewards", rewards, "--device", "cpu"]
    return main([*arguments, "--json", "s.json", "--csv", "s.csv", *extra])


def score_by(function, *extra):
    return score("--set", f"callable.function=failing_functions:{function}", *extra, rewards="callable")


def written(folder):
    """Scored pictures and those that were not, by both files; nothing but whole files lies there."""
    content = json.loads((folder / "s.json").read_text())
    with (folder / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [row["file"] for row in content["pictures"]]
    assert not list(folder.glob(".s.*"))
    return content["pictures"], {row["file"]: row["reason"] for row in content["skipped"]}


def nothing_written(folder):
    return not list(folder.glob("*s.json*")) + list(folder.glob("*s.csv*"))


def test_a_bad_picture_is_found_before_weights_are_loaded(folder, capsys, monkeypatch):
    monkeypatch.setattr("fastcraft.rewards.build_rewards", lambda *args, **options: pytest.fail("weights were loaded"))
    (folder / "images" / "3.png").write_bytes(b"cut")
    assert score() == 2
    error = capsys.readouterr().err
    assert error.startswith("fastcraft: error: --images: '3.png' cannot be read as a picture: ")
    assert error.endswith("; --skip-bad scores the others\n")
    assert error.count("\n") == 1
    assert nothing_written(folder)


def test_bad_pictures_are_skipped_on_request_with_their_prompts(folder, capsys):
    (folder / "images" / "1.png").write_bytes(b"cut")
    assert score("--skip-bad") == 0
    pictures, skipped = written(folder)
    assert [row["file"] for row in pictures] == ["0.png", "2.png", "3.png"]
    assert [row["prompt"] for row in pictures] == ["one", "three", "four"]
    assert list(skipped) == ["1.png"]
    assert "cannot be read as a picture" in skipped["1.png"]
    printed = capsys.readouterr()
    assert "warning: 1.png is not scored: --images: '1.png' cannot be read as a picture: " in printed.err
    assert printed.out.splitlines()[1].split()[-1] == "3"


def test_a_picture_that_goes_bad_meanwhile_costs_itself_alone(folder, capsys):
    assert score_by("spoils_two", "--batch-size", "1", "--skip-bad") == 0
    pictures, skipped = written(folder)
    assert [row["file"] for row in pictures] == ["0.png", "1.png", "3.png"]
    assert list(skipped) == ["2.png"]


def test_what_is_scored_is_kept_when_the_run_ends_early(folder, capsys):
    assert score_by("spoils_two", "--batch-size", "1") == 2
    pictures, skipped = written(folder)
    assert [row["file"] for row in pictures] == ["0.png", "1.png"]
    assert skipped == {"2.png": "the run ended before it", "3.png": "the run ended before it"}
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("fastcraft: error: --images: '2.png' cannot be read as a picture")
    assert "warning: 3.png is not scored: the run ended before it" in printed.err
    assert printed.out.splitlines()[1].split()[-1] == "2"


def test_a_rewards_error_keeps_what_is_scored_too(folder, capsys):
    assert score_by("text_at_three", "--batch-size", "2") == 2
    assert [row["file"] for row in written(folder)[0]] == ["0.png", "1.png"]
    assert "must return numbers" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        score_by("broken_at_three", "--batch-size", "1")
    assert [row["file"] for row in written(folder)[0]] == ["0.png", "1.png"]


def test_an_error_at_the_first_batch_writes_nothing(folder, capsys):
    assert score_by("text_at_three", "--batch-size", "4") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert nothing_written(folder)


def test_scores_that_are_not_finite_end_with_status_1(folder, capsys):
    assert score_by("nan") == 1
    assert [row["scores"]["callable"] for row in written(folder)[0]] == [1.0, None, None, 1.0]
    error = capsys.readouterr().err
    assert error == "fastcraft: warning: 2 of 4 scores of callable are not finite numbers: 1.png, 2.png\n"


def test_what_was_done_to_pictures_is_said_and_written(folder, capsys):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (8, 8)).save(folder / "images" / "0.png", exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(folder / "images" / "1.png")
    frames = [Image.new("RGB", (8, 8), color) for color in ("white", "black")]
    frames[0].save(folder / "images" / "2.gif", save_all=True, append_images=frames[1:])
    (folder / "images" / "2.png").unlink()
    assert score() == 0
    error = capsys.readouterr().err
    expected = {"0.png": TURNED, "1.png": ON_WHITE, "2.gif": ONE_FRAME}
    for name, note in expected.items():
        assert f"fastcraft: note: --images: {note}: {name}\n" in error
    pictures, _ = written(folder)
    assert {row["file"]: row["notes"] for row in pictures if row["notes"]} == {k: [v] for k, v in expected.items()}
    assert pictures[1]["scores"]["brightness"] == pytest.approx(1.0)
    assert pictures[2]["scores"]["brightness"] == pytest.approx(1.0)


def test_gray_of_sixteen_bits_scores_by_its_level(folder):
    for i, level in enumerate((0, 0x4000, 0x8000, 0xFFFF)):
        Image.fromarray(np.full((8, 8), level, dtype=np.uint16)).save(folder / "images" / f"{i}.png")
    assert score() == 0
    scores = [row["scores"]["brightness"] for row in written(folder)[0]]
    assert scores == pytest.approx([0.0, 0.25, 0.5, 1.0], abs=1e-4)


def test_gif_and_tiff_are_pictures_too(folder):
    for i, ending in enumerate(("gif", "tiff")):
        Image.open(folder / "images" / f"{i}.png").save(folder / "images" / f"{i}.{ending}")
        (folder / "images" / f"{i}.png").unlink()
    assert score() == 0
    pictures, _ = written(folder)
    assert [row["file"] for row in pictures] == ["0.gif", "1.tiff", "2.png", "3.png"]
    assert [row["scores"]["brightness"] for row in pictures] == pytest.approx([i * 60 / 255 for i in range(4)])


def test_an_empty_line_shifts_nothing(folder, capsys):
    (folder / "prompts.txt").write_text("one\n\nthree\nfour\n")
    assert score() == 0
    assert [row["prompt"] for row in written(folder)[0]] == ["one", "", "three", "four"]
    assert capsys.readouterr().err == "fastcraft: note: --prompts: 4, 1 of them empty: line 2\n"


def test_a_column_of_names_pairs_by_name(folder):
    (folder / "prompts.csv").write_text("file,prompt\n3.png,four\n0.png,one\n2.png,three\n1.png,two\n")
    assert score("--prompts", "prompts.csv") == 0
    assert [row["prompt"] for row in written(folder)[0]] == PROMPTS


def test_names_that_are_not_utf8_are_scored_and_written(folder, capsys):
    name = b"\xe9.png".decode("utf-8", "surrogateescape")
    (folder / "images" / "3.png").rename(folder / "images" / name)
    assert score() == 0
    assert [row["file"] for row in written(folder)[0]] == ["0.png", "1.png", "2.png", "\\xe9.png"]
    assert "0.7059 \\xe9.png" in capsys.readouterr().out
    (folder / "images" / name).write_bytes(b"")
    assert score() == 2
    assert "'\\\\xe9.png' cannot be read" in capsys.readouterr().err


def test_letters_that_the_terminal_lacks_are_escaped(folder, monkeypatch):
    (folder / "images" / "3.png").rename(folder / "images" / "\u732b.png")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert score() == 0
    assert b"0.7059 \\u732b.png" in terminal.buffer.getvalue()
    assert [row["file"] for row in written(folder)[0]][3] == "\u732b.png"


def test_its_own_csv_is_a_prompt_file_that_pairs_by_name(folder, capsys):
    assert score() == 0
    before, _ = written(folder)
    (folder / "s.csv").rename(folder / "own.csv")
    (folder / "images" / "0.png").rename(folder / "images" / "9.png")
    (folder / "own.csv").write_text((folder / "own.csv").read_text().replace("0.png", "9.png"))
    assert score("--prompts", "own.csv") == 0
    after, _ = written(folder)
    assert [(row["file"], row["prompt"]) for row in after] == [
        ("1.png", "two"), ("2.png", "three"), ("3.png", "four"), ("9.png", "one")
    ]  # fmt: skip
    assert after[3]["scores"] == before[0]["scores"]


@pytest.mark.parametrize("target", ["prompts.txt", "images/0.png", "./images/../prompts.txt"])
def test_what_is_read_is_never_written_over(target, folder, capsys):
    content = (folder / target).read_bytes()
    assert score("--csv", target) == 2
    assert f"--csv must not be a file that is read or written too, got {target!r}" in capsys.readouterr().err
    assert (folder / target).read_bytes() == content


def test_a_file_that_cannot_be_written_is_found_before_scoring(folder, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert score() == 2
    assert capsys.readouterr().err == "fastcraft: error: --json: 's.json' must be writable\n"


def test_a_full_disk_is_one_line_and_leaves_the_old_file(folder, capsys, monkeypatch):
    (folder / "s.json").write_text("old")

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastcraft.durable.write_text", full)
    assert score() == 2
    printed = capsys.readouterr()
    assert printed.err == "fastcraft: error: --json: 's.json' cannot be written: No space left on device\n"
    assert printed.out.splitlines()[1].split()[-1] == "4", "the table is printed all the same"
    assert (folder / "s.json").read_text() == "old"


def test_the_output_may_be_a_device_or_a_link(folder, capsys):
    (folder / "real.json").write_text("old")
    (folder / "s.json").symlink_to("real.json")
    assert score("--csv", "/dev/null") == 0
    assert json.loads((folder / "real.json").read_text())["skipped"] == []
    assert (folder / "s.json").is_symlink()
    from pathlib import Path

    assert Path("/dev/null").is_char_device()


def test_a_folder_that_cannot_be_listed_is_one_line(folder, capsys, monkeypatch):
    from pathlib import Path

    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)
    assert score() == 2
    assert capsys.readouterr().err == (
        "fastcraft: error: --images: folder 'images' cannot be listed: Permission denied\n"
    )


def test_a_mistyped_reward_is_said_before_pictures_are_read(folder, capsys):
    (folder / "images" / "0.png").write_bytes(b"")
    assert score(rewards="brightness,brightnes") == 2
    assert "'brightnes'; did you mean 'brightness'" in capsys.readouterr().err
