"""pytest --costs: the CPU seconds of every folder and file of tests, their child processes' among them.

The environment variable SASSHA_COSTS names a file for those of every test.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from pathlib import PurePosixPath
from typing import Any

import pytest

_seconds: Counter[str] = Counter()
_before = 0.0


def _now() -> float:
    """CPU seconds of this process and of the children that it has waited for, so far."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--costs", action="store_true", help="print the CPU seconds of every folder and file of tests")


def pytest_collection_finish() -> None:
    global _before
    _before = _now()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Notes in the report, which workers send home, what was spent since the report before."""
    global _before
    report = yield
    now = _now()
    report.cpu_seconds, _before = now - _before, now
    return report


def pytest_runtest_logreport(report: Any) -> None:
    _seconds[report.nodeid] += getattr(report, "cpu_seconds", 0.0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--costs"):
        return
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for nodeid, spent in _seconds.items():
        file = PurePosixPath(nodeid.partition("::")[0])
        for place in (f"{file.parent}/", str(file)):
            seconds[place] += spent
            tests[place] += 1
    terminalreporter.section("CPU seconds")
    for place in sorted(seconds):
        terminalreporter.write_line(f"{seconds[place]:8.1f} s {tests[place]:6d} tests  {place}")
    terminalreporter.write_line(f"{_seconds.total():8.1f} s {len(_seconds):6d} tests")
    if path := os.environ.get("SASSHA_COSTS"):
        with open(path, "w") as out:
            for nodeid, spent in _seconds.most_common():
                out.write(f"{spent:9.3f} {nodeid}\n")
