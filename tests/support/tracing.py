"""Which tests coverage traces: tracing what interprets kernels takes up to three times as long as running it.

Some tests trace the lines of Triton's kernels, and those of its launcher.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

# Those that run what is not Python, or an interpreter of it; and of Triton's kernels, run as Python, these files do.
_UNTRACED = {"cuda_emulated", "cuda_ptx", "triton_ptx", "triton"}
_TRACED = {"test_guards.py", "test_schemas.py", "test_triton.py"}
# Here it would be pip that is traced.
_INSTALLING = {"test_packaging.py", "test_wheel.py"}


def _is_traced(item: pytest.Item) -> bool:
    if item.path.name in _TRACED:
        return True
    if item.path.name in _INSTALLING:
        return False
    backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")  # type: ignore[attr-defined]
    return item.path.parent.name != "machine" and backend not in _UNTRACED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not _is_traced(item):
            item.add_marker("no_cover")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Nor are the processes traced that such a test starts."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("no_cover"):
            patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        return (yield)
