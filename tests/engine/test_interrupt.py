"""Stop requests, with real signals and real processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastcraft.engine.interrupt import PREEMPTED_EXIT_CODE, Interrupt, StopRequested

ROOT = Path(__file__).parents[2]
PREAMBLE = """
import os, subprocess, sys, time
from fastcraft.engine.interrupt import Interrupt, StopRequested
"""
WORKER = """
interrupt = Interrupt(launched={launched}, watch_grandparent={watch})
print(os.getpid(), flush=True)
deadline = time.monotonic() + 120
try:
    while time.monotonic() < deadline:
        interrupt.check()
        time.sleep(0.02)
except StopRequested as stop:
    open(sys.argv[1], "w").write(str(stop))
else:
    open(sys.argv[1], "w").write("not asked")
"""


@contextlib.contextmanager
def chain(tmp_path, *, generations, launched, watch):
    """A worker under ``generations`` waiting ancestors; yields (process ids, oldest first; the result file)."""
    result = tmp_path / "result"
    programs = [PREAMBLE + WORKER.format(launched=launched, watch=watch)]
    for _ in range(generations):
        child = [sys.executable, "-c", programs[0], str(result)]
        programs.insert(0, f"import os, subprocess\nprint(os.getpid(), flush=True)\nsubprocess.run({child!r})\n")
    process = subprocess.Popen(
        [sys.executable, "-c", programs[0], str(result)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield [int(process.stdout.readline()) for _ in programs], result
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def text_of(result, seconds=60.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result.exists() and result.read_text():
            return result.read_text()
        time.sleep(0.02)
    return "no answer"


@pytest.fixture
def interrupt():
    interrupt = Interrupt(launched=False)
    yield interrupt
    interrupt.restore()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_a_second_one_is_harmless(interrupt, number):
    interrupt.check()
    assert not interrupt.requested
    for _ in range(2):
        os.kill(os.getpid(), number)
        assert interrupt.requested
    with pytest.raises(StopRequested, match=number.name):
        interrupt.check()
    assert PREEMPTED_EXIT_CODE == 143


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    interrupt = Interrupt(launched=True)
    assert signal.getsignal(signal.SIGTERM) not in before
    interrupt.restore()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_parent_is_a_request(tmp_path, number):
    with chain(tmp_path, generations=1, launched=True, watch=False) as (pids, result):
        os.kill(pids[0], number)
        assert text_of(result) == "SIGTERM"  # sent by the kernel


def test_a_dead_grandparent_is_a_request_when_watched(tmp_path):
    with chain(tmp_path, generations=2, launched=True, watch=True) as (pids, result):
        os.kill(pids[0], signal.SIGTERM)  # as the deepspeed command dies, launch.py and the worker living on
        assert text_of(result) == "the launcher died"


def test_a_launcher_that_died_before_the_worker_looked_is_a_request(monkeypatch):
    monkeypatch.setattr("fastcraft.engine.interrupt._parent_of", lambda pid: 1)
    late = Interrupt(launched=True, watch_grandparent=True)
    early = Interrupt(launched=True, watch_grandparent=False)
    early.restore()
    late.restore()
    assert (late.reason, early.reason) == ("the launcher died", "")


@pytest.mark.parametrize(("generations", "launched"), [(1, False), (2, True)])
def test_other_deaths_are_not_ours(tmp_path, generations, launched):
    """A run started by hand outlives its shell; a launcher other than DeepSpeed's outlives its own."""
    with chain(tmp_path, generations=generations, launched=launched, watch=None) as (pids, result):
        os.kill(pids[0], signal.SIGKILL)
        assert text_of(result, seconds=1.0) == "no answer"
        os.kill(pids[-1], signal.SIGTERM)
        assert text_of(result) == "SIGTERM"


def test_deepspeeds_launcher_is_recognised(tmp_path):
    """The parent's command line names deepspeed's launch module, so its own parent is watched."""
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    worker = [sys.executable, "-c", PREAMBLE + WORKER.format(launched=None, watch=None), str(tmp_path / "result")]
    (package / "launch.py").write_text(f"import subprocess\nsubprocess.run({worker!r})\n")
    runner = f"import subprocess\nsubprocess.run({[sys.executable, str(package / 'launch.py')]!r})\n"
    process = subprocess.Popen(
        [sys.executable, "-c", runner],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RANK": "0"},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        process.stdout.readline()
        process.kill()
        assert text_of(tmp_path / "result") == "the launcher died"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
