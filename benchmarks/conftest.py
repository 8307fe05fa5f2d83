"""The run's machine, its table after pytest-benchmark's own, and ``--rows FILE`` for the same as JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels.harness import Machine, measure_machine, table
from fastcraft.evaluation.environment import environment

MACHINE = pytest.StashKey[Machine]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, metavar="FILE", help="write the table of the fused ops as JSON")


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Machine:
    """Measured once a run."""
    return request.config.stash.setdefault(MACHINE, measure_machine())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    machine = config.stash.get(MACHINE, None)
    if machine is None or not machine.rows:
        return
    terminalreporter.section("fused ops")
    terminalreporter.write_line(
        f"{machine.device}, {machine.dtype}: copy {machine.copy_rate / 1e9:.0f} GB/s, matrix product "
        f"{machine.matmul_rate / 1e12:.3g} TFLOP/s, measured in this run; rates are those of the warm graph, if any"
    )
    for line in table(machine.rows):
        terminalreporter.write_line(line)
    file = config.getoption("--rows")
    if file is not None:
        limits = {"copy_gb_per_s": machine.copy_rate / 1e9, "matmul_tflop_per_s": machine.matmul_rate / 1e12}
        content = {"environment": environment(), "limits": limits, "rows": machine.rows}
        file.write_text(json.dumps(content, indent=1) + "\n")
