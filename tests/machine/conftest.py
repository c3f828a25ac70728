"""Settings shared by the tests of machines."""

import pytest

from tests.support.problems import single_threaded

# Small tensors: a second thread costs more than it does.
one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)
