"""Settings shared by the tests of operators."""

import pytest

from tests.support.problems import single_threaded

# What more threads do is a test of its own (test_agreement.py).
one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)
