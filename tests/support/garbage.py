"""What stays to the end of a run, such as torch and the tests themselves: no collection of garbage looks through it."""

from __future__ import annotations

import atexit
import gc

import pytest


def keep() -> None:
    """Takes what there is now out of all collections to come."""
    gc.collect()
    gc.freeze()


# Extension modules complain of what they find in the end; a fork of a process that has torch ends before.
atexit.register(gc.unfreeze)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    keep()
