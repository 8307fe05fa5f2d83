"""The progress a person watches: a live bar on a terminal, a plain line every few seconds anywhere else."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

INTERVAL_S = 5.0
"""Seconds between plain lines; the first and the last step always get one."""
SMOOTHING = 0.2
"""Weight of the newest step in the running mean from which the time left follows."""


class Progress:
    """Steps done, rewards, samples/s per GPU, peak memory and time left, on standard error.

    Args:
        num_steps: optimiser steps of the whole run.
        first_step: steps done before this process began (resume).
        file: where to write; None = standard error.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        first_step: int = 0,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_steps = num_steps
        self.file = file or sys.stderr
        self._clock = clock
        self._previous = clock()
        self._previous_step = first_step
        self._seconds_per_step: float | None = None
        self._printed: float | None = None
        self._bars = self._open_bars(first_step) if _is_terminal(self.file) else []

    def _open_bars(self, first_step: int) -> list[Any]:
        """The bar and, under it, a line for the rewards: on 80 columns one line cannot hold both."""
        from tqdm import tqdm

        shared: dict[str, Any] = {"file": self.file, "dynamic_ncols": True, "leave": True}
        bar = tqdm(total=self.num_steps, initial=first_step, bar_format=_bar_format(""), position=0, **shared)
        rewards = tqdm(total=0, bar_format="{desc}", position=1, **shared)
        return [bar, rewards]

    def update(self, entry: Mapping[str, Any]) -> None:
        """Show one step; keys as in ``metrics.jsonl``, absent or null ones are left out."""
        step = entry["step"]
        now = self._clock()
        seconds = (now - self._previous) / max(1, step - self._previous_step)
        known = self._seconds_per_step
        self._seconds_per_step = seconds if known is None else known + SMOOTHING * (seconds - known)
        self._previous, self._previous_step = now, step
        left = f"{duration((self.num_steps - step) * self._seconds_per_step)} left"
        if self._bars:
            bar, rewards = self._bars
            rewards.set_description_str(rewards_text(entry), refresh=False)
            bar.bar_format = _bar_format("  ".join(filter(None, [speed_text(entry), left])))
            bar.update(step - bar.n)
            bar.refresh()
            rewards.refresh()
        elif self._printed is None or step >= self.num_steps or now - self._printed >= INTERVAL_S:
            self._printed = now
            self._line(
                "  ".join(filter(None, [f"step {step}/{self.num_steps}", rewards_text(entry), speed_text(entry), left]))
            )

    def message(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._bars:
            self._bars[0].write(text, file=self.file)
        else:
            self._line(text)

    def _line(self, text: str) -> None:
        self.file.write(text + "\n")
        self.file.flush()

    def close(self) -> None:
        """Leave the last state on the screen."""
        for bar in self._bars:
            bar.close()
        self._bars = []


def _is_terminal(file: TextIO) -> bool:
    """Whether a bar can be drawn: on a terminal that says it has no rows, tqdm would draw nothing at all."""
    try:
        return file.isatty() and min(os.get_terminal_size(file.fileno())) > 0
    except OSError:  # no file descriptor, so no size to ask for
        return file.isatty()


def _bar_format(text: str) -> str:
    """tqdm's own postfix would begin with a comma."""
    return f"step {{n_fmt}}/{{total_fmt}} |{{bar}}| {text}"


def rewards_text(entry: Mapping[str, Any]) -> str:
    """``"reward 0.714  aesthetic 5.32  pickscore 0.221"``; the total comes first, the loss where there is no reward."""
    rewards = {name: value for name, value in entry.get("rewards", {}).items() if value is not None}
    total = rewards.pop("total", None)
    named = ([("reward", total)] if total is not None else []) + list(rewards.items())
    if not named and entry.get("loss") is not None:
        named = [("loss", entry["loss"])]
    words = [f"{name} {value:.4g}" for name, value in named]
    return "  ".join([*words, "skipped"] if entry.get("skipped") else words)


def speed_text(entry: Mapping[str, Any]) -> str:
    """``"3.41 samples/s/GPU  12.3 GiB"``."""
    speed, memory = entry.get("samples_per_sec_per_gpu"), entry.get("peak_memory_mib")
    parts = [
        f"{speed:.3g} samples/s/GPU" if speed is not None else "",
        "" if memory is None else f"{memory / 1024:.1f} GiB" if memory >= 1024 else f"{memory:.0f} MiB",
    ]
    return "  ".join(filter(None, parts))


def duration(seconds: float) -> str:
    """``"0:42"``, ``"12:05"``, ``"3:07:00"``."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
