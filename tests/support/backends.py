"""The backends under test: a new one joins every conformance test by adding its name here."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from sassha_fused import ops
from sassha_fused.ops import Operators, operators
from tests.support import emulation

ops.BACKENDS[emulation.BACKEND] = ops.Backend(("cpu",), lambda: None, emulation.emulated)

# Each backend's name, and the device whose tensors it is tested on.
BACKENDS = {"eager": "cpu", "cpu": "cpu", emulation.BACKEND: "cpu"}
if importlib.util.find_spec("triton") is not None:
    # On the CPU interpreted (conftest.py).
    BACKENDS["triton"] = "cuda" if torch.cuda.is_available() else "cpu"
    if BACKENDS["triton"] == "cpu":
        from tests.support.interpreter import hasten

        hasten()
if torch.cuda.is_available():
    BACKENDS["cuda"] = "cuda"

# What the others must equal bit for bit, where the arithmetic fixes every bit.
BASELINE = "eager"


def marks_of(backend: str) -> list[pytest.MarkDecorator]:
    """The marks of a test of this backend."""
    return [pytest.mark.gpu] if BACKENDS[backend] == "cuda" else []


# Those that run as Python: every tensor, and every few thousand elements, take milliseconds.
INTERPRETED = {name for name in ("triton",) if BACKENDS.get(name) == "cpu"}

_PARAMETERS = [pytest.param(name, marks=marks_of(name)) for name in BACKENDS]
each_backend = pytest.mark.parametrize("backend", _PARAMETERS)
each_other_backend = pytest.mark.parametrize("backend", [p for p in _PARAMETERS if p.values != (BASELINE,)])
# For what would take them minutes, or has nothing to do with them.
each_quick_backend = pytest.mark.parametrize("backend", [p for p in _PARAMETERS if p.values[0] not in INTERPRETED])


def each_backend_and(
    name: str, values: Sequence[Any], few: Sequence[Any], *, without: str = "", id_of: Callable[[Any], str] = str
) -> pytest.MarkDecorator:
    """Each backend, without one, with each value of an argument; an interpreted one with few of them."""
    return pytest.mark.parametrize(
        f"backend, {name}",
        [
            pytest.param(backend, value, marks=marks_of(backend), id=f"{id_of(value)}-{backend}")
            for backend in BACKENDS
            if backend != without
            for value in (few if backend in INTERPRETED else values)
        ],
    )


def operators_of(backend: str) -> Operators:
    """The operators of a backend; ValueError with the reason where it cannot be used."""
    return operators(backend, torch.device(BACKENDS[backend]))


def evaluation_on(backend: str, evaluation: int) -> torch.Tensor:
    """The index of a Hessian evaluation as the operators of a backend take it."""
    return torch.tensor(evaluation, device=BACKENDS[backend])
