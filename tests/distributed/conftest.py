"""Processes that the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.support.ranks import Ranks, ranks


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    """A pair of ranks: to start them takes as long as many tests."""
    with ranks(2) as processes:
        yield processes
