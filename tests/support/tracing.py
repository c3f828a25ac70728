"""Which tests coverage does not trace, marked so: they would take half as long again, and interpreters far longer.

They run by themselves, as make test does it: coverage that is stopped and started between tests has hung. Some tests of
Triton trace the lines of its kernels, and those of its launcher.
"""

from __future__ import annotations

import pytest

# Those that run what is not Python, or an interpreter of it.
_UNTRACED = {"cuda_emulated", "cuda_ptx", "triton_ptx"}
# Of the operators, and of Triton's kernels run as Python, these files are enough: steps run them as well.
_TRACED = {"test_guards.py", "test_norm_of_average.py", "test_schemas.py", "test_triton.py"}
# Here it would be pip that is traced, or torch's own Python.
_OF_OTHERS = {"test_packaging.py", "test_wheel.py", "test_fake_tensors.py"}
# Of operators and machines above; and many kinds of one thing each, which other files have one of.
_UNTRACED_FOLDERS = {"operators", "machine", "kinds"}


def _is_traced(item: pytest.Item) -> bool:
    backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")  # type: ignore[attr-defined]
    if item.path.name in _OF_OTHERS or backend in _UNTRACED:
        return False
    return item.path.name in _TRACED or (item.path.parent.name not in _UNTRACED_FOLDERS and backend != "triton")


# Before pytest chooses by marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not _is_traced(item):
            item.add_marker("untraced")
