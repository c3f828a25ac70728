"""Settings shared by the tests of machines."""

from collections.abc import Iterator

import pytest

from tests.support.forks import Forks
from tests.support.problems import single_threaded

# Small tensors: a second thread costs more than it does.
one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Runs pytest in forks of a process that has torch."""
    forks = Forks()
    yield forks
    forks.close()
