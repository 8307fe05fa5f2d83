"""Stopping on request: signals and a dead launcher set a flag that the training loop polls."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

PREEMPTED_EXIT_CODE = 143
"""Exit status of a run that saved a checkpoint and stopped because it was asked to (128 + SIGTERM)."""

_POLL_SECONDS = 0.2  # between two looks at /proc
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopRequested(Exception):
    """Raised between denoising steps once a stop was requested; the caller saves and exits with 143."""


class Interrupt:
    """Turns SIGTERM, SIGINT and the death of the launcher into a flag. Made once, in the main thread.

    A second signal changes nothing: a save that has begun runs to its end. The ``deepspeed`` command dies at once on
    SIGTERM and leaves ``launch.py`` and the workers running (deepspeedai/DeepSpeed#4098), so a worker remembers its
    parent and grandparent and takes a change of either for a request. On Linux a worker is also sent SIGTERM by the
    kernel when its parent dies, so none is left behind, whatever killed the parent.

    Args:
        launched: whether a launcher started this process; None = RANK is set. A run started by hand does not watch its
            parent: it outlives the shell that started it, as under nohup.
        watch_grandparent: whether the parent was itself started by the command to watch; None = the parent is
            DeepSpeed's ``launch.py``.
    """

    def __init__(self, *, launched: bool | None = None, watch_grandparent: bool | None = None) -> None:
        self.reason = ""
        """Why `requested` is true: a signal's name or the launcher; empty while it is not."""
        self._looked_at = time.monotonic()
        self._parent = os.getppid()
        launched = "RANK" in os.environ if launched is None else launched
        if watch_grandparent is None:
            watch_grandparent = launched and _names_deepspeed(self._parent, "launch")
        self._launched = launched
        self._grandparent = _parent_of(self._parent) if watch_grandparent else None
        if self._grandparent == 1 and not _names_deepspeed(1, ""):  # it died while this process was starting
            self.reason = "the launcher died"
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        if launched:
            _signal_on_parent_death(signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    @property
    def requested(self) -> bool:
        """Whether to stop; once true it stays true. Costs nothing most of the time, two small reads every 0.2 s."""
        now = time.monotonic()
        if not self.reason and self._launched and now - self._looked_at >= _POLL_SECONDS:
            self._looked_at = now
            if os.getppid() != self._parent or (
                self._grandparent is not None and _parent_of(self._parent) != self._grandparent
            ):
                self.reason = "the launcher died"
        return bool(self.reason)

    def check(self) -> None:
        """Between two denoising steps.

        Raises:
            StopRequested: a stop was requested.
        """
        if self.requested:
            raise StopRequested(self.reason)

    def restore(self) -> None:
        """Put the previous signal handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._launched:
            _signal_on_parent_death(0)


def _parent_of(pid: int) -> int | None:
    """The parent's process id, or None where there is no /proc or no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])  # the name in parentheses may hold spaces


def _names_deepspeed(pid: int, launcher_module: str) -> bool:
    """Whether a process's command line names DeepSpeed, or that module of its launcher."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("/", ".")
    except OSError:
        return False
    return (f"deepspeed.launcher.{launcher_module}" if launcher_module else "deepspeed") in command


def _signal_on_parent_death(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
