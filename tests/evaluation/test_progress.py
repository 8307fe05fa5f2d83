"""Progress: plain lines into a file, a bar on a terminal."""

import io
import os
import termios

import pytest

from fastcraft.evaluation.progress import Progress, duration, rewards_text, speed_text


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def entry(step):
    return {
        "step": step,
        "loss": -0.7,
        "rewards": {"aesthetic": 5.3219, "total": 0.71428},
        "samples_per_sec_per_gpu": 3.4142,
        "peak_memory_mib": 12595.2,
    }


def run(file, steps, *, seconds=1.0, num_steps=20, first_step=0):
    clock = Clock()
    progress = Progress(num_steps, first_step=first_step, file=file, clock=clock)
    for step in steps:
        clock.now += seconds
        progress.update(entry(step))
    progress.close()
    return file.getvalue()


def test_a_file_gets_plain_lines_every_few_seconds():
    text = run(io.StringIO(), range(1, 21))
    assert "\r" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert [line.split()[1] for line in lines] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    assert lines[1] == ("step 6/20  reward 0.7143  aesthetic 5.322  3.41 samples/s/GPU  12.3 GiB  0:14 left")
    assert lines[-1].endswith("0:00 left")


def test_time_left_counts_only_this_process_after_a_resume():
    text = run(io.StringIO(), [16], seconds=10.0, first_step=15)
    assert text.endswith("0:40 left\n")


def test_a_message_has_its_own_line():
    file = io.StringIO()
    Progress(2, file=file).message("checkpoint failed")
    assert file.getvalue() == "checkpoint failed\n"


def test_a_terminal_gets_a_bar_with_everything():
    file = Terminal()
    clock = Clock()
    progress = Progress(20, file=file, clock=clock)
    for step in range(1, 4):
        clock.now += 2.0
        progress.update(entry(step))
    progress.message("saved")
    progress.close()
    text = file.getvalue()
    for part in (
        "3/20",
        "reward 0.7143",
        "aesthetic 5.322",
        "3.41 samples/s/GPU",
        "12.3 GiB",
        "0:34 left",
        "saved\n",
        "| 3.41",
    ):
        assert part in text, f"{part!r} is not on the terminal"
    assert "\r" in text


@pytest.mark.parametrize("rows", [0, 24])
def test_a_terminal_without_a_size_gets_plain_lines(rows):
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (rows, 100))
    with open(slave, "w") as file:
        progress = Progress(1, file=file)
        progress.update(entry(1))
        progress.close()
        written = b""
        while b"1/1" not in written:  # a terminal hands over what it has, which may be a part
            written += os.read(master, 100_000)
    os.close(master)
    text = written.decode()
    assert ("|" in text) == (rows > 0)


def test_what_is_unknown_is_left_out():
    assert rewards_text({"rewards": {"total": None, "clip": 0.25}}) == "clip 0.25"
    assert rewards_text({"rewards": {}, "loss": 1.5, "skipped": True}) == "loss 1.5  skipped"
    assert rewards_text({"rewards": {}, "loss": None}) == ""
    assert speed_text({"samples_per_sec_per_gpu": None, "peak_memory_mib": 512.4}) == "512 MiB"


def test_durations():
    assert [duration(seconds) for seconds in (0, 42.4, 725, 11220)] == ["0:00", "0:42", "12:05", "3:07:00"]
