import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from tqdm import tqdm

from bench.report import Report

REPORT = pytest.StashKey[Report]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORT] = Report()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.section("budgets")
    for line in config.stash[REPORT].lines():
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    return pytestconfig.stash[REPORT]


@pytest.fixture(scope="session")
def progress(pytestconfig: pytest.Config):
    """progress(title) as a context gives a function that takes the part done, 0 to 1."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    @contextmanager
    def bar(title: str) -> Iterator[Callable[[float], None]]:
        layout = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}"
        pause = 1 if sys.stderr.isatty() else 20
        with (
            capture.global_and_fixture_disabled(),
            tqdm(desc=title, total=1, bar_format=layout, mininterval=pause) as shown,
        ):
            yield lambda done: shown.update(done - shown.n)

    return bar
