"""Settings shared by all tests."""

import os

import torch
from hypothesis import settings

from tests.support.costs import (  # noqa: F401
    pytest_addoption,
    pytest_collection_finish,
    pytest_runtest_logreport,
    pytest_runtest_makereport,
    pytest_terminal_summary,
)
from tests.support.garbage import pytest_runtestloop  # noqa: F401
from tests.support.tracing import pytest_collection_modifyitems  # noqa: F401

# No deadline: the first call of anything in torch is slow. In CI the examples are the same in every run.
settings.register_profile("project", deadline=None, max_examples=50, print_blob=True)
settings.register_profile("project-ci", settings.get_profile("project"), derandomize=True, database=None)
settings.load_profile("project-ci" if "CI" in os.environ else "project")

if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels are tested as Python then.
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    # The networks under test must take the same passes in every run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
