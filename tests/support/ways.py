"""The ways in which a norm is summed: in float64 where a chip is quick at it, else in three floats of float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support import emulation
from tests.support.backends import BACKENDS, EXECUTED, SLOW, executed, marks_of, name_of
from tests.support.pairs import every_combination, every_pair

# Those that know one way alone; a GPU's is its own.
_QUICK_FLOAT64 = {"eager": True, "cpu": True, emulation.BACKEND: False}
# In whose PTX the kernels know that float64 is quick, or not.
_ARCHITECTURES = {True: "compute_90", False: "compute_120"}

WAYS = [
    (backend, quick)
    for backend in (*BACKENDS, *EXECUTED)
    for quick in (True, False)
    if _QUICK_FLOAT64.get(backend, quick) == quick
]


def id_of(backend: str, quick: bool) -> str:
    return f"{backend} in {'float64' if quick else 'float32'}"


each_way = pytest.mark.parametrize(
    "backend, quick", [pytest.param(*way, marks=marks_of(way[0]), id=id_of(*way)) for way in WAYS]
)


def each_way_with(**values: Sequence[Any]) -> pytest.MarkDecorator:
    """Each way with every combination of values; a slow backend's with so many that every two values meet."""
    cases = []
    for backend, quick in WAYS:
        rows = every_pair(**values) if backend in SLOW else every_combination(**values)
        for row in rows:
            identity = "-".join([id_of(backend, quick), *(name_of(*item) for item in row.items())])
            cases.append(pytest.param(backend, quick, *row.values(), marks=marks_of(backend), id=identity))
    return pytest.mark.parametrize(", ".join(["backend", "quick", *values]), cases)


@contextmanager
def summed(backend: str, quick: bool) -> Iterator[None]:
    """The norms of a backend are summed as where float64 is quick, or is not."""
    with pytest.MonkeyPatch.context() as patch:
        if backend in ("triton", "triton_ptx"):
            for module in ("norm", "update"):
                patch.setattr(f"sassha_fused.triton_kernels.{module}.quick_float64", lambda device: quick)
        elif backend == "cuda_ptx":
            patch.setattr(executed(backend), "architecture", _ARCHITECTURES[quick])
        yield
