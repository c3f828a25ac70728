"""The backends under test: a new one joins every conformance test by adding its name here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch

from sassha_fused import ops
from sassha_fused.ops import Operators, operators
from tests.support import emulation
from tests.support.pairs import every_pair

ops.BACKENDS[emulation.BACKEND] = ops.Backend(("cpu",), lambda: None, emulation.emulated)

# Each backend's name, and the device whose tensors it is tested on.
BACKENDS = {"eager": "cpu", "cpu": "cpu", emulation.BACKEND: "cpu"}
if importlib.util.find_spec("triton") is not None:
    # On the CPU interpreted (conftest.py).
    BACKENDS["triton"] = "cuda" if torch.cuda.is_available() else "cpu"
    if BACKENDS["triton"] == "cpu":
        from tests.support.interpreter import speed_up_interpreter

        speed_up_interpreter()
if torch.cuda.is_available():
    BACKENDS["cuda"] = "cuda"

# What the others must equal bit for bit, where the arithmetic fixes every bit.
BASELINE = "eager"

# Those that run as Python: every tensor, and every few thousand elements, take milliseconds.
INTERPRETED = {name for name in ("triton",) if BACKENDS.get(name) == "cpu"}

# What the compilers of CUDA and of Triton make of the kernels, run on tensors of the CPU by an interpreter of PTX: the
# module of each. Their operators are tested, but no whole steps, which would take hours.
EXECUTED = {"cuda_ptx": "ptx", "triton_ptx": "triton_ptx"}


@functools.cache
def missing(backend: str) -> str | None:
    """Why an executed backend cannot be used here, or None."""
    if importlib.util.find_spec("ptxrun") is None:
        return "ptxrun, an interpreter of PTX, is not on PYTHONPATH"
    if backend == "triton_ptx" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if backend == "cuda_ptx" and emulation.nvcc() is None:
        return "nvcc was not found"
    return None


@functools.cache
def executed(backend: str) -> Any:
    """An executed backend."""
    return importlib.import_module(f"tests.support.{EXECUTED[backend]}").Backend()


def device_of(backend: str) -> str:
    """The device of the tensors that a backend is tested on."""
    return "cpu" if backend in EXECUTED else BACKENDS[backend]


def operators_of(backend: str) -> Operators:
    """The operators of a backend; ValueError with the reason where it cannot be used."""
    if backend in EXECUTED:
        found: Operators = executed(backend).operators()
        return found
    return operators(backend, torch.device(BACKENDS[backend]))


def evaluation_on(backend: str, evaluation: int) -> torch.Tensor:
    """The index of a Hessian evaluation as the operators of a backend take it."""
    return torch.tensor(evaluation, device=device_of(backend))


# ---------------------------------------------------------------------------------------------------------------------
# Tests for each of them

# Those of one thread whose tests take long: of them only short lists.
SLOW = (*INTERPRETED, *EXECUTED, *((emulation.BACKEND,) if os.environ.get(emulation.SLOW_VARIABLE) else ()))
QUICK = [name for name in BACKENDS if name not in SLOW]


def marks_of(backend: str) -> list[pytest.MarkDecorator]:
    """The marks of a test of this backend."""
    if backend in EXECUTED:
        reason = missing(backend)
        skip = pytest.mark.skipif(reason is not None, reason=f"{backend}: {reason}")
        return [pytest.mark.slow, pytest.mark.long, skip]
    if BACKENDS[backend] == "cuda":
        return [pytest.mark.gpu]
    return [] if backend in ("eager", "cpu") else [pytest.mark.slow]


def each_of(backends: Iterable[str]) -> pytest.MarkDecorator:
    """Each of some backends."""
    return pytest.mark.parametrize("backend", [pytest.param(name, marks=marks_of(name)) for name in backends])


each_backend = each_of(BACKENDS)
each_other_backend = each_of(name for name in BACKENDS if name != BASELINE)
# For what would take interpreted ones minutes, or has nothing to do with them.
each_quick_backend = each_of(QUICK)
# For what takes few examples of them.
each_slow_backend = each_of(SLOW)


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


def name_of(argument: str, value: Any) -> str:
    """A value as it stands in a test's name."""
    if isinstance(value, bool):
        return argument if value else f"not {argument}"
    return str(value).removeprefix("torch.")


def each_backend_with(
    *, without: Sequence[str] = (), few: dict[str, Sequence[Any]] | None = None, **values: Sequence[Any]
) -> pytest.MarkDecorator:
    """Each backend, executed ones too, with combinations in which every pair of values is found (see every_pair).

    without: backends that are left out. few: what slow ones get in place of values.
    """
    cases = []
    for backend in [name for name in (*BACKENDS, *EXECUTED) if name not in without]:
        for row in every_pair(**{**values, **((few or {}) if backend in SLOW else {})}):
            identity = "-".join([*(name_of(*item) for item in row.items()), backend])
            cases.append(pytest.param(backend, *row.values(), marks=marks_of(backend), id=identity))
    return pytest.mark.parametrize(", ".join(["backend", *values]), cases)
